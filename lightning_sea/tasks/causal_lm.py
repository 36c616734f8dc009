"""Language modelling: next-token loss and perplexity."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from transformers import AutoModelForCausalLM

from ..distillation import mean_over_rows
from .base import Batch, DistillationModule

IGNORED = -100  # label of positions that are not predicted, as in transformers


class Perplexity(Metric):
    """exp of the mean negative log-likelihood per token: exact over batches of any size and over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, counted: Tensor) -> None:
        """Add ``losses`` (negative log-likelihoods in nats) where the bool tensor ``counted`` is set."""
        self.total += torch.where(counted, losses, 0.0).sum(dtype=torch.float64)
        self.tokens += counted.sum()

    def compute(self) -> Tensor:
        return (self.total / self.tokens).exp()


class CausalLMModule(DistillationModule):
    """Trains and evaluates a causal language model.

    Batches hold ``input_ids`` and ``labels`` ``[N, T]`` (the same tokens, -100 where a token is only context) and, with
    padding, ``attention_mask``. Logs ``val/perplexity`` and ``test/perplexity``.
    """

    auto_class = AutoModelForCausalLM
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    input_names = ("input_ids", "attention_mask")

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.perplexity = torch.nn.ModuleDict({"val": Perplexity(), "test": Perplexity()})

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        losses, counted = token_losses(logits, batch["labels"])
        return mean_over_rows(losses, counted)

    def logit_rows(self, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool() if "attention_mask" in batch else None

    def evaluate(self, logits: Tensor, batch: Batch, stage: str, dataloader_idx: int) -> None:
        metric = self.perplexity[stage]
        metric.update(*token_losses(logits, batch["labels"]))
        self.log(f"{stage}/perplexity", metric, on_step=False, on_epoch=True, prog_bar=True)


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every next token.

    Args:
        logits: ``[N, T, V]``.
        labels: int64 ``[N, T]``; position t is predicted from the logits at t - 1; -100 is not predicted.

    Returns:
        float32 ``[N, T - 1]`` in nats (0 where there is nothing to predict), and the bool mask of what counts.
    """
    targets = labels[:, 1:]
    # Flat: over a dimension that is not the last, PyTorch's log-softmax is many times slower on a GPU.
    rows = logits[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets), targets != IGNORED
