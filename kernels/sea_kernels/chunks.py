"""Row chunks and working precision, shared by the reference forms of the operations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 22  # scores of one chunk: 16 MiB in float32, large enough to keep every core busy


def row_chunks(num_rows: int, elements_per_row: int) -> list[slice]:
    """Slices that cover ``num_rows`` rows, each of at most ``CHUNK_ELEMENTS`` elements (and of at least one row)."""
    rows = max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]


def run_chunk(function: Callable, *args, recompute: bool):
    """``function(*args)``; with ``recompute``, the backward pass computes its intermediates again, none are stored."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through one of ``tensors`` can come."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operation computes in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products keep the dtype of their inputs, whatever autocast surrounds it."""
    return torch.autocast(tensor.device.type, enabled=False)
