"""The second look against a plain loop over rows and runs."""

import pytest
import torch

from sea_kernels import chunks, count_keys, pooled_scores, second_look, select_bins, to_dense
from sea_kernels.bins import aligned_width
from sea_kernels.masks import RunMask, unpack_bits
from sea_kernels.spans import row_spans

K = 32
SIDES = [(0, 0), (11, 0), (0, 13), (6, 5)]


def looped_runs(query, key, coarse, *, k, width, window, causal, scaling, weights, keep_first, attention_mask=None):
    """Starts of the kept runs of every row, as a dict (item, head, row) -> sorted list."""
    (batch, heads, queries, _), (_, groups, keys, _) = query.shape, key.shape
    spans = row_spans(batch, queries, keys, causal=causal, attention_mask=attention_mask)
    bits = unpack_bits(coarse.bits, K).tolist()
    capacity = max(1, int((k - window) / width + 0.5) - (1 if window else 0))
    kept = {}
    for n, h, t in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        length, first = int(spans.length[n, t]), int(spans.start[n])
        if length == 0:
            kept[n, h, t] = []
            continue
        products = scaling * query[n, h, t] * key[n, h * groups // heads, first : first + length]
        runs = torch.nn.functional.pad(products, (0, 0, 0, -length % width), value=torch.nan).unflatten(0, (-1, width))
        mean, bound = runs.sum(-1).nanmean(-1), runs.nan_to_num(-torch.inf).amax(1).sum(-1)
        score = (weights[0][h] * mean + weights[1][h] * bound).tolist()
        coarse_width = int(aligned_width(torch.tensor(length), K))
        own = (length - 1) // width * width if causal else None
        end = length if not causal else own + width if not window else max(0, own - window)
        scored = []
        for start in range(0, end, width):
            bins = {place // coarse_width for place in range(start, min(start + width, length))}
            if start == own:
                scored.append((2, 0, start))
            elif start == 0 and keep_first:
                scored.append((1, 0, start))
            elif any(bits[n][h][t][b] for b in bins):
                scored.append((0, score[start // width], start))
        best = sorted(scored, key=lambda entry: (-entry[0], -entry[1], entry[2]))[:capacity]
        kept[n, h, t] = sorted(start for *_, start in best)
    return kept


@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("causal", "queries", "keys", "k", "width", "window"),
    [
        (True, 80, 80, 14, 2, 4),
        (True, 11, 150, 24, 4, 0),  # a cache; no window: the own run is a run like any other
        (True, 50, 50, 24, 8, 8),  # coarse bins smaller than runs
        (True, 40, 40, 1, 4, 0),
        (False, 80, 80, 14, 2, 0),
    ],
)
def test_runs_follow_the_definition(
    random_qkv, padding_mask, monkeypatch, causal, queries, keys, k, width, window, padded, small_chunks
):
    if small_chunks:
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * 8 * 40 * 7)
    query, key, _ = random_qkv(batch=4, heads=2, groups=1, queries=queries, keys=keys)
    mask = padding_mask(keys, SIDES) if padded else None
    place = {"causal": causal, "attention_mask": mask}
    scores = pooled_scores(query, key, num_bins=K, layout="aligned", scaling=0.7, **place)
    coarse = select_bins(scores, k=32, layout="aligned", grouping="causal_batch", num_keys=keys, **place)
    weights = torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.1])
    look = {"k": k, "width": width, "window": window, "scaling": 0.7, "keep_first": True, **place}

    runs = second_look(query, key, coarse, mean_weight=weights[0], bound_weight=weights[1], **look)
    expected = looped_runs(query, key, coarse, weights=[w.double() for w in weights], **look)
    for (n, h, t), starts in expected.items():
        padded_starts = starts + [-1] * (runs.starts.shape[-1] - len(starts))
        assert runs.starts[n, h, t].tolist() == padded_starts, (n, h, t)

    count = count_keys(runs, num_keys=keys, **place)
    assert torch.equal(count, to_dense(runs, num_keys=keys, **place).sum(-1))
    assert count.max() <= max(k + width // 2, width)


def test_without_bounds_means_alone_rank(random_qkv):
    query, key, _ = random_qkv(queries=60)
    coarse = select_bins(torch.zeros(2, 4, 60, K), k=60, causal=True, layout="aligned", grouping="query")
    look = {"k": 12, "width": 4, "window": 4, "causal": True, "scaling": 1.0, "keep_first": False}
    ones, zeros = torch.ones(4), torch.zeros(4)
    alone = second_look(query, key, coarse, mean_weight=ones, bound_weight=None, **look)
    both = second_look(query, key, coarse, mean_weight=ones, bound_weight=zeros, **look)
    bounds = second_look(query, key, coarse, mean_weight=zeros, bound_weight=ones, **look)
    assert torch.equal(alone.starts, both.starts)
    assert not torch.equal(alone.starts, bounds.starts)


def test_later_keys_change_nothing(random_qkv):
    query, key, _ = random_qkv(queries=90)
    look = {"k": 16, "width": 4, "window": 4, "causal": True, "scaling": 1.0, "keep_first": True}
    look |= {"mean_weight": torch.ones(4), "bound_weight": torch.ones(4)}
    coarse = select_bins(torch.zeros(2, 4, 90, K), k=90, causal=True, layout="aligned", grouping="query")
    before = second_look(query, key, coarse, **look)
    key[:, :, 50:] += 5
    after = second_look(query, key, coarse, **look)
    assert torch.equal(before.starts[:, :, :50], after.starts[:, :, :50])
    assert not torch.equal(before.starts, after.starts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 6}, "width is 6"),
        ({"window": 6}, "window is 6"),
        ({"causal": False, "window": 4}, "window is 4"),
        ({"k": 0}, "k is 0"),
        ({"mean_weight": torch.ones(3)}, "mean_weight has shape"),
        ({"coarse": RunMask(torch.zeros(2, 4, 40, 3, dtype=torch.int32), 4)}, "coarse is 'RunMask'"),
    ],
)
def test_errors_name_the_argument(random_qkv, change, message):
    query, key, _ = random_qkv(queries=40)
    coarse = select_bins(torch.zeros(2, 4, 40, K), k=40, causal=True, layout="aligned", grouping="query")
    arguments = {"coarse": coarse, "k": 8, "width": 4, "window": 0, "causal": True, "scaling": 1.0}
    arguments |= {"mean_weight": torch.ones(4), "bound_weight": None, "keep_first": True}
    with pytest.raises(ValueError, match=message):
        second_look(query, key, **(arguments | change))
