"""What a student learns from its teacher (SEA, arXiv 2310.01777, section 3.4), with memory linear in the length.

Every error is first averaged over the real rows of an item and then over items, so that padding changes nothing and a
step spread over several devices equals one step over the whole batch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sea_kernels as ops

from .attention.estimate import Estimate
from .recorder import LayerRecord


@dataclass(frozen=True)
class DistillationConfig:
    """Weights of the losses; a loss of weight 0 is not computed.

    Attributes:
        est_kl: KL divergence of the estimated attention from the teacher's attention.
        est_mse: mean squared error of the estimated attention over keys.
        attn_kl: KL divergence of the student's own dense attention from the teacher's.
        attn_mse: mean squared error of the same.
        context: squared error of what attention returns.
        hidden: squared error of the hidden states, mean over layers.
        logit: KL divergence of the student's logits from the teacher's; their squared error in a regression.
        task: the task's own loss.
        relative: divide the errors of context and hidden states by the teacher's mean square, so that one weight fits
            every model, also those with a few huge activations; the paper does not.

    Raises:
        ValueError: if a weight is negative or all are 0.
    """

    est_kl: float = 0.1
    est_mse: float = 1.0
    attn_kl: float = 0.1
    attn_mse: float = 1.0
    context: float = 1.0
    hidden: float = 5.0
    logit: float = 0.2
    task: float = 0.1
    relative: bool = True

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type is float}
        negative = {name: weight for name, weight in weights.items() if weight < 0}
        if negative or not any(weights.values()):
            raise ValueError(f"weights of the losses are {negative or weights}, expected at least 0 and not all 0")

    @classmethod
    def paper_glue(cls, num_heads: int = 12, **changes: Any) -> "DistillationConfig":
        """The paper's weights for BERT on GLUE.

        Bidirectional divergences are summed over heads there and averaged over them here: hence the factor
        ``num_heads`` (BERT-base has 12).
        """
        divergence = num_heads / 10
        paper = {"est_kl": divergence, "attn_kl": divergence, "hidden": 10.0, "logit": 0.1, "relative": False}
        return cls(**{**paper, **changes})

    @classmethod
    def paper_opt(cls, **changes: Any) -> "DistillationConfig":
        """The paper's weights for OPT on WikiText-2."""
        return cls(**{"hidden": 5.0, "logit": 0.2, "relative": False, **changes})

    @property
    def compares_maps(self) -> bool:
        """Whether a loss compares attention maps."""
        return bool(self.est_kl or self.est_mse or self.attn_kl or self.attn_mse)

    @property
    def compares_layers(self) -> bool:
        """Whether a loss needs records of the attention layers."""
        return self.compares_maps or bool(self.context)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints."""
        return dataclasses.asdict(self)


def mean_over_rows(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real rows of each item, then over items.

    Args:
        values: ``[N, T]``, or ``[N, H, T]`` whose heads are averaged first.
        real: bool ``[N, T]``, False in padding rows, whose values do not count; None means that all rows are real.

    Returns:
        A float32 scalar (float64 for float64).
    """
    values = values if values.dtype == torch.float64 else values.float()
    if real is None:
        return values.mean()
    if values.dim() == 3:
        values = values.mean(1)
    kept = torch.where(real, values, 0.0).sum(-1)
    return (kept / real.sum(-1).clamp_min(1)).mean()


def estimation_rows(teacher: LayerRecord, estimate: Estimate) -> tuple[Tensor, Tensor]:
    """How far each row of a layer's estimate lies from the teacher's attention: L_est before any mean.

    Args:
        teacher: record of the dense layer; gradients do not reach it.
        estimate: what SEA estimated for the same tokens.

    Returns:
        KL divergence, and the sum of squared errors over the keys, each ``[N, H, T]``.
    """
    place = {"causal": teacher.causal, "attention_mask": teacher.attention_mask}
    place |= {"layout": estimate.layout, "shift": estimate.shift}
    with torch.no_grad():
        statistics = ops.teacher_statistics(
            teacher.query,
            teacher.key,
            num_bins=estimate.scores.shape[-1],
            scaling=teacher.scaling,
            log_sum=teacher.log_sum,
            **place,
        )
    return ops.estimation_loss(estimate.scores, statistics, num_keys=teacher.key.shape[2], **place)


def attention_rows(teacher: LayerRecord, student: LayerRecord) -> tuple[Tensor, Tensor]:
    """How far each row of the dense attention of the student's own queries and keys lies from the teacher's: L_attn.

    Returns:
        As ``estimation_rows``.
    """
    return ops.attention_loss(
        teacher.query,
        teacher.key,
        student.query,
        student.key,
        causal=teacher.causal,
        teacher_scaling=teacher.scaling,
        scaling=student.scaling,
        attention_mask=teacher.attention_mask,
        teacher_log_sum=teacher.log_sum,
    )


def estimation_losses(teacher: LayerRecord, estimate: Estimate) -> dict[str, Tensor]:
    """L_est of one layer; arguments as for ``estimation_rows``.

    Returns:
        Scalars ``est_kl`` and ``est_mse``. The latter is the sum over keys of the squared error divided by the item's
        number of real tokens: the mean over the T x T map when there is no padding.
    """
    return _means("est", [estimation_rows(teacher, estimate)], teacher.attention_mask)


def attention_losses(teacher: LayerRecord, student: LayerRecord) -> dict[str, Tensor]:
    """L_attn of one layer.

    Returns:
        Scalars ``attn_kl`` and ``attn_mse``, measured as in ``estimation_losses``.
    """
    return _means("attn", [attention_rows(teacher, student)], teacher.attention_mask)


def logit_loss(teacher: Tensor, student: Tensor, real: Tensor | None = None) -> Tensor:
    """KL divergence of the student's distribution from the teacher's, or squared error where there is one output.

    Args:
        teacher: logits ``[N, C]`` of a classifier or ``[N, T, C]`` of a language model; no gradient reaches them.
        student: same shape.
        real: bool ``[N, T]`` or None; for language models only.
    """
    teacher, student = teacher.detach().float(), student.float()
    if teacher.shape[-1] == 1:
        return (student - teacher).square().mean()
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return mean_over_rows(divergence, real) if divergence.dim() > 1 else divergence.mean()


def only_what_losses_read(teacher: LayerRecord, config: DistillationConfig) -> LayerRecord:
    """The teacher's record without the tensors that ``layer_losses`` does not read; None stands for them."""
    unread = ["value"]
    if not config.compares_maps:
        unread += ["query", "key", "log_sum"]
    if not config.context:
        unread.append("context")
    return dataclasses.replace(teacher, **dict.fromkeys(unread))


def layer_losses(layers: Sequence[tuple[LayerRecord, LayerRecord]], config: DistillationConfig) -> dict[str, Tensor]:
    """All losses that compare layers and have a weight, each the mean over the layers that have it.

    Rows of all layers are averaged at once, since at short lengths a step waits for the launches of such small work.

    Args:
        layers: the teacher's and the student's record of every layer of one forward pass: of one shape, and with one
            attention mask.
        config: weights of the losses.

    Returns:
        Scalars; ``est_*`` only where a student's layer has an estimate.
    """
    losses: dict[str, Tensor] = {}
    if not layers:
        return losses
    real = layers[0][0].attention_mask
    estimates = [(teacher, student.estimate) for teacher, student in layers if student.estimate is not None]
    if estimates and (config.est_kl or config.est_mse):
        losses |= _means("est", [estimation_rows(*pair) for pair in estimates], real)
    if config.attn_kl or config.attn_mse:
        losses |= _means("attn", [attention_rows(*pair) for pair in layers], real)
    if config.context:
        contexts = [[record.context for record in records] for records in zip(*layers, strict=True)]
        losses["context"] = ops.state_loss(*contexts, relative=config.relative, attention_mask=real)
    return losses


def mean_over_layers(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of every loss over the layers that have it."""
    names = dict.fromkeys(name for losses in layers for name in losses)
    return {name: torch.stack([losses[name] for losses in layers if name in losses]).mean() for name in names}


def hidden_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], real: Tensor | None, config: DistillationConfig
) -> Tensor:
    """L_hid: ``sea_kernels.state_loss`` of the hidden states ``[N, T, C]`` of all layers, embeddings included."""
    return ops.state_loss(teacher, student, relative=config.relative, attention_mask=real)


def weighted_sum(losses: dict[str, Tensor], config: DistillationConfig) -> Tensor:
    """The loss to minimise: every loss times its weight."""
    return torch.stack([getattr(config, name) * loss for name, loss in losses.items()]).sum()


def _means(name: str, layers: Sequence[tuple[Tensor, Tensor]], real: Tensor | None) -> dict[str, Tensor]:
    """Scalars of the rows that ``estimation_rows`` or ``attention_rows`` gave of each layer."""
    divergences, square_errors = zip(*layers, strict=True)
    if real is None:  # one number divides them all
        divergence, square_error = torch.cat(divergences + square_errors).view(2, -1).mean(1).unbind()
        error = square_error / divergences[0].shape[-1]
    else:
        square_error = torch.cat(square_errors) / real.sum(-1).clamp_min(1).repeat(len(layers))[:, None, None]
        real = real.repeat(len(layers), 1)
        divergence, error = mean_over_rows(torch.cat(divergences), real), mean_over_rows(square_error, real)
    return {f"{name}_kl": divergence, f"{name}_mse": error}
