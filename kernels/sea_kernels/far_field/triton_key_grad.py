"""Gradients of the far field to the keys and values that rows keep, without those that flow through pooling.

Given the log-sum of a whole row, they are those of sparse attention with the same mask.
"""

import torch
from torch import Tensor

from ..masks import mask_of_heads
from ..sparse_attention.triton_backward_keys import differentiate_keys
from ..triton_entries import EntryLists
from ..triton_inverse import MOST_CHUNKS
from ..triton_wide_rows_keys import differentiate_keys_in_bins
from .triton_walk import Walk

LIST_BYTES = 1 << 29  # about, of the lists of the heads that are taken together


def kept_gradients(walk: Walk, grad_output: Tensor, log_sums: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``[N, G, S, D]`` and ``[N, G, S, E]``, undefined at keys of padding."""
    grad_key, grad_value = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (walk.key, walk.value))
    if not walk.looks_twice:
        place = {"causal": walk.causal, "scaling": walk.scaling, "spans": walk.spans}
        rows, keys = (walk.query, grad_output, log_sums, delta), (walk.key, walk.value, walk.kept)
        differentiate_keys_in_bins(*rows, *keys, grad_key, grad_value, **place)
        return grad_key, grad_value
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
    """Of one query head's lists: an entry and a row for every run of a row, and the table that sorts them."""
    return walk.batch * (12 * walk.num_queries * walk.near.slots + 8 * MOST_CHUNKS * walk.num_runs)
