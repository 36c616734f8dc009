"""Mixing attention's result with the mean of the values that a row may see, in one pass over both."""

from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_same_device, check_shape
from ..spans import check_rows, row_spans

__all__ = ["mix_average"]


def mix_average(
    context: Tensor,
    value: Tensor,
    mix: Tensor,
    *,
    attention_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``mix * context + (1 - mix) * mean``, the mean over the values up to the row's position (SEA, section 3.3).

    Causal: row t of the last T of S positions averages the values of its item's real keys up to its own. Sums are
    taken in float32 (float64 for float64). Differentiable.

    Args:
        context: ``[N, H, T, E]``, what attention gave.
        value: ``[N, G, S, E]``; head h reads value head ``h // (H / G)``.
        mix: ``[N, H, T]``, share of ``context``.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T, E]`` in context's dtype; in padding rows the mean counts as zero.

    Raises:
        ValueError: if a shape or device does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_shape("context", context, (None,) * 4, "[batch, num_heads, num_queries, value_dim]")
    batch, heads, num_queries, width = context.shape
    check_shape("value", value, (batch, None, None, width), "[batch, num_kv_heads, num_keys, value_dim]")
    check_shape("mix", mix, (batch, heads, num_queries), "[batch, num_heads, num_queries]")
    if heads % value.shape[1]:
        raise ValueError(f"context has {heads} heads, expected a multiple of value's {value.shape[1]} heads")
    check_same_device(context=context, value=value, mix=mix, attention_mask=attention_mask)
    rows = (batch, num_queries, value.shape[2])
    check_rows(*rows, causal=True, attention_mask=attention_mask)
    exists = context.element_size() <= 4
    if choose_backend(backend, context, triton_exists=exists, operation="mix_average") == "triton":
        from .gradient import TritonMix

        return TritonMix.apply(context, value, mix, attention_mask)
    from . import reference

    spans = row_spans(*rows, causal=True, attention_mask=attention_mask, device=context.device)
    return reference.mix_average(context, value, mix, spans)
