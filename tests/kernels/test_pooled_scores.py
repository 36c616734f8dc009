"""Pooled-key scores against a loop over rows and bins, by hand, and under padding."""

import pytest
import torch

from sea_kernels import pooled_scores
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
