"""The fused pooled selection: its PyTorch form is the composition of two operations, its Triton form agrees with it."""

import pytest
import torch

from sea_kernels import HeadKeys, pooled_scores, pooled_selection, select_bins
from sea_kernels.masks import unpack_bits

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_same(query, key, *, k=12, num_bins=32, causal=True, attention_mask=None, bound=True, **options):
    heads, width = query.shape[1], query.shape[-1]
    options |= {"k": k, "num_bins": num_bins, "causal": causal, "scaling": width**-0.5}
    options["mean_weight"] = torch.linspace(0.5, 1.0, heads, device=DEVICE)
    options["bound_weight"] = torch.linspace(0.6, 0.2, heads, device=DEVICE) if bound else None
    options["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    bits = [
        pooled_selection(query.to(DEVICE), key.to(DEVICE), backend=backend, **options).bits
        for backend in ("triton", "reference")
    ]
    assert torch.equal(*bits)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (31, 31), (70, 111)])
def test_causal_rows_match(random_qkv, queries, keys, bound):
    query, key, _ = (x.float() for x in random_qkv(batch=1, queries=queries, keys=keys, width=16))
    assert_same(query, key, bound=bound)


def test_padding_on_both_sides(random_qkv, padding_mask):
    query, key, _ = (x.float() for x in random_qkv(heads=2, queries=70, keys=111, width=8))
    assert_same(query, key, attention_mask=padding_mask(111, [(50, 0), (0, 21)]))


@pytest.mark.parametrize("kept", [True, False])
def test_bidirectional_rows_match(random_qkv, padding_mask, kept):
    query, key, _ = (x.float() for x in random_qkv(heads=2, queries=70, width=8))
    real = padding_mask(70, [(10, 3), (70, 0)])
    assert_same(query, key, causal=False, attention_mask=real, keep_first=kept, keep_own=kept)


@pytest.mark.parametrize("k", [1, 1000])
def test_smallest_and_largest_budget(random_qkv, k):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=2, queries=90, width=8))
    assert_same(query, key, k=k)


@pytest.mark.parametrize("stride", [1, 4])
def test_heads_with_budgets_of_their_own(random_qkv, stride):
    query, key, _ = (x.float() for x in random_qkv(batch=1, queries=150, width=8))
    assert_same(query, key, k=40, head_k=HeadKeys((1, 6, 13, 40), DEVICE), stride=stride)


def test_each_head_keeps_what_it_would_keep_with_its_budget_alone(random_qkv):
    query, key, _ = random_qkv(batch=2, queries=90, width=5)
    options = {"num_bins": 32, "causal": True, "scaling": 0.3, "mean_weight": torch.ones(4)}
    mask = pooled_selection(query, key, k=30, head_k=HeadKeys((3, 30, 9, 17), "cpu"), **options)
    assert mask.budget.keys == 30
    for head, k in enumerate((3, 30, 9, 17)):
        alone = pooled_selection(query, key, k=k, **options).bits
        assert torch.equal(mask.bits[:, head], alone[:, head])


def test_equal_scores_go_to_the_lowest_bins(random_qkv):
    query, key, _ = ((0.5 * x).round().float() for x in random_qkv(batch=1, heads=2, queries=100, width=4))
    assert_same(query, key, bound=False)


def test_bins_that_are_no_power_of_two(random_qkv):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=100, width=59))
    assert_same(query, key, num_bins=96)


def test_many_bins(random_qkv):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=40, keys=1100, width=8))
    assert_same(query, key, num_bins=512, k=100)


@pytest.mark.parametrize(("queries", "keys", "sides"), [(70, 111, [(31, 0), (60, 3)]), (71, 111, None)])
def test_rows_that_share_an_estimate(random_qkv, padding_mask, queries, keys, sides):
    query, key, _ = (x.float() for x in random_qkv(heads=1, groups=1, queries=queries, keys=keys, width=8))
    assert_same(query, key, attention_mask=None if sides is None else padding_mask(keys, sides), stride=8)


def test_is_the_composition_of_scores_and_selection(random_qkv):
    query, key, _ = random_qkv(queries=90, width=8)
    rows = {"num_bins": 32, "layout": "aligned", "causal": True, "scaling": 0.3}
    scores = 0.7 * pooled_scores(query, key, statistic="mean", **rows)
    scores += 0.4 * pooled_scores(query, key, statistic="bound", **rows)
    expected = select_bins(
        scores, k=12, causal=True, layout="aligned", grouping="query", keep_first=True, keep_own=True
    )
    weights = {"mean_weight": torch.full((4,), 0.7), "bound_weight": torch.full((4,), 0.4)}
    mask = pooled_selection(query, key, k=12, num_bins=32, causal=True, scaling=0.3, **weights)
    assert torch.equal(mask.bits, expected.bits)


def test_shared_rows_take_their_group_s_bits_and_the_keys_since(random_qkv):
    query, key, _ = random_qkv(batch=1, heads=1, groups=1, queries=30, width=8)
    options = {"k": 4, "num_bins": 32, "causal": True, "scaling": 0.3, "mean_weight": torch.ones(1)}
    alone = unpack_bits(pooled_selection(query, key, **options).bits, 32)[0, 0]
    shared = unpack_bits(pooled_selection(query, key, stride=4, **options).bits, 32)[0, 0]
    for row in range(30):  # fewer keys than bins: bin b is key b
        expected = alone[row // 4 * 4].clone()
        expected[row // 4 * 4 : row + 1] = True
        assert torch.equal(shared[row], expected)


def test_stride_must_divide_the_bins(random_qkv):
    query, key, _ = random_qkv()
    with pytest.raises(ValueError, match="stride is 3, expected a divisor of num_bins 32"):
        pooled_selection(query, key, k=4, num_bins=32, causal=True, scaling=1.0, mean_weight=torch.ones(4), stride=3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((1, 4, 5, 2), r"head_k is \(1, 4, 5, 2\), expected from 1 to k = 4"),
        ((0, 4, 3, 2), r"head_k is \(0, 4, 3, 2\), expected from 1 to k = 4"),
        ((4, 4), r"head_k has shape \(2,\), expected \[num_heads\] = \(4,\)"),
    ],
)
def test_budgets_of_heads_are_checked(random_qkv, keys, message):
    query, key, _ = random_qkv()
    options = {"num_bins": 32, "causal": True, "scaling": 1.0, "mean_weight": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        pooled_selection(query, key, k=4, head_k=HeadKeys(keys, "cpu"), **options)


def test_own_bin_without_keeping_it_has_no_kernel(random_qkv):
    query, key, _ = (x.float() for x in random_qkv())
    options = {"k": 4, "num_bins": 32, "causal": True, "scaling": 1.0, "mean_weight": torch.ones(4)}
    with pytest.raises(NotImplementedError, match="no Triton form"):
        pooled_selection(query, key, keep_own=False, backend="triton", **options)
