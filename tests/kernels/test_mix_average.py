"""Mixing with the running mean: hand-computed, against a plain formula, in Triton, gradients, padding."""

import pytest
import torch

from sea_kernels import mix_average

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(queries, keys, heads=4, groups=2, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, width), (2, groups, keys, width), (2, heads, queries)
    context, value, mix = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(DEVICE, dtype) for tensor in (context, value, mix.sigmoid())]


def plain(context, value, mix, mask=None):
    """The formula with a T x S matrix."""
    queries, keys = context.shape[2], value.shape[2]
    sees = torch.ones(queries, keys, dtype=torch.bool, device=value.device).tril(keys - queries).expand(2, -1, -1)
    if mask is not None:
        sees = sees & mask[:, None] & mask[:, keys - queries :, None]
    weight = sees.double() / sees.sum(-1, keepdim=True).clamp_min(1)
    value = value.double().repeat_interleave(context.shape[1] // value.shape[1], 1)
    return mix[..., None] * context + (1 - mix[..., None]) * (weight[:, None] @ value)


def test_by_hand():
    context, value = torch.zeros(1, 1, 3, 1), torch.tensor([3.0, 5.0, 10.0]).view(1, 1, 3, 1)
    mix = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3)
    result = mix_average(context + 8, value, mix).flatten()
    torch.testing.assert_close(result, torch.tensor([3.0, 6.0, 8.0]))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 130), (63, 63), (40, 111), (200, 200)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equals_the_formula(backend, padded, queries, keys):
    dtype = torch.float64 if backend == "reference" else torch.float32
    context, value, mix = inputs(queries, keys, dtype=dtype)
    mask = None
    if padded:
        place = torch.arange(keys, device=DEVICE)
        mask = torch.stack([place >= keys // 3, place < keys - keys // 3])
    ours = mix_average(context, value, mix, attention_mask=mask, backend=backend)
    expected = plain(context.double(), value, mix.double(), mask)
    tolerance = 1e-12 if backend == "reference" else 1e-5
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


def test_triton_in_half_precision_and_odd_layouts():
    context, value, mix = inputs(70, 70, width=24, dtype=torch.float16)
    context = context.transpose(1, 2).contiguous().transpose(1, 2)
    ours = mix_average(context, value, mix, backend="triton")
    expected = plain(context.double(), value, mix.double())
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), expected, atol=2e-3, rtol=2e-3)


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in inputs(6, 9, width=2)]
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, :5] = mask[1, 7:] = False
    assert torch.autograd.gradcheck(lambda *t: mix_average(*t, attention_mask=mask), tensors)


def test_triton_has_the_gradients_of_the_reference():
    grads = []
    for backend in ("reference", "triton"):
        tensors = [tensor.requires_grad_() for tensor in inputs(70, 90, dtype=torch.float32)]
        mix_average(*tensors, backend=backend).square().sum().backward()
        grads.append([tensor.grad for tensor in tensors])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_wrong_shapes_are_named():
    context, value, mix = inputs(4, 4)
    with pytest.raises(ValueError, match="mix has shape"):
        mix_average(context, value, mix[:, :1])
    with pytest.raises(ValueError, match="context has 4 heads, expected a multiple of value's 3"):
        mix_average(context, value[:, :1].expand(-1, 3, -1, -1), mix)
