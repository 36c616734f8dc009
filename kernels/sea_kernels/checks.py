"""Argument checks shared by the operations: an error names the argument, what it was and what is allowed."""

from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raise ValueError unless ``tensor`` has shape ``expected`` (None matches any size)."""
    actual = tuple(tensor.shape)
    if len(actual) != len(expected) or any(e is not None and a != e for a, e in zip(actual, expected, strict=True)):
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"{name} has shape {actual}, expected {meaning} = {wanted}")


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
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
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
