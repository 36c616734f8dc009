"""The Triton form of the selection keeps exactly the bins that the PyTorch form keeps."""

import pytest
import torch

from sea_kernels import select_bins

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 32
BOTH_SIDES = [(31, 0), (3, 21)]


def random_scores(batch=1, heads=3, queries=40, num_bins=K):
    return torch.randn(batch, heads, queries, num_bins, generator=torch.Generator().manual_seed(4))


def assert_same(scores, *, attention_mask=None, **options):
    options = {"k": 7, "causal": True, "layout": "aligned", "grouping": "query"} | options
    options["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    bits = [select_bins(scores.to(DEVICE), backend=backend, **options).bits for backend in ("triton", "reference")]
    assert torch.equal(*bits)
    return bits[0]


@pytest.mark.parametrize("grouping", ["query", "causal_batch"])
@pytest.mark.parametrize(("layout", "shift"), [("aligned", 0), ("relative", 0), ("relative", -190)])
@pytest.mark.parametrize(("queries", "keys", "padding"), [(63, 63, None), (1, 90, None), (40, 111, BOTH_SIDES)])
def test_causal_rows_match(padding_mask, grouping, layout, shift, queries, keys, padding):
    mask = None if padding is None else padding_mask(keys, padding)
    scores = random_scores(1 if padding is None else 2, queries=queries)
    forced = {"keep_first": True, "keep_own": True}
    rows = {"grouping": grouping, "layout": layout, "shift": shift, "num_keys": keys, "attention_mask": mask}
    bits = assert_same(scores, **forced, **rows)
    if mask is not None:
        assert (bits.transpose(1, 2).cpu()[~mask[:, -queries:]] == 0).all()


@pytest.mark.parametrize("grouping", ["query", "causal_batch"])
@pytest.mark.parametrize(("keep_first", "keep_own"), [(False, False), (True, False), (False, True), (True, True)])
def test_bidirectional_rows_match(padding_mask, grouping, keep_first, keep_own):
    mask = padding_mask(40, [(6, 0), (40, 0)])
    forced = {"keep_first": keep_first, "keep_own": keep_own}
    assert_same(random_scores(2), causal=False, grouping=grouping, attention_mask=mask, **forced)
    assert_same(random_scores(2), causal=False, grouping=grouping, layout="relative", shift=150, **forced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_matches(dtype):
    assert_same(random_scores().to(dtype), grouping="causal_batch", layout="relative")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouping", ["query", "causal_batch"])
def test_equal_scores_zeros_and_nan_match(grouping, dtype):
    scores = (2 * random_scores()).round().to(dtype)
    scores[:, :, :, ::5], scores[:, :, :, 1::5] = 0.0, -0.0
    scores[:, :, ::3, ::7], scores[:, :, ::4, 1::7] = torch.nan, -torch.inf
    assert_same(scores, grouping=grouping, layout="relative")
    assert_same(torch.zeros_like(scores), grouping=grouping, layout="relative")


@pytest.mark.parametrize("layout", ["aligned", "relative"])
@pytest.mark.parametrize("k", [1, 100_000])
def test_smallest_and_largest_budget(k, layout):
    assert_same(random_scores(), k=k, layout=layout, grouping="causal_batch", keep_first=True)


def test_bins_that_are_no_power_of_two():
    assert_same(random_scores(queries=100, num_bins=96), grouping="causal_batch", keep_own=True)


def test_strided_scores_match():
    scores = random_scores(heads=40, queries=3).transpose(1, 2)
    assert_same(scores, grouping="causal_batch")
    assert_same(scores.mT.contiguous().mT)


@pytest.mark.parametrize(
    ("scores", "options"),
    [
        (torch.zeros(1, 2, 4, K), {"causal": False, "grouping": "head"}),
        (torch.zeros(1, 2, 4, K, dtype=torch.float64), {"causal": True, "grouping": "query"}),
        (torch.zeros(1, 513, 1, K), {"causal": True, "grouping": "causal_batch"}),
    ],
)
def test_what_has_no_kernel(scores, options):
    with pytest.raises(NotImplementedError, match="select_bins: backend='triton'"):
        select_bins(scores, k=2, layout="aligned", backend="triton", **options)
