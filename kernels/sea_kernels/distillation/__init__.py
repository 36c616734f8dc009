"""Distillation of attention maps in memory linear in the length (SEA, section 3.4): no T x T map ever exists.

An estimated row e is constant inside a bin, so its distance from a teacher's row t needs only the teacher's mass per
bin and two numbers per row (:class:`TeacherStatistics`). All losses come per row; how to average them is the caller's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import KERNEL_DTYPES, Backend, choose_backend, fits_kernels, has_gather, has_kernel_dtype
from ..bins import LAYOUTS, Layout
from ..checks import check_bins, check_choice, check_mask, check_qkv, check_same_device, check_shape
from ..masks import BinMask, RunMask
from ..spans import check_rows, row_spans

__all__ = ["TeacherStatistics", "attention_loss", "estimation_loss", "kept_mass", "state_loss", "teacher_statistics"]


class TeacherStatistics(NamedTuple):
    """All that the estimator's loss needs of the teacher's attention rows t. Zero in padding rows.

    Attributes:
        mass: ``[N, H, T, K]``, the sum of t over the keys of each bin.
        entropy: ``[N, H, T]``, sum of t log t over the keys (the entropy with its sign turned).
        square: ``[N, H, T]``, sum of t^2 over the keys.
    """

    mass: Tensor
    entropy: Tensor
    square: Tensor


def teacher_statistics(
    query: Tensor,
    key: Tensor,
    *,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None = None,
    shift: int = 0,
    log_sum: Tensor | None = None,
    backend: Backend = "auto",
) -> TeacherStatistics:
    """What :func:`estimation_loss` needs of the teacher's attention ``t = softmax(scaling * query . key)``.

    Computed tile by tile in float32 for half-precision inputs; float64 stays float64. No gradient flows: the teacher is
    a constant.

    Args:
        query: the teacher's ``[N, H, T, D]``, the last T of the S positions.
        key: the teacher's ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        num_bins: K, a multiple of 32.
        layout: how bins stretch to keys, "relative" or "aligned".
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        shift: edge jitter in 1/256 of a key (relative layout only).
        log_sum: float32 ``[N, H, T]``, log of the sum of ``exp(scaling * query . key)`` over the keys that each row
            sees, if the teacher's attention left it. The Triton form then takes one product of queries and keys in
            place of two; the reference has no use for it. Values of padding rows do not matter. The statistics are as
            exact as it is. A GPU's flash attention computes it in float32, also for half-precision inputs, as is done
            here.
        backend: "auto", "reference" or "triton".

    Returns:
        :class:`TeacherStatistics`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if a shape, dtype, device or choice does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_qkv(query, key)
    _check_layout(num_bins, layout, shift)
    _check_log_sum("log_sum", log_sum, query)
    check_same_device(query=query, attention_mask=attention_mask, log_sum=log_sum)
    rows = len(query), query.shape[2], key.shape[2]
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    bins = {"num_bins": num_bins, "layout": layout, "causal": causal, "scaling": scaling, "shift": shift}
    in_32_bits = key.shape[2] * max(num_bins, 1024) < 2**31  # the edges of bins, as the kernel computes them
    exists = fits_kernels(query) and in_32_bits and has_gather()
    if choose_backend(backend, query, triton_exists=exists, operation="teacher_statistics") == "triton":
        from . import triton_teacher

        rest = {"attention_mask": attention_mask, "log_sum": log_sum}
        return TeacherStatistics(*triton_teacher.teacher_statistics(query, key, **rest, **bins))
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return TeacherStatistics(*reference.teacher_statistics(query, key, spans, **bins))


def estimation_loss(
    scores: Tensor,
    statistics: TeacherStatistics,
    *,
    layout: Layout,
    causal: bool,
    num_keys: int | None = None,
    attention_mask: Tensor | None = None,
    shift: int = 0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Distance of every estimated row e from the teacher's row t: ``KL(t || e)`` and ``sum_j (e_j - t_j)^2``.

    With n_b keys in bin b, ``e_j = exp(scores_b) / sum_b' n_b' exp(scores_b')`` for every key j of bin b: the estimated
    compressed attention stretched to the keys and normalised again (SEA, section 3.4). Bins without keys take no part.
    Equal to the formulas over T x S maps up to rounding. Computed in float32 for half-precision scores; float64 stays
    float64. Gradients flow to scores only.

    Args:
        scores: ``[N, H, T, K]``, the estimator's compressed scores before their softmax.
        statistics: from :func:`teacher_statistics` with the same bins and rows.
        layout: how bins stretch to keys, "relative" or "aligned".
        causal: whether a row sees only keys up to its own position.
        num_keys: S, at least T; the rows are the last T of the S positions. None for T.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        shift: edge jitter in 1/256 of a key (relative layout only).
        backend: "auto", "reference" or "triton".

    Returns:
        KL divergence in nats and sum of squared errors over the keys, each ``[N, H, T]``, float32 (float64 for float64
        scores), 0 in padding rows.

    Raises:
        ValueError: if a shape, dtype, device or choice does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_shape("scores", scores, (None,) * 4, "[batch, num_heads, num_queries, num_bins]")
    batch, _, num_queries, num_bins = scores.shape
    _check_layout(num_bins, layout, shift)
    check_shape(
        "statistics.mass", statistics.mass, tuple(scores.shape), "scores' [batch, num_heads, num_queries, num_bins]"
    )
    for name in ("entropy", "square"):
        per_row = tuple(scores.shape[:3])
        check_shape(f"statistics.{name}", getattr(statistics, name), per_row, "[batch, num_heads, num_queries]")
    check_same_device(scores=scores, attention_mask=attention_mask, **statistics._asdict())
    num_keys = num_queries if num_keys is None else num_keys
    rows = batch, num_queries, num_keys
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    exists = all(tensor.dtype in KERNEL_DTYPES for tensor in (scores, *statistics))
    if choose_backend(backend, scores, triton_exists=exists, operation="estimation_loss") == "triton":
        from .gradient import TritonEstimationLoss

        constants = (tensor.detach() for tensor in statistics)
        return TritonEstimationLoss.apply(scores, *constants, layout, causal, num_keys, attention_mask, shift)
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=scores.device)
    return reference.estimation_loss(scores, *statistics, spans, layout=layout, shift=shift)


def attention_loss(
    teacher_query: Tensor,
    teacher_key: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    causal: bool,
    teacher_scaling: float,
    scaling: float,
    attention_mask: Tensor | None = None,
    teacher_log_sum: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Distance of the student's dense attention a from the teacher's t, row by row: ``KL(t || a)``, ``sum (a - t)^2``.

    Both are computed tile by tile and again in the backward pass; memory is linear in T. Float32 for half-precision
    inputs, also under autocast; float64 stays float64. Gradients flow to query and key, not to the teacher.

    Args:
        teacher_query: ``[N, H, T, D']``, the last T of the S positions.
        teacher_key: ``[N, G', S, D']``.
        query: the student's ``[N, H, T, D]``.
        key: the student's ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        teacher_scaling: factor of the teacher's scores.
        scaling: factor of the student's scores.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        teacher_log_sum: ``log_sum`` of :func:`teacher_statistics`, which saves the Triton form a product here, too.
        backend: "auto", "reference" or "triton".

    Returns:
        KL divergence in nats and sum of squared errors over the keys, each ``[N, H, T]``, float32 (float64 for float64
        inputs), 0 in padding rows.

    Raises:
        ValueError: if a shape, dtype or device does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_qkv(query, key)
    check_qkv(teacher_query, teacher_key)
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    check_shape("teacher_query", teacher_query, (batch, heads, num_queries, None), "query's [N, H, T] and any width")
    check_shape("teacher_key", teacher_key, (batch, None, num_keys, None), "key's S positions")
    _check_log_sum("teacher_log_sum", teacher_log_sum, query)
    check_same_device(
        query=query, teacher_query=teacher_query, attention_mask=attention_mask, teacher_log_sum=teacher_log_sum
    )
    rows = batch, num_queries, num_keys
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    tensors = teacher_query.detach(), teacher_key.detach(), query, key
    exists = fits_kernels(teacher_query, query)
    if choose_backend(backend, query, triton_exists=exists, operation="attention_loss") == "triton":
        from .gradient import TritonAttentionLoss

        return TritonAttentionLoss.apply(*tensors, attention_mask, teacher_log_sum, causal, teacher_scaling, scaling)
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return reference.attention_loss(*tensors, spans, causal=causal, teacher_scaling=teacher_scaling, scaling=scaling)


def state_loss(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    *,
    relative: bool,
    attention_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared error between states: over the real rows of an item, then over items and pairs of states.

    Computed in float32 for half-precision states, also under autocast; float64 stays float64. The Triton form keeps no
    copies of the states. Gradients flow to the student's states.

    Args:
        teacher: states ``[N, T, ...]``, all of one shape; no gradient reaches them.
        student: as many, of that shape.
        relative: divide an item's error by the teacher's mean square over the same rows, at least 1e-12.
        attention_mask: bool or integer ``[N, T]``, nonzero at real rows; what other rows hold does not matter.
        backend: "auto", "reference" or "triton".

    Returns:
        A scalar, float32 (float64 for float64 states). An item without real rows adds 0.

    Raises:
        ValueError: if there are no states, or a shape or device does not fit.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    if not student or len(teacher) != len(student):
        raise ValueError(f"teacher has {len(teacher)} states and student {len(student)}, expected as many, at least 1")
    first = student[0]
    for name, states in (("teacher", teacher), ("student", student)):
        for state in states:
            check_shape(f"a state of {name}", state, tuple(first.shape), "the shape of student's first")
            check_same_device(state=state, first=first)
    if attention_mask is not None:
        check_shape("attention_mask", attention_mask, tuple(first.shape[:2]), "[batch, num_rows]")
        check_same_device(attention_mask=attention_mask, first=first)
    teacher, student = ([_as_rows(state) for state in states] for states in (teacher, student))
    teacher = [state.detach() for state in teacher]
    exists = has_kernel_dtype(*teacher, *student)
    if choose_backend(backend, first, triton_exists=exists, operation="state_loss") == "triton":
        from .gradient import TritonStateLoss

        real = None if attention_mask is None else (attention_mask != 0).contiguous().view(torch.uint8)
        return TritonStateLoss.apply(real, relative, *teacher, *student)
    from . import reference

    return reference.state_loss(teacher, student, attention_mask, relative)


def _as_rows(state: Tensor) -> Tensor:
    """``[N, T, A, B]`` from ``[N, T, ...]``, without a copy of hidden states and contexts."""
    return state.unsqueeze(2) if state.dim() == 3 else state if state.dim() == 4 else state.flatten(2).unsqueeze(2)


def kept_mass(
    query: Tensor,
    key: Tensor,
    mask: BinMask | RunMask,
    *,
    causal: bool,
    scaling: float,
    attention_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Share of the dense attention's mass that lies on the keys which ``mask`` keeps. No gradient flows.

    Args:
        query: ``[N, H, T, D]``, the last T of the S positions (the teacher's, for a measure of the estimator).
        key: ``[N, G, S, D]``; query head h reads key head ``h // (H / G)``.
        mask: kept bins or runs of every row and query head.
        causal: whether a row sees only keys up to its own position. Bidirectional attention needs S = T.
        scaling: factor of the scores.
        attention_mask: bool or integer ``[N, S]``, nonzero at real keys, one contiguous run per item.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[N, H, T]`` between 0 and 1, float32 (float64 for float64 inputs), 0 in padding rows.

    Raises:
        ValueError: if a shape, dtype or device does not fit.
        TypeError: if ``mask`` is neither a BinMask nor a RunMask.
        NotImplementedError: for ``backend="triton"`` where it cannot run.
    """
    check_qkv(query, key)
    check_mask(mask, query.shape, causal)
    bits = mask.bits if isinstance(mask, BinMask) else mask.starts
    check_same_device(query=query, mask=bits, attention_mask=attention_mask)
    rows = len(query), query.shape[2], key.shape[2]
    check_rows(*rows, causal=causal, attention_mask=attention_mask)
    exists = fits_kernels(query)
    if choose_backend(backend, query, triton_exists=exists, operation="kept_mass") == "triton":
        from . import triton_kept_mass

        return triton_kept_mass.kept_mass(
            query, key, mask, causal=causal, scaling=scaling, attention_mask=attention_mask
        )
    from . import reference

    spans = row_spans(*rows, causal=causal, attention_mask=attention_mask, device=query.device)
    return reference.kept_mass(query, key, mask, spans, causal=causal, scaling=scaling)


def _check_log_sum(name: str, log_sum: Tensor | None, query: Tensor) -> None:
    if log_sum is not None:
        check_shape(name, log_sum, tuple(query.shape[:3]), "[batch, num_heads, num_queries]")


def _check_layout(num_bins: int, layout: Layout, shift: int) -> None:
    check_bins(num_bins)
    check_choice("layout", layout, LAYOUTS)
    if shift and layout == "aligned":
        raise ValueError(f"shift is {shift} with layout='aligned', expected 0: only relative edges move")
