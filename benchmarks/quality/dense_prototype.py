"""Training-free sparse attention in dense PyTorch: slow, quadratic, and able to express every design that was compared.

Row t sees its prefix of t + 1 keys through aligned bins of w = 2^l keys, w the smallest with ``num_bins`` * w >= t + 1.
A search in one or more *looks* narrows the prefix down to the keys that get exact attention; what a look discards
either vanishes, or is replaced by an average context, or enters the softmax as one pooled key and value per bin
(the *far field*). Only forward, causal, no padding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = -1e30
FIRST_KEYS = 4  # kept by the sliding window
LATE_ROW = 256  # rows from here on enter kept mass and errors: earlier ones are nearly dense


class Look(NamedTuple):
    """One step of the search: rank bins of ``width`` keys (None: the row's own coarse bins), keep about ``keep`` keys.

    ``score``: mean, bound, half (their mean), mixX (X of the bound, 1 - X of the mean), var (mean plus ``alpha`` half
    variances), cap (var, at most the bound), oracle (true mass), recent (position). ``+v`` adds the log of the values'
    mean norm. ``grouping``: query, causal_batch, kv_group (the heads that share keys also share their selection).
    """

    width: int | None
    keep: int
    score: str = "half"
    grouping: str = "query"


@dataclass(frozen=True)
class Design:
    """``far``: the score (as in ``Look``, or "true") of discarded bins in the far field, None for no far field.

    ``centre``, ``far_centre``: the query around which bins are pooled for the search and for the far field: None (zero:
    plain means), "head", or "group" (shared by the heads of a key/value head), times ``centre_scale``.
    ``average``: a constant s_mix, or "estimated"/"true" kept mass as s_mix, of the mix with the running mean of values.
    ``stride``: one row in so many is searched for, the others share its bins. ``sliding``: no search but the first
    4 and the last ``sliding`` - 4 keys.
    """

    looks: tuple[Look, ...] = ()
    num_bins: int = 256
    window: int = 0
    far: str | None = None
    far_coarse_only: bool = False
    far_value: str = "mean"
    far_shift: float = 0.0
    centre: str | None = None
    far_centre: str | None = None
    centre_scale: float = 1.0
    alpha: float = 1.0
    average: float | str | None = None
    stride: int = 1
    sliding: int | None = None


class Statistics(NamedTuple):
    """Sums over rows of one layer, heads averaged (errors: heads summed)."""

    keys: Tensor
    rows: Tensor
    kept_mass: Tensor
    late_rows: Tensor
    square_error: Tensor
    square_context: Tensor
    log_mass_error: Tensor


class Pools:
    """Pooled keys and values of one layer for any bin width, around a centre query [H, D] (None: zero)."""

    def __init__(self, key: Tensor, value: Tensor, centre: Tensor | None) -> None:
        self.key, self.value, self.centre = key, value, centre
        self._by_width: dict[int, dict[str, Tensor]] = {}

    def __getitem__(self, width: int) -> dict[str, Tensor]:
        if width not in self._by_width:
            self._by_width[width] = self._pool(width)
        return self._by_width[width]

    def _pool(self, width: int) -> dict[str, Tensor]:
        # A last, incomplete bin is pooled with zeros in it: it is some rows' own bin, which is kept without a score.
        key, value = (
            F.pad(x, (0, 0, 0, -x.shape[2] % width)).unflatten(2, (-1, width)) for x in (self.key, self.value)
        )
        pools = {"high": key.amax(3), "low": key.amin(3), "value_norm": value.norm(dim=-1).mean(-1)}
        if self.centre is None:
            mean = key.mean(3)
            return pools | {"mean": mean, "variance": (key * key).mean(3) - mean * mean, "value": value.mean(3)}
        centre = self.centre.unflatten(0, (key.shape[1], -1))
        logits = torch.einsum("grd,ngbwd->ngrbw", centre, key)
        prior = logits.logsumexp(-1)
        weight = (logits - prior[..., None]).exp()
        mean, square, pooled_value = (
            torch.einsum("ngrbw,ngbwd->ngrbd", weight, x).flatten(1, 2) for x in (key, key * key, value)
        )
        prior = prior.flatten(1, 2) - math.log(width)
        return pools | {"mean": mean, "variance": square - mean * mean, "value": pooled_value, "prior": prior}

    def score(self, kind: str, query: Tensor, width: int, true_scores: Tensor, alpha: float) -> Tensor:
        """Log of the mean of exp(score) over each bin's keys, estimated: [N, H, R, bins]."""
        num_bins = -(-true_scores.shape[-1] // width)
        pools = {name: x[:, :, :num_bins] for name, x in self[width].items()}
        if kind.endswith("+v"):
            norm = pools["value_norm"].log().repeat_interleave(query.shape[1] // self.key.shape[1], 1)
            return self.score(kind[:-2], query, width, true_scores, alpha) + norm[:, :, None]
        if kind in ("oracle", "true"):
            padded = F.pad(true_scores, (0, num_bins * width - true_scores.shape[-1]), value=NEVER)
            return padded.unflatten(-1, (num_bins, width)).logsumexp(-1) - math.log(width)
        if kind == "recent":
            return torch.arange(num_bins, device=query.device).float().expand(*query.shape[:3], num_bins)
        offset = query if self.centre is None else query - self.centre[:, None]
        mean = times(offset, pools["mean"])
        if self.centre is not None:
            mean = mean + pools["prior"][:, :, None]
        if kind == "mean":
            return mean
        bound = times(query.relu(), pools["high"]) - times((-query).relu(), pools["low"])
        if kind in ("var", "cap"):
            variance = mean + alpha * 0.5 * times(offset * offset, pools["variance"])
            return variance if kind == "var" else torch.minimum(variance, bound)
        share = {"bound": 1.0, "half": 0.5}[kind] if not kind.startswith("mix") else float(kind[3:])
        return (1 - share) * mean + share * bound


def times(query: Tensor, keys: Tensor) -> Tensor:
    """[N, H, R, X] times the transpose of [N, G, B, X], H a multiple of G: [N, H, R, B]."""
    groups = keys.shape[1]
    return (query.unflatten(1, (groups, -1)).flatten(2, 3) @ keys.mT).unflatten(2, (-1, query.shape[2])).flatten(1, 2)


def choose(score: Tensor, forced: Tensor, candidate: Tensor, wanted: float, grouping: str, groups: int) -> Tensor:
    """The ``wanted`` best candidates of each row and head, ``forced`` ones first: bool [N, H, R, B]."""
    heads, num_bins = score.shape[1], score.shape[-1]
    if grouping != "query":
        score = score.masked_fill(~candidate, NEVER).log_softmax(-1)
    if grouping == "kv_group":
        shared = score.unflatten(1, (groups, -1)).logsumexp(2, keepdim=True)
        score = shared.expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
    score = score.masked_fill(forced, -NEVER).masked_fill(~candidate, NEVER)
    if grouping == "causal_batch":
        score = score.transpose(1, 2).flatten(2)
        wanted *= heads
    count = min(max(1, int(wanted + 0.5)), score.shape[-1])
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(count, -1, sorted=False).indices, True)
    if grouping == "causal_batch":
        keep = keep.unflatten(2, (heads, num_bins)).transpose(1, 2)
    return (keep | forced) & candidate


def row_chunks(seq_len: int, num_bins: int, limit: int):
    """(start, stop, width) of runs of at most ``limit`` rows that have one bin width."""
    start, width = 0, 1
    while start < seq_len:
        stop = min(seq_len, num_bins * width)
        for first in range(start, stop, limit):
            yield first, min(first + limit, stop), width
        start, width = max(start, stop), 2 * width


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, design: Design, centre: Tensor, limit: int = 1024
) -> tuple[Tensor, Statistics]:
    """Causal attention of query [N, H, T, D] over key, value [N, G, T, D]; centre [H, D]: context [N, H, T, D]."""
    heads, seq_len, groups = query.shape[1], query.shape[2], key.shape[1]
    query = query * scaling

    def pools(kind: str | None) -> Pools:
        if kind is None:
            return Pools(key, value, None)
        centres = centre * design.centre_scale
        if kind == "group":
            centres = centres.unflatten(0, (groups, -1)).mean(1).repeat_interleave(heads // groups, 0)
        return Pools(key, value, centres)

    near = pools(design.centre)
    far = near if design.far_centre == design.centre else pools(design.far_centre)
    positions = torch.arange(seq_len, device=query.device)
    running_mean = (value.cumsum(2) / (positions + 1)[:, None]).repeat_interleave(heads // groups, 1)
    contexts, statistics = [], []
    for start, stop, width in row_chunks(seq_len, design.num_bins, limit):
        rows = positions[start:stop]
        scores = times(query[:, :, start:stop], key[:, :, :stop])
        scores.masked_fill_(positions[:stop] > rows[:, None], NEVER)
        chunk = query[:, :, start:stop], scores, value[:, :, :stop], running_mean[:, :, start:stop]
        context, row_statistics = attend_rows(*chunk, rows, width, near, far, design)
        contexts.append(context)
        statistics.append(row_statistics)
    return torch.cat(contexts, 2), Statistics(*(torch.stack(x).sum(0) for x in zip(*statistics, strict=True)))


def search(query, scores, rows, width, pools, far_pools, design: Design):
    """Mask of kept keys [N, H, R, S] and the discarded bins: a list of (log mass [N, H, R, B], pooled values)."""
    num_keys, stride = scores.shape[-1], design.stride
    positions = torch.arange(num_keys, device=query.device)
    looks = [look._replace(width=look.width or width) for look in design.looks]
    looks = looks[:1] + [look for look in looks[1:] if look.width < width]
    if len(looks) == 1:
        looks = [design.looks[-1]._replace(width=width)]
    kept, discarded = (positions <= rows[:, None]).expand(scores.shape), []
    shared_rows = rows[::stride]
    for index, look in enumerate(looks):
        bins = torch.arange(-(-num_keys // look.width), device=query.device)
        candidate = kept[..., :: look.width] & (bins <= rows[:, None] // look.width)
        own = shared_rows[:, None] // look.width
        forced = (bins == own) | (bins == 0)
        if index == len(looks) - 1 and design.window:
            oldest = (shared_rows[:, None] - design.window + 1).clamp_min(0) // look.width
            forced = forced | ((bins >= oldest) & (bins <= own))
        shared_candidate = candidate[:, :, ::stride] & (bins <= own)
        score = pools.score(look.score, query[:, :, ::stride], look.width, scores[:, :, ::stride], design.alpha)
        if look.grouping != "query":  # heads compete by normalised scores, the own bin's visible keys included
            score = torch.where(bins == own, own_mean(query[:, :, ::stride], pools.key, shared_rows, look.width), score)
        wanted = look.keep / look.width
        keep = choose(
            score, forced & shared_candidate, shared_candidate, wanted, look.grouping, pools.key.shape[1]
        ).repeat_interleave(stride, 2)[:, :, : len(rows)]
        keep = (keep | (bins > own.repeat_interleave(stride, 0)[: len(rows)])) & candidate
        if design.average == "estimated" or (design.far and (index == 0 or not design.far_coarse_only)):
            mass = far_pools.score(design.far or "mean", query, look.width, scores, design.alpha)
            mass = mass + math.log(look.width) + design.far_shift
            pooled_value = far_pools[look.width]["value"][:, :, : len(bins)]
            discarded.append((mass.masked_fill(~candidate | keep, NEVER), pooled_value))
        kept = keep.repeat_interleave(look.width, -1)[..., :num_keys]
    return kept & (positions <= rows[:, None]), discarded


def own_mean(query, key, rows, width):
    """Score of the mean of the visible keys in each row's own bin: [N, H, R, 1]."""
    total = F.pad(key.cumsum(2), (0, 0, 1, 0))
    start = rows // width * width
    mean = (total[:, :, rows + 1] - total[:, :, start]) / (rows + 1 - start)[:, None]
    return (query * mean.repeat_interleave(query.shape[1] // key.shape[1], 1)).sum(-1, keepdim=True)


def attend_rows(query, scores, value, running_mean, rows, width, pools, far_pools, design: Design):
    """``attend`` for rows of one bin width; scores [N, H, R, S] are exact and causally masked."""
    num_keys = scores.shape[-1]
    positions = torch.arange(num_keys, device=query.device)
    if design.sliding:
        recent = rows[:, None] - positions < design.sliding - FIRST_KEYS
        kept, discarded = ((positions < FIRST_KEYS) | recent) & (positions <= rows[:, None]), []
        kept = kept.expand(scores.shape)
    else:
        kept, discarded = search(query, scores, rows, width, pools, far_pools, design)
    all_mass = scores.logsumexp(-1)
    near_scores = scores.masked_fill(~kept, NEVER)
    near_mass = near_scores.logsumexp(-1)
    mass = near_mass
    for far_scores, _ in discarded:
        mass = torch.logaddexp(mass, far_scores.logsumexp(-1))

    def weighted(part, total, values):
        probabilities = (part - total[..., None]).exp()
        return times(probabilities, values.mT)

    if design.average is None:
        context = weighted(near_scores, mass, value)
        if design.far_value == "mean":
            context = context + sum(weighted(far_scores, mass, values) for far_scores, values in discarded)
    else:
        reference = {"estimated": mass, "true": all_mass}.get(design.average)
        if reference is None:
            mix = torch.where(rows < 64, 1.0, design.average)[:, None]
        else:
            mix = (near_mass - reference).exp()[..., None]
        context = mix * weighted(near_scores, near_mass, value) + (1 - mix) * running_mean
    dense = weighted(scores, all_mass, value)
    late = (rows >= LATE_ROW).to(scores.dtype)
    items, heads = query.shape[:2]
    return context, Statistics(
        keys=kept.sum(-1, dtype=torch.float32).sum() / heads,
        rows=late.new_tensor(items * len(rows)),
        kept_mass=((near_mass - all_mass).exp() * late).sum() / heads,
        late_rows=late.sum() * items,
        square_error=((context - dense).square().sum(-1) * late).sum(),
        square_context=(dense.square().sum(-1) * late).sum(),
        log_mass_error=((mass - all_mass).abs() * late).sum() / heads,
    )
