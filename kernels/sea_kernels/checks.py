"""Argument checks shared by the operations: an error names the argument, what it was and what is allowed."""

import torch
from torch import Tensor

from .bins import LAYOUTS
from .masks import BinMask, RunMask


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raise ValueError unless ``tensor`` has shape ``expected`` (None matches any size)."""
    actual = tensor.shape
    if actual == expected:  # the usual case, without a look at each size: operations check a dozen shapes per call
        return
    fits = len(actual) == len(expected)
    if fits:
        for size, wanted in zip(actual, expected, strict=True):  # a generator would take twice the time
            if wanted is not None and size != wanted:
                fits = False
                break
    if not fits:
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"{name} has shape {tuple(actual)}, expected {meaning} = {wanted}")


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {allowed}")


def check_bins(num_bins: int) -> None:
    """Raise ValueError unless K packs into whole 32-bit words."""
    if num_bins < 32 or num_bins % 32:
        raise ValueError(f"num_bins is {num_bins}, expected a positive multiple of 32")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device."""
    first = None
    for tensor in tensors.values():  # a plain loop: operations check a dozen tensors per call
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
            raise ValueError(f"tensors are on different devices: {places}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Check ``query [N, H, T, D]``, ``key [N, G, S, D]``, ``value [N, G, S, E]`` with H a multiple of G."""
    check_shape("query", query, (None,) * 4, "[batch, num_heads, num_queries, head_dim]")
    batch, heads, _, width = query.shape
    check_shape("key", key, (batch, None, None, width), "[batch, num_kv_heads, num_keys, head_dim]")
    groups = key.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"query has {heads} heads, expected a multiple of key's {groups} heads")
    if value is not None:
        check_shape("value", value, (batch, groups, key.shape[2], None), "[batch, num_kv_heads, num_keys, value_dim]")
    for name, tensor in (("key", key), ("value", value)):
        if tensor is not None and tensor.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected query's {query.dtype}")
    check_same_device(query=query, key=key, value=value)


def check_mask(mask: BinMask | RunMask, query_shape: torch.Size, causal: bool) -> None:
    """Check that ``mask`` is well formed and has the rows of ``query [N, H, T, D]``."""
    rows = tuple(query_shape[:3])
    if isinstance(mask, BinMask):
        check_bins(mask.num_bins)
        check_choice("mask.layout", mask.layout, LAYOUTS)
        check_shape(
            "mask.bits", mask.bits, (*rows, mask.num_bins // 32), "[batch, num_heads, num_queries, num_bins / 32]"
        )
        check_choice("mask.bits.dtype", mask.bits.dtype, (torch.int32,))
        head_keys = None if mask.budget is None else mask.budget.head_keys
        if head_keys is not None and len(head_keys.keys) != rows[1]:
            raise ValueError(f"mask.budget.head_keys has {len(head_keys.keys)} heads, expected {rows[1]}")
    elif isinstance(mask, RunMask):
        check_shape("mask.starts", mask.starts, (*rows, None), "[batch, num_heads, num_queries, num_runs]")
        check_choice("mask.starts.dtype", mask.starts.dtype, (torch.int32,))
        _check_runs(mask, causal)
    else:
        raise TypeError(f"mask is a {type(mask).__name__}, expected a BinMask or a RunMask")


def _check_runs(mask: RunMask, causal: bool) -> None:
    if mask.width < 1 or mask.width & (mask.width - 1):
        raise ValueError(f"mask.width is {mask.width}, expected a power of two")
    if mask.window < 0 or mask.window % mask.width:
        raise ValueError(f"mask.window is {mask.window}, expected a non-negative multiple of mask.width {mask.width}")
    if mask.stride < 1:
        raise ValueError(f"mask.stride is {mask.stride}, expected at least 1")
    if not causal and (mask.window or mask.stride > 1):
        raise ValueError(
            f"mask has window {mask.window} and stride {mask.stride}, expected 0 and 1 with causal=False: "
            "only causal rows have a window"
        )
