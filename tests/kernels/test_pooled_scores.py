"""Pooled-key scores against a loop over rows and bins, by hand, and under padding."""

import pytest
import torch

from sea_kernels import chunks, pooled_scores
from sea_kernels.bins import bin_start
from sea_kernels.spans import row_spans

K = 32
SIDES = [(0, 0), (5, 0), (0, 7), (3, 4)]


def members(length, layout, shift):
    """bool [..., K, L]: the keys that stand for each bin of a row, from a loop over the bins."""
    edges = bin_start(torch.arange(K + 1), torch.tensor(length), K, layout, shift).tolist()
    rows = torch.zeros(K, length, dtype=torch.bool)
    for b in range(K):
        start, end = edges[b], edges[b + 1]
        if start == end and layout == "aligned":
            last = max(c for c in range(K) if edges[c] < edges[c + 1])
            start, end = edges[last], edges[last + 1]
        elif start == end:
            middle = (b + 0.5) * length / K + shift / 256
            start = int(min(max(middle, 0), length - 1))
            end = start + 1
        rows[b, start:end] = True
    return rows


def dense_scores(query, key, *, layout, causal, scaling, statistic, attention_mask=None, shift=0):
    """The definition: every key's products with the query, masked and reduced for every bin."""
    (batch, heads, queries, _), (_, groups, keys, _) = query.shape, key.shape
    spans = row_spans(batch, queries, keys, causal=causal, attention_mask=attention_mask)
    member = torch.zeros(batch, queries, K, keys, dtype=torch.bool)
    for n in range(batch):
        for t in range(queries):
            length, first = int(spans.length[n, t]), int(spans.start[n])
            if length:
                member[n, t, :, first : first + length] = members(length, layout, shift)
    key = key.repeat_interleave(heads // groups, 1)
    products = scaling * query[:, :, :, None] * key[:, :, None]  # [N, H, T, S, D]
    if statistic == "mean":
        weights = member.double() / member.sum(-1, keepdim=True).clamp_min(1)
        return torch.einsum("nhtsd,ntbs->nhtb", products, weights)
    best = products[:, :, :, None].masked_fill(~member[:, None, ..., None], -torch.inf).amax(-2).sum(-1)
    return best.masked_fill(~member.any(-1)[:, None], 0)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize(
    ("layout", "causal", "queries", "keys", "shift"),
    [
        ("aligned", True, 40, 40, 0),  # two widths
        ("aligned", True, 9, 75, 0),  # a cache, and widths that change inside the chunk
        ("aligned", True, 20, 20, 0),  # fewer keys than bins
        ("aligned", False, 66, 66, 0),
        ("relative", True, 66, 66, 0),
        ("relative", True, 9, 75, 0),
        ("relative", True, 40, 40, 150),
        ("relative", True, 66, 66, -192),
        ("relative", False, 66, 66, 0),
        ("relative", False, 20, 20, 192),
    ],
)
def test_values_and_gradients_follow_the_definition(
    random_qkv, padding_mask, layout, causal, queries, keys, shift, statistic
):
    query, key, _ = random_qkv(batch=4, heads=2, groups=1, queries=queries, keys=keys, width=3)
    arguments = {"layout": layout, "causal": causal, "scaling": 0.7, "statistic": statistic, "shift": shift}
    arguments["attention_mask"] = padding_mask(keys, SIDES)
    weight = torch.randn(4, 2, queries, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (dense_scores, lambda *a, **b: pooled_scores(*a, num_bins=K, **b)):
        inputs = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        scores = function(*inputs, **arguments)
        results.append((scores, *torch.autograd.grad((scores * weight).sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_by_hand():
    query = torch.tensor([[[[2.0, -1.0]] * 3]])
    key = torch.tensor([[[[1.0, 0.0], [3.0, 4.0], [-1.0, 2.0]]]])
    arguments = {"num_bins": K, "causal": True, "scaling": 0.5}
    # Aligned, at most 32 keys: one key a bin, and the last one repeated beyond the row's position.
    mean = pooled_scores(query, key, layout="aligned", **arguments)[0, 0]
    assert mean[:, :4].tolist() == [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -2.0, -2.0]]
    # Relative, three keys in 32 bins: a bin holds one key or none, and the nearest key stands in for none.
    mean = pooled_scores(query, key, layout="relative", **arguments)[0, 0, 2]
    assert mean.tolist() == [1.0] * 21 + [-2.0] * 11
    # Two keys a bin: the mean of (1, 0) and (3, 4) scores 1; the bound takes 3 for the first width, 0 for the second.
    query, key = query[:, :, :1].expand(1, 1, 64, 2), key.repeat(1, 1, 22, 1)[:, :, :64]
    arguments["causal"] = False
    assert pooled_scores(query, key, layout="aligned", **arguments)[0, 0, 0, 0] == 1
    assert pooled_scores(query, key, layout="aligned", statistic="bound", **arguments)[0, 0, 0, 0] == 3


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["relative", "aligned"])
def test_a_bound_bounds_and_chunks_and_groups_change_nothing(random_qkv, monkeypatch, layout, causal, statistic):
    query, key, _ = (tensor.requires_grad_() for tensor in random_qkv(heads=6, groups=3, queries=90))
    arguments = {"num_bins": K, "layout": layout, "causal": causal, "scaling": -0.7}
    scores = pooled_scores(query, key, statistic=statistic, **arguments)
    if statistic == "bound":
        assert (scores >= pooled_scores(query, key, **arguments) - 1e-12).all()
    gradients = torch.autograd.grad(scores.square().sum(), (query, key))

    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 8 * 6 * K * 5 * 7)
    repeated = pooled_scores(query, key.repeat_interleave(2, 1), statistic=statistic, **arguments)
    torch.testing.assert_close(repeated, scores, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(repeated.square().sum(), (query, key))
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize("layout", ["relative", "aligned"])
def test_later_keys_change_nothing(random_qkv, layout, statistic):
    query, key, _ = random_qkv(queries=90)
    arguments = {"num_bins": K, "layout": layout, "causal": True, "scaling": 1.0, "statistic": statistic}
    before = pooled_scores(query, key, **arguments)
    key[:, :, 41:] += 1
    after = pooled_scores(query, key, **arguments)
    assert torch.equal(before[:, :, :41], after[:, :, :41])
    assert (before[:, :, 41:] != after[:, :, 41:]).any(-1).all()


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize("layout", ["relative", "aligned"])
def test_half_precision_is_computed_in_float32(random_qkv, layout, statistic):
    query, key, _ = (tensor.bfloat16() for tensor in random_qkv(queries=70))
    arguments = {"num_bins": K, "layout": layout, "causal": True, "scaling": 0.3, "statistic": statistic}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = pooled_scores(query, key, **arguments)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, pooled_scores(query.float(), key.float(), **arguments).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bins": 48}, "num_bins is 48"),
        ({"layout": "even"}, "layout is 'even'"),
        ({"statistic": "max"}, "statistic is 'max'"),
        ({"layout": "aligned", "shift": 4}, "shift is 4"),
        ({"causal": False}, "num_keys is 9 with num_queries 7"),
        ({"attention_mask": torch.ones(2, 7)}, "attention_mask has shape"),
    ],
)
def test_errors_name_the_argument(random_qkv, change, message):
    query, key, _ = random_qkv(queries=7, keys=9)
    arguments = {"num_bins": K, "layout": "relative", "causal": True, "scaling": 1.0}
    with pytest.raises(ValueError, match=message):
        pooled_scores(query, key, **(arguments | change))
