"""Triton form of the far field's backward pass: deterministic, in memory linear in T.

A row's softmax has three disjoint parts: keys that it keeps, pooled runs and pooled bins. Given the row's log-sum and
delta = grad_output . output, each part's gradients are those of plain attention by themselves.
"""

from torch import Tensor

from ..masks import BinMask, RunMask
from ..triton_common import on_device, with_dense_rows
from ..triton_wide_lists import WideLists
from .triton_key_grad import kept_gradients
from .triton_pool import Pool
from .triton_pool_grad import pool_gradients
from .triton_pooled_grad import pooled_gradients
from .triton_query_grad import query_gradient
from .triton_walk import Walk


def far_field_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    output: Tensor,
    log_sums: Tensor,
    bins: Pool,
    lists: WideLists | None,
    grad_output: Tensor,
    kept: BinMask | RunMask,
    coarse: BinMask | None,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and centre, in their dtypes.

    Args:
        query, key, value, centre, kept, coarse, causal, scaling, attention_mask: what the forward pass took.
        output: ``[N, H, T, E]``, its result.
        log_sums: float32 ``[N, H, T]``, what it left.
        bins: the pooled bins, likewise. Pooled runs are as large as keys and values: they are pooled again.
        lists: of the bins that blocks of rows keep, likewise, or None.
        grad_output: gradient to ``output``, in its dtype.
    """
    query, key, value = with_dense_rows(query), with_dense_rows(key), with_dense_rows(value)
    grad_output = with_dense_rows(grad_output)
    walk = Walk(query, key, value, kept, coarse, centre, causal, scaling, attention_mask)
    with on_device(query):
        pools = [bins, *walk.pooled_runs()]
        grad_query, delta = query_gradient(walk, pools, lists, output, log_sums, grad_output)
        rows = grad_output, log_sums, delta
        pooled = pooled_gradients(walk, pools, *rows)
        return grad_query, *pool_gradients(walk, pools, pooled, *kept_gradients(walk, *rows))
