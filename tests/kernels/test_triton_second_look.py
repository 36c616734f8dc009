"""The Triton form of the second look keeps the same runs as the PyTorch form."""

import pytest
import torch

from sea_kernels import HeadKeys, pooled_selection, second_look
from sea_kernels.masks import BinMask, RowBudget, group_leaders, mask_of_heads, pack_bits
from sea_kernels.second_look import triton_launches
from sea_kernels.second_look.triton_launches import plan_launches
from sea_kernels.spans import row_spans

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_same(
    query, key, *, k=20, width=4, window=0, coarse_keys=40, head_keys=None, causal=True, attention_mask=None,
    bound=True, coarse=None, **options,
):  # fmt: skip
    query, key, heads = query.to(DEVICE), key.to(DEVICE), query.shape[1]
    place = {"causal": causal, "scaling": query.shape[-1] ** -0.5}
    place["mean_weight"] = torch.linspace(0.5, 1.0, heads, device=DEVICE)
    place["bound_weight"] = torch.linspace(0.6, 0.2, heads, device=DEVICE) if bound else None
    place["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    if coarse is None:
        first_look = {"k": coarse_keys, "head_k": head_keys, "stride": options.get("stride", 1)}
        coarse = pooled_selection(query, key, num_bins=32, backend="reference", **first_look, **place)
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


HEAD_KEYS = 160, 5, 40, 20, 80  # from 1/8 to 4 times 40


@pytest.fixture
def small_classes(monkeypatch):
    """Heads are launched by class although the inputs are small."""
    monkeypatch.setattr(triton_launches, "FEW_PROGRAMS", 1)


@pytest.mark.usefixtures("small_classes")
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (40, 150)])
def test_heads_with_budgets_of_their_own(random_qkv, queries, keys, window):
    sizes = {"batch": 1, "heads": 5, "groups": 1, "queries": queries, "keys": keys, "width": 8}
    query, key, _ = (x.float() for x in random_qkv(**sizes))
    assert_same(query, key, width=2, window=window, coarse_keys=160, head_keys=HeadKeys(HEAD_KEYS, DEVICE))


@pytest.mark.usefixtures("small_classes")
@pytest.mark.parametrize("stride", [1, 4])
def test_heads_with_budgets_of_their_own_and_padding(random_qkv, padding_mask, stride):
    query, key, _ = (x.float() for x in random_qkv(heads=5, groups=1, queries=90, keys=150, width=8))
    real = padding_mask(150, [(70, 0), (0, 21)])
    options = {"coarse_keys": 160, "head_keys": HeadKeys(HEAD_KEYS, DEVICE), "stride": stride}
    assert_same(query, key, width=2, attention_mask=real, **options)


@pytest.mark.usefixtures("small_classes")
def test_bidirectional_heads_with_budgets_of_their_own(random_qkv):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=5, groups=1, queries=150, width=8))
    assert_same(query, key, width=2, causal=False, coarse_keys=160, head_keys=HeadKeys(HEAD_KEYS, DEVICE))


def coarse_mask(head_keys, queries=32768):
    """A mask of 256 bins, whose heads keep at most so many keys per row."""
    bits = torch.zeros(1, len(head_keys), queries, 8, dtype=torch.int32)
    budget = RowBudget(max(head_keys), 2, HeadKeys(head_keys, "cpu"))
    return BinMask(bits, 256, "aligned", budget=budget)


def slots_of_heads(coarse):
    """Slots of each head in its last launch, after a check that the launches take every block of every head once."""
    slots, blocks = {}, {}
    for launch in plan_launches(coarse, coarse.bits.shape[2], True, None, width=4, stride=1):
        order = torch.arange(coarse.bits.shape[1]) if launch.order is None else launch.order
        for head in order[launch.first_head : launch.first_head + launch.lists.heads].tolist():
            assert launch.first_block == blocks.get(head, 0)
            blocks[head] = launch.first_block + launch.num_blocks
            slots[head] = launch.slots
    assert set(blocks.values()) == {coarse.bits.shape[2] // 16}
    return [slots[head] for head in range(coarse.bits.shape[1])]


def test_slots_follow_the_budgets_of_heads():
    """At 32k a bin has 128 keys, or 32 runs of 4, and every row keeps two bins."""
    head_keys = [64, 2048, 64, 64, 512, 128, 1024, 256]
    coarse = coarse_mask(head_keys)
    assert slots_of_heads(coarse) == [64, 512, 64, 64, 128, 64, 256, 64]
    assert slots_of_heads(mask_of_heads(coarse, slice(0, 3))) == [512] * 3  # of which only the largest is known


def test_few_classes_and_none_of_few_programs():
    assert slots_of_heads(coarse_mask([64] * 8 + [2048], queries=1024)) == [256] * 9  # all runs of 4 keys
    many = [512] * 4 + [64] * 3 + [1024] * 3 + [8192] + [4096] + [2048] * 2
    assert slots_of_heads(coarse_mask(many)) == [128] * 7 + [512] * 3 + [2048, 1024] + [512] * 2
