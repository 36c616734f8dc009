"""PyTorch forms of the distillation losses: tiles of attention, a chunk of rows at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bins import Layout, bin_sizes, bin_start
from ..chunks import row_chunks, run_chunk, without_autocast, working_dtype
from ..masks import BinMask, RunMask, kept_keys
from ..spans import RowSpans


@torch.no_grad()
def teacher_statistics(
    query: Tensor,
    key: Tensor,
    spans: RowSpans,
    *,
    num_bins: int,
    layout: Layout,
    causal: bool,
    scaling: float,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sea_kernels.teacher_statistics`."""
    index = torch.arange(num_bins + 1, device=query.device)
    parts = []
    for rows, end in _tiles(query, key, causal):
        scores = _scores(query[:, :, rows], key[:, :, :end], spans, rows, scaling)
        teacher, log_teacher = scores.softmax(-1), scores.log_softmax(-1)
        entropy, square = (teacher * log_teacher).sum(-1), teacher.square().sum(-1)
        edges = bin_start(index, spans.length[:, rows, None], num_bins, layout, shift) + spans.start[:, None, None]
        edges = edges.clamp_max(end)  # a padding row may lie before its item's first key
        before = torch.nn.functional.pad(teacher, (1, 0)).cumsum(-1)  # mass before each key
        mass = before.gather(-1, edges[:, None].expand(-1, query.shape[1], -1, -1)).diff(dim=-1).clamp_min(0)
        padding = _padding(spans, rows)
        parts.append((mass, entropy.masked_fill(padding, 0), square.masked_fill(padding, 0)))
    mass, entropy, square = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return mass, entropy, square


def estimation_loss(
    scores: Tensor,
    mass: Tensor,
    entropy: Tensor,
    square: Tensor,
    spans: RowSpans,
    *,
    layout: Layout,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`sea_kernels.estimation_loss`."""
    batch, heads, num_queries, num_bins = scores.shape
    dtype = working_dtype(scores.dtype)

    def rows_loss(rows: slice) -> tuple[Tensor, Tensor]:
        size = bin_sizes(spans.length[:, rows], num_bins, layout, shift)[:, None]  # [N, 1, R, K]
        empty, size = size == 0, size.clamp_min(1).to(dtype)
        log_size = size.log()
        weighted = scores[:, :, rows].to(dtype) + log_size.masked_fill(empty, torch.finfo(dtype).min)
        log_estimate = weighted.log_softmax(-1) - log_size  # of one key in the bin
        target = mass[:, :, rows].detach().to(dtype)
        kl = entropy[:, :, rows].detach() - (target * log_estimate).sum(-1)
        # Squared distance to the teacher's mean in each bin, plus the teacher's own spread around those means: two
        # terms that cannot be negative, in place of a difference of large ones.
        spread = square[:, :, rows].detach() - (target.square() / size).sum(-1)
        square_error = ((weighted.softmax(-1) - target).square() / size).sum(-1) + spread.clamp_min(0)
        padding = _padding(spans, rows)
        return kl.masked_fill(padding, 0), square_error.masked_fill(padding, 0)

    return _over_rows(rows_loss, row_chunks(num_queries, batch * heads * num_bins))


def attention_loss(
    teacher_query: Tensor,
    teacher_key: Tensor,
    query: Tensor,
    key: Tensor,
    spans: RowSpans,
    *,
    causal: bool,
    teacher_scaling: float,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`sea_kernels.attention_loss`."""
    teacher_query, teacher_key = teacher_query.detach(), teacher_key.detach()
    tiles = _tiles(query, key, causal)

    def rows_loss(rows: slice, end: int) -> tuple[Tensor, Tensor]:
        target = _scores(teacher_query[:, :, rows], teacher_key[:, :, :end], spans, rows, teacher_scaling)
        scores = _scores(query[:, :, rows], key[:, :, :end], spans, rows, scaling)
        teacher, student = target.softmax(-1), scores.softmax(-1)
        kl = (teacher * (target.log_softmax(-1) - scores.log_softmax(-1))).sum(-1)
        square_error = (student - teacher).square().sum(-1)
        padding = _padding(spans, rows)
        return kl.masked_fill(padding, 0), square_error.masked_fill(padding, 0)

    return _over_rows(rows_loss, *zip(*tiles, strict=True))


@torch.no_grad()
def kept_mass(
    query: Tensor, key: Tensor, mask: BinMask | RunMask, spans: RowSpans, *, causal: bool, scaling: float
) -> Tensor:
    """See :func:`sea_kernels.kept_mass`."""
    kept = []
    for rows, end in _tiles(query, key, causal):
        attention = _scores(query[:, :, rows], key[:, :, :end], spans, rows, scaling).softmax(-1)
        kept.append(attention.masked_fill(~kept_keys(mask, spans, end, rows), 0).sum(-1))
    return torch.cat(kept, 2)


def state_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], real: Tensor | None, relative: bool) -> Tensor:
    """See :func:`sea_kernels.state_loss`; states ``[N, T, A, B]``."""
    return torch.stack([_state_loss(t, s, real, relative) for t, s in zip(teacher, student, strict=True)]).mean()


def _state_loss(teacher: Tensor, student: Tensor, real: Tensor | None, relative: bool) -> Tensor:
    dtype = working_dtype(student.dtype)
    target = teacher.flatten(2).to(dtype)
    error, power = (student.flatten(2).to(dtype) - target).square().mean(-1), target.square().mean(-1)
    if real is None:
        error, power = error.mean(-1), power.mean(-1)
    else:
        count = real.sum(-1).clamp_min(1)
        error, power = (torch.where(real != 0, rows, 0.0).sum(-1) / count for rows in (error, power))
    return (error / power.clamp_min(1e-12) if relative else error).mean()


def _tiles(query: Tensor, key: Tensor, causal: bool) -> list[tuple[slice, int]]:
    """Chunks of rows, each with the number of leading keys that its rows may see."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    smaller = 1 if query.is_cuda else 8  # a tile is read and written many times: in a CPU's cache, twice as fast
    chunks = row_chunks(num_queries, smaller * batch * heads * num_keys)
    return [(rows, num_keys - num_queries + rows.stop if causal else num_keys) for rows in chunks]


def _scores(query: Tensor, key: Tensor, spans: RowSpans, rows: slice, scaling: float) -> Tensor:
    """Scores ``[N, H, R, S']`` of the first S' keys, hugely negative at hidden keys and in padding rows.

    Softmax and its logarithm are then taken of the scores by themselves: ``exp`` of such numbers is slow on a CPU.
    """
    dtype = working_dtype(query.dtype)
    place = torch.arange(key.shape[2], device=key.device) - spans.start[:, None]  # [N, S']
    hidden = (place < 0)[:, None] | (place[:, None] >= spans.length[:, rows, None])
    bias = torch.zeros(hidden.shape, dtype=dtype, device=key.device).masked_fill_(hidden, torch.finfo(dtype).min)
    with without_autocast(query):
        grouped = (scaling * query.to(dtype)).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [N, G, H/G * R, D]
        return (grouped @ key.to(dtype).mT).view(*query.shape[:3], -1) + bias[:, None]


def _padding(spans: RowSpans, rows: slice) -> Tensor:
    """bool ``[N, 1, R]``: rows that are padding."""
    return (spans.length[:, rows] == 0)[:, None]


def _over_rows(rows_loss, *chunks) -> tuple[Tensor, Tensor]:
    """Two losses ``[N, H, T]`` from ``rows_loss``, which is called with every chunk in turn."""
    recompute = len(chunks[0]) > 1
    pairs = [run_chunk(rows_loss, *chunk, recompute=recompute) for chunk in zip(*chunks, strict=True)]
    kl, square_error = (torch.cat(part, 2) for part in zip(*pairs, strict=True))
    return kl, square_error
