"""The Triton form of the second look keeps the same runs as the PyTorch form."""

import pytest
import torch

from sea_kernels import pooled_selection, second_look
from sea_kernels.masks import BinMask, group_leaders, pack_bits
from sea_kernels.spans import row_spans

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_same(
    query, key, *, k=20, width=4, window=0, coarse_keys=40, causal=True, attention_mask=None, bound=True, coarse=None,
    **options,
):  # fmt: skip
    query, key, heads = query.to(DEVICE), key.to(DEVICE), query.shape[1]
    place = {"causal": causal, "scaling": query.shape[-1] ** -0.5}
    place["mean_weight"] = torch.linspace(0.5, 1.0, heads, device=DEVICE)
    place["bound_weight"] = torch.linspace(0.6, 0.2, heads, device=DEVICE) if bound else None
    place["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    if coarse is None:
        coarse = pooled_selection(query, key, k=coarse_keys, num_bins=32, backend="reference", **place)
    options = {"k": k, "width": width, "window": window, "keep_first": True} | options
    starts = [
        second_look(query, key, coarse, backend=backend, **options, **place).starts
        for backend in ("triton", "reference")
    ]
    assert torch.equal(*starts)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("queries", "keys"), [(1, 120), (25, 25), (63, 150)])
def test_causal_rows_match(random_qkv, queries, keys, window):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=2, queries=queries, keys=keys, width=16))
    assert_same(query, key, window=window)


def test_padding_on_both_sides(random_qkv, padding_mask):
    query, key, _ = (x.float() for x in random_qkv(heads=2, queries=50, keys=111, width=8))
    assert_same(query, key, window=4, attention_mask=padding_mask(111, [(70, 0), (0, 21)]))


def test_bidirectional_rows_match(random_qkv, padding_mask):
    query, key, _ = (x.float() for x in random_qkv(heads=2, queries=90, width=8))
    assert_same(query, key, causal=False, attention_mask=padding_mask(90, [(10, 3), (90, 0)]))


@pytest.mark.parametrize(("k", "keep_first"), [(4, True), (16, False), (1000, True)])
def test_smallest_and_largest_budget(random_qkv, k, keep_first):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=60, keys=130, width=8))
    assert_same(query, key, k=k, keep_first=keep_first)


def test_runs_wider_or_narrower_than_bins(random_qkv):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=100, width=8))
    for width in (1, 16):
        assert_same(query, key, width=width, k=32)


def test_equal_scores_go_to_the_lowest_runs(random_qkv):
    query, key, _ = ((0.5 * x).round().float() for x in random_qkv(batch=1, heads=1, groups=1, queries=100, width=4))
    assert_same(query, key, bound=False)


def test_any_coarse_bins(random_qkv):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=80, width=8))
    keep = torch.rand(1, 1, 80, 32, generator=torch.Generator().manual_seed(1)) < 0.4
    assert_same(query, key, coarse=BinMask(pack_bits(keep).to(DEVICE), 32, "aligned"))


@pytest.mark.parametrize("window", [0, 4])
def test_rows_that_share_an_estimate(random_qkv, padding_mask, window):
    query, key, _ = (x.float() for x in random_qkv(heads=1, groups=1, queries=70, keys=120, width=8))
    assert_same(query, key, window=window, stride=4, attention_mask=padding_mask(120, [(60, 0), (0, 20)]))


def test_leader_is_the_first_real_query_of_its_group():
    spans = row_spans(1, 6, 10, causal=True)  # positions 4 to 9
    assert group_leaders(spans, 8).tolist() == [[0, 0, 0, 0, 4, 4]]
    mask = torch.tensor([[False, False, True, True, True, True]])
    spans = row_spans(1, 6, 6, causal=True, attention_mask=mask)  # padding, then positions 0 to 3
    assert group_leaders(spans, 2).tolist() == [[0, 1, 2, 2, 4, 4]]
