"""The Triton backward pass of the far field against float64 autograd of the PyTorch form."""

import pytest
import torch

from sea_kernels import (
    far_field_attention,
    pooled_selection,
    second_look,
    triton_entries,
    triton_wide_lists,
    triton_wide_rows_keys,
)
from sea_kernels.far_field import reference, triton_key_grad, triton_pooled_grad

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = "query", "key", "value", "centre"


def masks_of(query, key, looks, *, width=2, stride=1, num_bins=32, k=24, **place):
    """Kept keys, and the first look's bins if there are two looks."""
    ones = torch.ones(query.shape[1], device=query.device)
    options = {"mean_weight": ones, "bound_weight": ones, "stride": stride, "backend": "reference", **place}
    bins = pooled_selection(query, key, k=k, num_bins=num_bins, **options)
    if looks == 1:
        return bins, None
    return second_look(query, key, bins, k=k // 3, width=width, window=0, keep_first=True, **options), bins


def centre_of(query):
    centre = 0.3 * torch.randn(query.shape[1], query.shape[-1], generator=torch.Generator().manual_seed(1))
    return centre.to(query.device)


def graph_of(tensors, masks, backend, **place):
    """Inputs that require gradients, and the result."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    return inputs, far_field_attention(*inputs[:3], *masks, centre=inputs[3], backend=backend, **place)


def assert_same(tensors, *, looks, causal=True, attention_mask=None, tolerance=2e-6, repeat=False, **options):
    """Every gradient is within ``tolerance`` of its size of float64, and with ``repeat`` the same in a second run."""
    query, key, value = (x.to(DEVICE) for x in tensors)
    place = {"causal": causal, "scaling": query.shape[-1] ** -0.5}
    place["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    masks = masks_of(query, key, looks, **options, **place)
    inputs, output = graph_of([query, key, value, centre_of(query)], masks, "triton", **place)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    grads = torch.autograd.grad(output, inputs, grad_output, retain_graph=repeat)
    if repeat:
        again = torch.autograd.grad(output, inputs, grad_output)
        assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))
    exact, output = graph_of([x.double() for x in inputs], masks, "reference", **place)
    exact = torch.autograd.grad(output, exact, grad_output.double())
    for name, tensor, grad, truth in zip(NAMES, inputs, grads, exact, strict=True):
        assert grad.dtype == tensor.dtype
        error = (grad.double() - truth).norm()
        assert error <= tolerance * truth.norm(), f"{name}: {error:.1e} of {truth.norm():.1e}"


def test_grouped_heads_after_a_second_look(random_qkv):
    tensors = random_qkv(batch=1, heads=2, groups=1, queries=20, keys=70, width=8, value_width=5)
    assert_same([x.float() for x in tensors], looks=2, repeat=True)


def test_one_look_in_several_launches_and_partial_sums(random_qkv, monkeypatch):
    monkeypatch.setattr(triton_wide_lists, "LIST_BYTES", 1)
    monkeypatch.setattr(triton_wide_lists, "MOST_ROWS", 16)
    monkeypatch.setattr(triton_wide_rows_keys, "BUFFER_BYTES", 1)
    monkeypatch.setattr(triton_pooled_grad, "SPLIT_ROWS", 24)
    tensors = [x.float() for x in random_qkv(batch=1, heads=2, groups=2, queries=63, width=4)]
    assert_same(tensors, looks=1, repeat=True)


@pytest.mark.parametrize(("causal", "sides"), [(True, None), (True, (9, 5)), (False, (9, 5))])
def test_one_look_at_bins_whose_bits_take_two_words(random_qkv, padding_mask, causal, sides):
    real = None if sides is None else padding_mask(210, [sides])
    tensors = [x.float() for x in random_qkv(batch=1, heads=2, groups=1, queries=210, width=8, value_width=4)]
    assert_same(tensors, looks=1, num_bins=64, k=48, causal=causal, attention_mask=real)


def test_two_looks_in_several_launches(random_qkv, monkeypatch):
    monkeypatch.setattr(triton_entries, "LIST_BYTES", 1)
    monkeypatch.setattr(triton_key_grad, "LIST_BYTES", 1)
    tensors = [x.float() for x in random_qkv(batch=1, heads=2, groups=2, queries=33, width=4)]
    assert_same(tensors, looks=2)


@pytest.mark.parametrize("keys", [540, 1060])  # bins of 16 and 32, 32 and 64 keys
def test_rows_of_two_bin_widths_in_one_block(random_qkv, keys):
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=60, keys=keys, width=8)]
    assert_same(tensors, looks=1, k=keys // 8)


def test_one_row_behind_a_cache_keeps_many_runs(random_qkv):
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=1, keys=111, width=4)]
    assert_same(tensors, looks=2, k=120)


def test_padding_on_both_sides_and_shared_rows(random_qkv, padding_mask):
    tensors = [x.float() for x in random_qkv(heads=1, groups=1, queries=20, keys=84, width=4)]
    assert_same(tensors, looks=2, attention_mask=padding_mask(84, [(70, 0), (3, 6)]), stride=4)


def test_an_item_without_real_keys_gets_zeros(random_qkv, padding_mask):
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=20, width=4)]
    assert_same(tensors, looks=1, k=8, attention_mask=padding_mask(20, [(20, 0)]))


def test_bidirectional_rows_match(random_qkv, padding_mask):
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=70, width=4)]
    assert_same(tensors, looks=2, causal=False, attention_mask=padding_mask(70, [(2, 1)]))


def test_half_precision_and_odd_widths(random_qkv):
    tensors = [x.half() for x in random_qkv(batch=1, heads=1, groups=1, queries=12, keys=60, width=27, value_width=20)]
    assert_same(tensors, looks=1, tolerance=2e-3)


def test_runs_wider_than_bins(random_qkv):
    tensors = [x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=14, keys=96, width=4)]
    assert_same(tensors, looks=2, width=32, k=192)


def test_views_of_other_layouts(random_qkv):
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(batch=1, heads=1, groups=1, queries=40, width=4))
    masks = masks_of(query, key, 1, k=8, causal=True, scaling=0.5)
    wider = torch.cat([query, query], -1)[..., :4]
    tensors = wider, key.mT.contiguous().mT, value, centre_of(query)
    grads = []
    for backend in ("triton", "reference"):
        inputs, output = graph_of(tensors, masks, backend, causal=True, scaling=0.5)
        weight = torch.arange(40, device=DEVICE).float()
        grads.append(torch.autograd.grad(torch.einsum("nhte,t->", output, weight), inputs))  # an expanded gradient
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_and_never_the_reference(random_qkv, monkeypatch):
    monkeypatch.delattr(reference, "far_field_attention")
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(batch=1, heads=1, groups=1, queries=20, width=4))
    masks = masks_of(query, key, 1, k=8, causal=True, scaling=0.5)
    centre = centre_of(query).half().requires_grad_()
    value.requires_grad_()
    output = far_field_attention(query, key, value, *masks, centre=centre, causal=True, scaling=0.5, backend="triton")
    output.square().sum().backward()
    assert centre.grad.dtype == torch.float16
    assert value.grad.abs().sum() > 0
    assert query.grad is None
    assert key.grad is None


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16 and is slow")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("width", [64, 128])
def test_long_rows_match(random_qkv, dtype, tolerance, looks, width):
    sizes = {"batch": 1, "heads": 4, "groups": 2, "width": width, "value_width": width}
    tensors = [x.to(dtype) for x in random_qkv(queries=1000, keys=3000, **sizes)]
    assert_same(tensors, looks=looks, width=4, num_bins=256, k=192, stride=4, tolerance=tolerance, repeat=True)
