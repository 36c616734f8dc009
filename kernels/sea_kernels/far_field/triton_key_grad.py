"""Gradients of the far field to the keys and values that rows keep, without those that flow through pooling.

Given the log-sum of a whole row, they are those of sparse attention with the same mask.
"""

import torch
from torch import Tensor

from ..masks import mask_of_heads
from ..sparse_attention.triton_backward_keys import differentiate_keys
from ..triton_entries import EntryLists
from ..triton_inverse import MOST_CHUNKS
from .triton_walk import Walk

LIST_BYTES = 1 << 29  # about, of the lists of the heads that are taken together


def kept_gradients(walk: Walk, grad_output: Tensor, log_sums: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``[N, G, S, D]`` and ``[N, G, S, E]``, undefined at keys of padding."""
    grad_key, grad_value = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (walk.key, walk.value))
    members = walk.heads // walk.groups
    at_once = max(1, LIST_BYTES // (members * _head_bytes(walk)))
    for first in range(0, walk.groups, at_once):
        groups, heads = slice(first, first + at_once), slice(first * members, (first + at_once) * members)
        lists = EntryLists(mask_of_heads(walk.kept, heads), walk.num_keys, walk.causal, walk.spans)
        entries = [lists.build(*chunk) for chunk in lists.chunks()]
        rows = (x[:, heads] for x in (walk.query, grad_output, log_sums, delta))
        keys = (x[:, groups] for x in (walk.key, walk.value, grad_key, grad_value))
        differentiate_keys(*rows, None, *keys, lists, entries, walk.scaling)
    return grad_key, grad_value


def _head_bytes(walk: Walk) -> int:
    """Of one query head's lists: an entry and a row for every bin or run of a row, and the table that sorts them."""
    kept, units = (walk.near.slots, walk.num_runs) if walk.looks_twice else (walk.bins.num_bins, 0)
    return walk.batch * (12 * walk.num_queries * kept + 8 * MOST_CHUNKS * units)
