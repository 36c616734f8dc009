"""The Triton form of the pooled-key scores against the PyTorch form, in the interpreter where there is no GPU."""

import pytest
import torch

from sea_kernels import pooled_scores, weighted_scores

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 32


def assert_same(query, key, *, attention_mask=None, tolerance=1e-6, num_bins=K, **options):
    """The Triton form's error against float64 is within ``tolerance`` of the result's size; returns its scores."""
    query, key = query.to(DEVICE), key.to(DEVICE)
    options = {"layout": "aligned", "causal": True} | options | {"scaling": -0.7, "num_bins": num_bins}
    options["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    scores = pooled_scores(query, key, backend="triton", **options)
    exact = pooled_scores(query.double(), key.double(), backend="reference", **options)
    assert scores.dtype == query.dtype
    assert (scores.double() - exact).norm() <= tolerance * exact.norm()
    return scores


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize(
    ("layout", "queries", "keys", "shift"),
    [
        ("aligned", 20, 20, 0),  # fewer keys than bins
        ("aligned", 64, 64, 0),  # a last block of rows that none is in, one width further
        ("aligned", 70, 70, 0),  # three widths
        ("aligned", 1, 75, 0),
        ("relative", 20, 20, 150),
        ("relative", 9, 111, -190),
    ],
)
def test_causal_rows_match(random_qkv, layout, queries, keys, shift, statistic):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=2, groups=1, queries=queries, keys=keys, width=12))
    assert_same(query, key, layout=layout, statistic=statistic, shift=shift)


@pytest.mark.parametrize(("layout", "statistic"), [("aligned", "bound"), ("relative", "mean")])
def test_padding_on_both_sides(random_qkv, padding_mask, layout, statistic):
    query, key, _ = (x.float() for x in random_qkv(heads=1, groups=1, queries=40, keys=63, width=5))
    mask = padding_mask(63, [(30, 0), (2, 11)])
    key.transpose(1, 2)[~mask] = torch.nan
    query.transpose(1, 2)[~mask[:, -40:]] = torch.nan
    key = torch.where(mask[:, None, :, None], key, 0) if layout == "relative" else key  # prefix sums spread a NaN
    options = {"layout": layout, "causal": True, "statistic": statistic, "num_bins": K, "scaling": -0.7}
    options["attention_mask"] = mask.to(DEVICE)
    scores = pooled_scores(query.to(DEVICE), key.to(DEVICE), backend="triton", **options)
    clean = [torch.nan_to_num(x).double().to(DEVICE) for x in (query, key)]
    exact = pooled_scores(*clean, backend="reference", **options)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize(("layout", "shift"), [("aligned", 0), ("relative", 192)])
def test_bidirectional_rows_match(random_qkv, padding_mask, layout, shift, statistic):
    query, key, _ = (x.float() for x in random_qkv(heads=2, groups=1, queries=50, width=8))
    mask = padding_mask(50, [(3, 4), (30, 0)])
    assert_same(query, key, layout=layout, causal=False, shift=shift, statistic=statistic, attention_mask=mask)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
def test_own_bins_wider_than_a_block_of_rows(random_qkv, statistic):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=10, keys=1130, width=4))
    assert_same(query, key, statistic=statistic)


@pytest.mark.parametrize(("layout", "statistic"), [("aligned", "bound"), ("relative", "mean")])
def test_half_precision_and_bins_that_are_no_power_of_two(random_qkv, layout, statistic):
    query, key, _ = (x.half() for x in random_qkv(batch=1, queries=20, width=8))
    assert_same(query, key, layout=layout, statistic=statistic, num_bins=96, tolerance=1e-3)


@pytest.mark.parametrize("layout", ["aligned", "relative"])
def test_later_keys_change_nothing(random_qkv, layout):
    query, key, _ = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=50))
    before = assert_same(query, key, layout=layout)
    key[:, :, 41:] += 1
    after = assert_same(query, key, layout=layout)
    assert torch.equal(before[:, :, :41], after[:, :, :41])
    assert (before[:, :, 41:] != after[:, :, 41:]).any(-1).all()


def gradients(query, key, backend, dtype, *, attention_mask=None, num_bins=K, **options):
    """Gradients of a function of the scores to query and key, whose leaves have ``dtype``."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (query, key)]
    mask = None if attention_mask is None else attention_mask.to(DEVICE)
    options = {"layout": "aligned", "causal": True, "scaling": -0.7} | options
    scores = pooled_scores(*leaves, num_bins=num_bins, attention_mask=mask, backend=backend, **options)
    size = torch.arange(scores.numel(), device=DEVICE).view(scores.shape)
    return torch.autograd.grad((scores * (0.1 * size).cos().to(dtype)).sum(), leaves)


def assert_gradients_match(query, key, *, dtype=torch.float32, tolerance=1e-6, **options):
    """Errors of the Triton form's gradients against float64 are within ``tolerance`` of their sizes."""
    query, key = query.to(dtype), key.to(dtype)
    results = gradients(query, key, "triton", dtype, **options)
    exact = gradients(query, key, "reference", torch.float64, **options)
    for got, expected in zip(results, exact, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= tolerance * expected.norm()
    return results


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups"),
    [
        (20, 20, 1, 1),  # fewer keys than bins
        (70, 70, 4, 2),  # three widths
        (9, 111, 3, 1),  # a cache
        (1, 75, 1, 1),
    ],
)
def test_gradients_of_causal_rows(random_qkv, queries, keys, heads, groups, statistic):
    query, key, _ = random_qkv(batch=1, heads=heads, groups=groups, queries=queries, keys=keys, width=12)
    assert_gradients_match(query, key, statistic=statistic)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
def test_gradients_through_own_bins_wider_than_a_tile(random_qkv, statistic):
    query, key, _ = random_qkv(batch=1, heads=1, groups=1, queries=150, keys=2190, width=3)
    assert_gradients_match(query, key, statistic=statistic)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_under_padding_repeat_and_leave_it_alone(random_qkv, padding_mask, causal, statistic):
    query, key, _ = random_qkv(batch=3, heads=1, groups=1, queries=51 if causal else 63, keys=63)
    mask = padding_mask(63, [(20, 0), (2, 11), (0, 40)])
    options = {"causal": causal, "statistic": statistic, "attention_mask": mask}
    expected = assert_gradients_match(query, key, **options)
    assert not expected[1].transpose(1, 2)[~mask].any()
    key.transpose(1, 2)[~mask] = torch.nan
    query.transpose(1, 2)[~mask[:, -query.shape[2] :]] = torch.nan
    again = gradients(query, key, "triton", torch.float32, **options)
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("statistic", ["mean", "bound"])
def test_gradients_of_bidirectional_rows(random_qkv, statistic):
    query, key, _ = random_qkv(batch=1, heads=2, groups=1, queries=75, width=12)
    assert_gradients_match(query, key, causal=False, statistic=statistic)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_relative_bins(random_qkv, padding_mask, causal):
    query, key, _ = random_qkv(heads=2, groups=1, queries=20)
    mask = padding_mask(20, [(5, 0), (0, 0)])
    options = {"layout": "relative", "causal": causal, "statistic": "bound", "attention_mask": mask}
    assert_gradients_match(query, key, tolerance=1e-5, **options)


@pytest.mark.parametrize("statistic", ["mean", "bound"])
def test_gradients_in_half_precision(random_qkv, statistic):
    query, key, _ = random_qkv(batch=1, heads=2, groups=1, queries=110, width=8)
    assert_gradients_match(query, key, dtype=torch.float16, statistic=statistic, num_bins=96, tolerance=2e-3)


def test_a_walk_over_rows_in_parts_changes_nothing(random_qkv, monkeypatch):
    from sea_kernels.pooled_scores import triton_backward

    query, key, _ = random_qkv(batch=1, heads=2, groups=1, queries=140)
    monkeypatch.setattr(triton_backward, "SPLIT_ROWS", 60)
    assert_gradients_match(query, key, statistic="bound")


@pytest.mark.parametrize("causal", [True, False])
def test_equal_maxima_send_their_gradient_to_the_first_key(random_qkv, causal):
    query, key, _ = random_qkv(batch=1, heads=1, groups=1, queries=128, width=4)
    key = key.unflatten(2, (-1, 4))[:, :, :, :1].expand(-1, -1, -1, 4, -1).flatten(2, 3)  # bins of four equal keys
    options = {"causal": causal, "statistic": "bound"}
    got, expected = (
        gradients(query, key, backend, dtype, **options)[1].double().unflatten(2, (-1, 4))
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    # The PyTorch form divides what the kernel gives to one: the sums over equal keys agree.
    torch.testing.assert_close(got.sum(3), expected.sum(3), rtol=1e-4, atol=1e-4)
    wide = slice(16, None) if causal else slice(None)  # positions whose own bins have four keys
    assert not got[:, :, wide, 1:].any()


def test_equal_maxima_in_a_bin_of_several_tiles_send_their_gradient_to_its_first_key(random_qkv):
    query, key, _ = random_qkv(batch=1, heads=1, groups=1, queries=100, keys=17 * 128, width=3)
    key = key.unflatten(2, (17, 128))[:, :, :, :1].expand(-1, -1, -1, 128, -1).flatten(2, 3)
    got, expected = (
        gradients(query, key, backend, dtype, statistic="bound")[1].double().unflatten(2, (17, 128))
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    torch.testing.assert_close(got.sum(3), expected.sum(3), rtol=1e-4, atol=1e-4)
    assert got[:, :, -1, 0].all()  # the rows' own bin
    assert not got[:, :, :, 1:].any()


def test_float64_has_no_kernel(random_qkv):
    query, key, _ = random_qkv()
    with pytest.raises(NotImplementedError, match="pooled_scores: backend='triton'"):
        pooled_scores(query, key, num_bins=K, layout="aligned", causal=True, scaling=1.0, backend="triton")


def weighted(query, key, backend, dtype, *, mask=None, num_bins=K, **options):
    """Weighted scores, and the gradients of a function of them to query, key and both weights."""
    heads = torch.arange(1.0, query.shape[1] + 1)
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (query, key, 0.5 * heads, 1 - 0.4 * heads)]
    weights = dict(zip(("mean_weight", "bound_weight"), leaves[2:], strict=True))
    options = {"layout": "aligned", "scaling": -0.7, "attention_mask": mask} | weights | options
    scores = weighted_scores(*leaves[:2], num_bins=num_bins, backend=backend, **options)
    size = torch.arange(scores.numel(), device=DEVICE).view(scores.shape)
    return scores, *torch.autograd.grad((scores * (0.1 * size).cos()).sum(), leaves)


def assert_weighted_match(query, key, *, dtype=torch.float32, tolerance=1e-6, **options):
    query, key = query.to(dtype), key.to(dtype)
    results = weighted(query, key, "triton", dtype, **options)
    exact = weighted(query, key, "reference", torch.float64, **options)
    for got, expected in zip(results, exact, strict=True):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()
    return results


@pytest.mark.parametrize("causal", [True, False])
def test_weighted_scores_are_those_of_both_statistics(random_qkv, padding_mask, causal):
    query, key, _ = random_qkv(heads=2, groups=1, queries=51 if causal else 70, keys=70, width=5)
    query[..., 0] = 0  # where bounds have no slope, and means have
    mask = padding_mask(70, [(20, 0), (2, 11)]).to(DEVICE)
    results = assert_weighted_match(query, key, causal=causal, mask=mask, tolerance=5e-6)  # sums over all rows
    assert [x.dtype for x in results] == [torch.float32] * 5


def test_weighted_scores_in_half_precision(random_qkv):
    query, key, _ = random_qkv(batch=1, heads=2, groups=1, queries=110, width=8)
    results = assert_weighted_match(query, key, dtype=torch.float16, causal=True, num_bins=96, tolerance=2e-3)
    assert [x.dtype for x in results] == [torch.float32] + [torch.float16] * 4


@pytest.mark.parametrize("change", [{"layout": "relative"}, {"bound_weight": None}])
def test_weighted_scores_of_which_no_kernel_has_both(random_qkv, change):
    query, key, _ = (x.float() for x in random_qkv(queries=20))
    weights = {"mean_weight": torch.ones(4, device=DEVICE), "bound_weight": torch.ones(4, device=DEVICE)} | change
    options = {"layout": "aligned", "num_bins": K, "causal": True, "scaling": 1.0} | weights
    got, expected = (
        weighted_scores(query.to(DEVICE), key.to(DEVICE), backend=backend, **options)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected)


def test_weights_that_do_not_fit_are_refused(random_qkv):
    query, key, _ = random_qkv()
    options = {"layout": "aligned", "num_bins": K, "causal": True, "scaling": 1.0}
    with pytest.raises(ValueError, match="bound_weight has shape"):
        weighted_scores(query, key, mean_weight=torch.ones(4), bound_weight=torch.ones(2), **options)
