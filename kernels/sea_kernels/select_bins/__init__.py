"""Grouped top-k over the bins of the estimated attention: which bins every row keeps."""

from typing import Literal

from torch import Tensor

from ..backend import KERNEL_DTYPES, Backend, choose_backend
from ..bins import LAYOUTS, Layout
from ..checks import check_bins, check_choice, check_same_device, check_shape
from ..masks import BinMask
from ..spans import check_rows, row_spans

__all__ = ["GROUPINGS", "Grouping", "select_bins"]

Grouping = Literal["query", "head", "batch", "causal_batch"]
GROUPINGS = ("query", "head", "batch", "causal_batch")
CAUSAL_GROUPINGS = ("query", "causal_batch")
LARGEST_KERNEL_GROUP = 16384  # bins that compete at most in the Triton form


def select_bins(
    scores: Tensor,
    *,
    k: int,
    causal: bool,
    layout: Layout,
    grouping: Grouping,
    keep_first: bool = False,
    keep_own: bool = False,
    num_keys: int | None = None,
    attention_mask: Tensor | None = None,
    shift: int = 0,
    backend: Backend = "auto",
) -> BinMask:
    """Keep the best bins of every group, so many that a row keeps ``k`` keys on average (SEA, section 3.3).

    The bins of a group compete with each other:

    - ``query``: those of one row and head;
    - ``causal_batch``: those of one row, over all heads;
    - ``head``: those of one head, over all rows (bidirectional only);
    - ``batch``: those of an item, over all heads and rows (bidirectional only).

    A group keeps ``bins.wanted_bins`` of them: the rows' budgets added up, then rounded half up. It keeps at least one
    bin and at least the forced ones, at most those that exist. Equal scores go to the lowest index in the order
    (head, row, bin); a NaN ranks above all numbers. Padding rows keep nothing. In the aligned layout, bins that hold no
    key of the row do not exist; relative bins all exist, also where a row has fewer keys than bins.

    No gradient flows through the selection. The same scores always give the same bits.

    Args:
        scores: ``[N, H, T, K]``, any floating dtype, K a multiple of 32. Only their order matters.
        k: keys that a row keeps on average, at least 1.
        causal: whether a row sees only keys up to its own position.
        layout: how bins stretch to keys, "relative" or "aligned".
        grouping: who competes, see above.
        keep_first: always keep the bin that holds the row's first key. It counts against the budget.
        keep_own: always keep the bin that holds the row's own position. It counts against the budget.
        num_keys: S, at least T; the rows are the last T of the S positions. None for T.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        shift: edge jitter in 1/256 of a key (relative layout only).
        backend: "auto", "reference" or "triton".

    Returns:
        A :class:`BinMask` with int32 bits ``[N, H, T, K / 32]``.

    Raises:
        ValueError: if a shape, dtype, device or choice does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run: float64, groups that span rows ("head" and
            "batch", whose models are short), or more than 16384 bins in a group.
    """
    check_shape("scores", scores, (None,) * 4, "[batch, num_heads, num_queries, num_bins]")
    batch, heads, num_queries, num_bins = scores.shape
    check_bins(num_bins)
    check_choice("layout", layout, LAYOUTS)
    check_choice("grouping", grouping, CAUSAL_GROUPINGS if causal else GROUPINGS)
    if not scores.is_floating_point():
        raise ValueError(f"scores has dtype {scores.dtype}, expected a floating dtype")
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if shift and layout == "aligned":
        raise ValueError(f"shift is {shift} with layout='aligned', expected 0: only relative edges move")
    check_same_device(scores=scores, attention_mask=attention_mask)
    num_keys = num_queries if num_keys is None else num_keys
    rows = (batch, num_queries, num_keys)
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    options = {"k": k, "layout": layout, "grouping": grouping, "shift": shift}
    options |= {"keep_first": keep_first, "keep_own": keep_own}
    group = num_bins * (heads if grouping == "causal_batch" else 1)
    exists = grouping in CAUSAL_GROUPINGS and scores.dtype in KERNEL_DTYPES and group <= LARGEST_KERNEL_GROUP
    if choose_backend(backend, scores, triton_exists=exists, operation="select_bins") == "triton":
        from . import triton as implementation

        options |= {"causal": causal, "num_keys": num_keys, "attention_mask": attention_mask}
        bits = implementation.select_bins(scores.detach(), **options)
    else:
        from . import reference

        spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=scores.device)
        bits = reference.select_bins(scores.detach(), spans, **options)
    return BinMask(bits, num_bins, layout, shift)
