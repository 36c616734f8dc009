"""The losses of attention maps as their formulas say, over T x T maps: what linear memory is compared with.

Drop-in for the functions of the same names in ``lightning_sea.distillation``, for causal attention without padding.
"""

import measure  # noqa: F401 (makes the checkout importable)
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sea.attention import Estimate
from lightning_sea.recorder import LayerRecord
from sea_kernels.bins import bin_of


def estimation_rows(
    teacher: LayerRecord, estimate: Estimate, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """KL divergence and sum of squared errors of each row, of the teacher's map and the estimate stretched to the keys.

    Args:
        teacher: record of the dense layer; no gradient reaches it.
        estimate: what SEA estimated for the same tokens.
        dtype: of the maps.

    Returns:
        Each ``[N, H, T]``.
    """
    with torch.no_grad():
        target = log_map(teacher.query, teacher.key, teacher.scaling, dtype)
    return _rows(target, stretched_log_map(estimate, dtype))


def attention_rows(
    teacher: LayerRecord, student: LayerRecord, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The same of the maps of both models; no gradient reaches the teacher."""
    with torch.no_grad():
        target = log_map(teacher.query, teacher.key, teacher.scaling, dtype)
    return _rows(target, log_map(student.query, student.key, student.scaling, dtype))


def estimation_losses(
    teacher: LayerRecord, estimate: Estimate, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """``est_kl`` and ``est_mse``, means over the maps."""
    return _losses("est", *estimation_rows(teacher, estimate, dtype))


def attention_losses(
    teacher: LayerRecord, student: LayerRecord, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """``attn_kl`` and ``attn_mse``, means over the maps."""
    return _losses("attn", *attention_rows(teacher, student, dtype))


def log_map(query: Tensor, key: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Logarithm of causal attention ``[N, H, T, T]``, hugely negative at keys that a row does not see.

    Args:
        query: ``[N, H, T, D]``.
        key: ``[N, G, T, D]``.
        scaling: factor of the scores.
        dtype: of the result; the scores come out of the product in the inputs' own.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return _log_softmax(scaling * (query @ key.mT).to(dtype))


def stretched_log_map(estimate: Estimate, dtype: torch.dtype) -> Tensor:
    """Logarithm of the estimate stretched to the keys and normalised over them, ``[N, H, T, T]``."""
    scores = estimate.scores.to(dtype)
    length, num_bins = estimate.length[..., None], scores.shape[-1]
    keys = torch.arange(scores.shape[2], device=scores.device)
    index = bin_of(torch.minimum(keys, length - 1), length, num_bins, estimate.layout, estimate.shift)  # [N, T, T]
    return _log_softmax(scores.gather(-1, index[:, None].expand(-1, scores.shape[1], -1, -1)))


def _log_softmax(scores: Tensor) -> Tensor:
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)


def _rows(target: Tensor, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    divergence = F.kl_div(log_probabilities, target, reduction="none", log_target=True).sum(-1)
    return divergence, (log_probabilities.exp() - target.exp()).square().sum(-1)


def _losses(name: str, divergence: Tensor, square_error: Tensor) -> dict[str, Tensor]:
    return {f"{name}_kl": divergence.mean(), f"{name}_mse": square_error.mean() / square_error.shape[-1]}
