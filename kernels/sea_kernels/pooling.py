"""Mean, or minimum and maximum, of any contiguous run of keys in constant time per run."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .chunks import working_dtype


def query_features(query: Tensor, scaling: float, statistic: str) -> Tensor:
    """What multiplies the pooled keys of :class:`RunPool`: ``[..., D]`` for a mean, ``[..., 2 D]`` for a bound."""
    query = query.to(working_dtype(query.dtype)) * scaling
    # max(q min, q max) = relu(q) max + relu(-q) (-min)
    return query if statistic == "mean" else torch.cat([query.relu(), (-query).relu()], -1)


class RunPool:
    """Pooled keys of runs ``[start, end)``: their mean, or their maximum beside the maximum of their negatives.

    Means are differences of prefix sums. Maxima are those of two overlapping stretches of 2^l keys that cover the run,
    read from one table per l.

    Args:
        key: ``[N, G, S, D]``.
        statistic: "mean" or "bound".
        longest: no run is longer than this.
    """

    def __init__(self, key: Tensor, statistic: str, longest: int) -> None:
        self.num_keys = key.shape[2]
        self.dtype = working_dtype(key.dtype)
        self.statistic = statistic
        # float64: a difference of two long sums would lose the digits of a short run's mean in float32.
        self.table = _prefix_sums(key.double()) if statistic == "mean" else _maxima(key.to(self.dtype), longest)

    def pool(self, start: Tensor, end: Tensor) -> Tensor:
        """Pooled keys ``[N, G, R, K, D]`` (mean) or ``[N, G, R, K, 2 D]`` (bound) of the runs ``start``, ``end``.

        Both are int64 ``[N, R, K]``, absolute positions with 0 <= start < end <= S.
        """
        if self.statistic == "mean":
            total = _read(self.table, end) - _read(self.table, start)
            return (total / (end - start)[:, None, ..., None]).to(self.dtype)
        size = end - start
        level = torch.zeros_like(size)
        for exponent in range(1, self.table.shape[2]):
            level = torch.where(size >= 2**exponent, exponent, level)
        first, second = level * self.num_keys + start, level * self.num_keys + end - (1 << level)
        table = self.table.flatten(2, 3)
        return torch.maximum(_read(table, first), _read(table, second))


def pool_once(key: Tensor, statistic: str, runs: list[tuple[Tensor, Tensor]], longest: int) -> list[Tensor]:
    """Pooled keys of each pair ``start``, ``end`` in ``runs``, as by :meth:`RunPool.pool`.

    For runs that are all known at once: the tables of maxima are gone through one after the other, so that memory does
    not grow with their number.
    """
    if statistic == "mean":
        pool = RunPool(key, statistic, longest)
        return [pool.pool(start, end) for start, end in runs]
    pooled: list[Tensor] = []
    for level, table in enumerate(_levels(key.to(working_dtype(key.dtype)), longest)):
        stretch = 2**level
        for place, (start, end) in enumerate(runs):
            second = (end - stretch).clamp_min(0)  # means nothing in runs that are shorter, which keep what they have
            maxima = torch.maximum(_read(table, start), _read(table, second))
            if level == 0:
                pooled.append(maxima)
            else:
                covers = (end - start >= stretch)[:, None, ..., None]
                pooled[place] = torch.where(covers, maxima, pooled[place])
    return pooled


def _read(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [N, R, K]`` of ``table [N, G, P, F]`` in every group: ``[N, G, R, K, F]``."""
    batch, groups, rows, _ = table.shape
    places = torch.arange(batch * groups, device=index.device).view(batch, groups, 1, 1)
    flat = (places * rows + index[:, None]).flatten()
    return table.flatten(0, 2).index_select(0, flat).view(batch, groups, *index.shape[1:], -1)


def _prefix_sums(key: Tensor) -> Tensor:
    """``[N, G, S + 1, D]``: sums of the first 0 … S keys."""
    return torch.nn.functional.pad(key, (0, 0, 1, 0)).cumsum(2)


def _maxima(key: Tensor, longest: int) -> Tensor:
    """``[N, G, V, S, 2 D]``: the tables of ``_levels`` stacked."""
    return torch.stack(list(_levels(key, longest)), 2)


def _levels(key: Tensor, longest: int) -> Iterator[Tensor]:
    """For every 2^v <= longest, ``[N, G, S, 2 D]``: maxima of the 2^v keys (negated keys) from each position on."""
    table, stretch = torch.cat([key, -key], -1), 1
    yield table
    while 2 * stretch <= min(longest, key.shape[2]):
        # Stretches that would run over the end are never read.
        joined = torch.maximum(table[:, :, :-stretch], table[:, :, stretch:])
        table, stretch = torch.cat([joined, table[:, :, -stretch:]], 2), 2 * stretch
        yield table
