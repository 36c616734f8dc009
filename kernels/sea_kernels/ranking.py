"""Ranking of scores with a deterministic order of equals: the k largest of every group, found without a sort."""

import torch
from torch import Tensor

from .chunks import working_dtype


def ordered_integers(scores: Tensor) -> Tensor:
    """Integers in the same order as the scores: int64 for float64, int32 otherwise."""
    scores = scores.to(working_dtype(scores.dtype)) + 0.0  # a copy, in which -0.0 has become its equal 0.0
    bits = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    limits = torch.iinfo(bits.dtype)
    flip = bits >> (limits.bits - 1)  # all ones for a negative score, whose magnitude counts downwards
    return bits.bitwise_xor_(flip.bitwise_and_(limits.max))


def keep_largest(ranks: Tensor, budget: Tensor) -> Tensor:
    """bool like ``ranks [..., C]``: the ``budget [...]`` largest entries, the lowest index first among equals."""
    budget = budget[..., None].int()
    threshold = _kth_largest(ranks, budget)
    above, equal = ranks > threshold, ranks == threshold
    left = budget - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def _kth_largest(ranks: Tensor, count: Tensor) -> Tensor:
    """Largest integer that at least ``count`` entries of the last dimension reach, found bit by bit from the top."""
    limits = torch.iinfo(ranks.dtype)
    found = torch.full_like(count, limits.min, dtype=ranks.dtype)
    reached = torch.empty_like(ranks, dtype=torch.int32)
    for bit in reversed(range(limits.bits)):
        candidate = torch.zeros_like(found) if bit == limits.bits - 1 else found | (1 << bit)
        torch.ge(ranks, candidate, out=reached)
        enough = reached.sum(-1, keepdim=True, dtype=torch.int32) >= count
        found = torch.where(enough, candidate, found)
    return found
