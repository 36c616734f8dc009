"""The Triton form of the far field against the PyTorch form, in the interpreter where there is no GPU."""

import pytest
import torch

from sea_kernels import far_field_attention, pooled_selection, second_look
from sea_kernels.far_field import triton as forward
from sea_kernels.masks import BinMask

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_same(
    tensors,
    *,
    causal=True,
    attention_mask=None,
    stride=1,
    looks_twice=True,
    window=0,
    num_bins=32,
    scaling=None,
    tolerance=1e-6,
):
    """The Triton form's error against float64 is within ``tolerance`` of the result's size."""
    query, key, value = (x.to(DEVICE) for x in tensors)
    heads, width = query.shape[1], query.shape[-1]
    place = {"causal": causal, "scaling": scaling or width**-0.5}
    place["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    ones = torch.ones(heads, device=DEVICE)
    looks = {"mean_weight": ones, "bound_weight": ones, "stride": stride, "backend": "reference", **place}
    coarse, kept = None, pooled_selection(query, key, k=40, num_bins=num_bins, **looks)
    if looks_twice:
        coarse, kept = kept, second_look(query, key, kept, k=16, width=4, window=window, keep_first=True, **looks)
    centre = 0.3 * torch.randn(heads, width, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    output = far_field_attention(query, key, value, kept, coarse, centre=centre, backend="triton", **place)
    exact = [x.double() for x in (query, key, value)]
    exact = far_field_attention(*exact, kept, coarse, centre=centre, backend="reference", **place)
    assert output.dtype == query.dtype
    assert (output.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("looks_twice", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 150), (40, 150), (40, 280)])  # widths change at 129 and 257 keys
def test_causal_rows_match(random_qkv, queries, keys, looks_twice):
    sizes = {"batch": 1, "heads": 2, "groups": 1, "width": 16, "value_width": 8}
    tensors = [x.float() for x in random_qkv(queries=queries, keys=keys, **sizes)]
    assert_same(tensors, looks_twice=looks_twice)


@pytest.mark.parametrize(("num_bins", "keys", "sides"), [(64, 300, None), (96, 220, (21, 6)), (128, 270, (8, 3))])
def test_several_words_of_bins(random_qkv, padding_mask, num_bins, keys, sides):
    """Of 64 or 128 bins, tiles have two words; widths change at 257, 193 and 257 keys."""
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=60, keys=keys, width=8)]
    real = None if sides is None else padding_mask(keys, [sides])
    assert_same(tensors, looks_twice=False, num_bins=num_bins, attention_mask=real)


@pytest.mark.parametrize(("stride", "looks_twice"), [(1, True), (4, True), (1, False)])
def test_padding_on_both_sides(random_qkv, padding_mask, stride, looks_twice):
    tensors = [x.float() for x in random_qkv(heads=2, groups=1, queries=50, keys=140, width=8)]
    real = padding_mask(140, [(100, 0), (0, 6)])
    assert_same(tensors, attention_mask=real, stride=stride, looks_twice=looks_twice)


def test_bidirectional_rows_match(random_qkv, padding_mask):
    tensors = [x.float() for x in random_qkv(heads=1, groups=1, queries=140, width=8)]
    assert_same(tensors, causal=False, attention_mask=padding_mask(140, [(10, 3), (140, 0)]))


@pytest.mark.parametrize(("width", "value_width"), [(27, 20), (96, 80)])
def test_half_precision_and_odd_widths(random_qkv, width, value_width):
    sizes = {"queries": 60, "keys": 150, "width": width, "value_width": value_width}
    tensors = [x.half() for x in random_qkv(batch=1, heads=1, groups=1, **sizes)]
    assert_same(tensors, tolerance=2e-3)


@pytest.mark.parametrize(("width", "num_bins"), [(16, 64), (96, 32)])
def test_half_precision_after_one_look(random_qkv, width, num_bins):
    tensors = [x.half() for x in random_qkv(batch=1, heads=2, groups=1, queries=70, keys=300, width=width)]
    assert_same(tensors, looks_twice=False, num_bins=num_bins, tolerance=2e-3)


def test_negative_scores_in_several_launches(random_qkv, monkeypatch):
    monkeypatch.setattr("sea_kernels.triton_wide_lists.LIST_BYTES", 1)
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=140, keys=300, width=8)]
    assert_same(tensors, looks_twice=False, scaling=-0.4)


def test_what_empty_rows_leave(random_qkv, padding_mask):
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(batch=1, heads=1, groups=1, queries=90, width=8))
    mask = BinMask(torch.zeros(1, 1, 90, 1, dtype=torch.int32, device=DEVICE), 32, "aligned")
    real = padding_mask(90, [(70, 4)])
    place = {"centre": query.new_zeros(1, 8), "causal": True, "scaling": 0.4, "attention_mask": real.to(DEVICE)}
    output, log_sums, *_ = forward.far_field_attention(query, key, value, mask, None, **place)
    assert log_sums[:, :, real[0]].cpu().abs().min() > 0
    assert not log_sums[:, :, ~real[0]].any()
    assert not output[:, :, ~real[0]].any()


def test_second_look_with_a_window_has_no_kernel(random_qkv):
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=20, width=8)]
    with pytest.raises(NotImplementedError, match="no Triton form"):
        assert_same(tensors, window=4)
