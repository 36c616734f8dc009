"""The Triton form of linear attention against the PyTorch form, in the interpreter where there is no GPU."""

import pytest
import torch

from sea_kernels import LinearState, linear_attention
from sea_kernels.linear_attention import triton as implementation

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH_SIDES = [(31, 0), (3, 21)]


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 64 keys, one per piece, so that short inputs have several."""
    monkeypatch.setattr(implementation, "SEGMENT", 64)
    monkeypatch.setattr(implementation, "STATE_ELEMENTS", 1)


def directions(features, width):
    return torch.randn(features, width, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def assert_same(query, key, value, *, features=42, tolerance=3e-6, attention_mask=None, **options):
    """The Triton form's error against float64 is within ``tolerance`` of the result's size; returns its output."""
    inputs = [tensor.to(DEVICE) for tensor in (query, key, value)]
    options |= {"attention_mask": None if attention_mask is None else attention_mask.to(DEVICE), "scaling": 0.4}
    projection = directions(features, query.shape[-1])
    output = linear_attention(*inputs, projection, backend="triton", **options)
    exact = linear_attention(*(x.double() for x in inputs), projection, backend="reference", **options)
    assert output.dtype == query.dtype
    assert (output.double() - exact).norm() <= tolerance * exact.norm()
    return output


@pytest.mark.parametrize(
    ("queries", "keys", "padding"), [(63, 63, None), (1, 70, None), (40, 111, BOTH_SIDES), (111, 111, BOTH_SIDES)]
)
def test_causal_rows_match(random_qkv, padding_mask, short_segments, queries, keys, padding):
    query, key, value = (x.float() for x in random_qkv(queries=queries, keys=keys, width=12, value_width=20))
    real = None if padding is None else padding_mask(keys, padding)
    output = assert_same(query, key, value, causal=True, attention_mask=real)
    if real is not None:
        assert (output.transpose(1, 2).cpu()[~real[:, -queries:]] == 0).all()


@pytest.mark.parametrize(("length", "padding"), [(1, None), (63, None), (111, BOTH_SIDES), (30, [(30, 0), (0, 0)])])
def test_bidirectional_rows_match(random_qkv, padding_mask, length, padding):
    query, key, value = (x.float() for x in random_qkv(queries=length, width=12, value_width=20))
    real = None if padding is None else padding_mask(length, padding)
    if real is not None:
        key.transpose(1, 2)[~real] += 40  # would move the stabiliser of the keys
    output = assert_same(query, key, value, causal=False, attention_mask=real)
    if real is not None:
        assert (output.transpose(1, 2).cpu()[~real] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("features", [1, 70])
def test_features_are_tiled(random_qkv, causal, features):
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=2, groups=1, queries=40, width=16))
    assert_same(query, key, value, causal=causal, features=features)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_half_precision_is_summed_in_float32(random_qkv, causal, dtype, tolerance):
    query, key, value = (x.to(dtype) for x in random_qkv(batch=1, heads=2, queries=90, width=16, value_width=16))
    assert_same(query, key, value, causal=causal, tolerance=tolerance)


def test_normaliser_of_keys_whose_features_are_least(random_qkv):
    """Then the 1e-6 that the normaliser adds to a feature's sum is a thousandth of it."""
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(batch=1, heads=1, groups=1, queries=3, width=8))
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (query, 1e-3 * key, value)]
        output = linear_attention(*leaves, directions(20, 8), causal=True, backend=backend)
        results.append((output, *torch.autograd.grad(output.sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


def test_strided_inputs_match(random_qkv, short_segments):
    query, key, value = (x.float() for x in random_qkv(queries=20, width=8, value_width=8))
    query, key = query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT
    assert_same(query, key, value, causal=True)


@pytest.mark.parametrize("changed", [0, 31, 64])
def test_no_row_sees_a_later_key(random_qkv, short_segments, changed):
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(batch=1, heads=2, queries=70, width=8))
    projection = directions(20, 8)
    before = linear_attention(query, key, value, projection, causal=True, backend="triton")
    key[:, :, changed] += 1
    value[:, :, changed] -= 1
    after = linear_attention(query, key, value, projection, causal=True, backend="triton")
    assert torch.equal(after[:, :, :changed], before[:, :, :changed])
    assert not torch.equal(after[:, :, changed], before[:, :, changed])


@pytest.mark.parametrize("cut", [1, 64])
def test_a_state_continues_a_sequence(random_qkv, padding_mask, short_segments, cut):
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(heads=2, queries=80, width=8))
    mask = padding_mask(80, [(0, 3), (70, 0)]).to(DEVICE)
    options = {"causal": True, "return_state": True}
    projection, state, outputs = directions(20, 8), None, []
    for part in (slice(0, cut), slice(cut, 80)):
        chunk = [x[:, :, part] for x in (query, key, value)]
        options |= {"attention_mask": mask[:, part], "initial_state": state}
        output, state = linear_attention(*chunk, projection, backend="triton", **options)
        outputs.append(output)
    options |= {"attention_mask": mask, "initial_state": None}
    exact = linear_attention(*(x.double() for x in (query, key, value)), projection, backend="reference", **options)
    torch.testing.assert_close(torch.cat(outputs, 2).double(), exact[0], rtol=1e-5, atol=1e-5)
    for got, expected in zip(state, exact[1], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("causal", "queries", "keys", "padding"),
    [(True, 70, 70, [(5, 0), (0, 0)]), (True, 40, 75, [(0, 7), (37, 0)]), (False, 40, 40, [(5, 0), (0, 0)])],
)
def test_gradients_match(random_qkv, padding_mask, short_segments, causal, queries, keys, padding):
    inputs = [x.float() for x in random_qkv(queries=queries, keys=keys, width=8, value_width=12)]
    projection, state = directions(20, 8), ()
    if causal:
        generator = torch.Generator().manual_seed(2)
        state = [torch.rand(shape, generator=generator) for shape in ((2, 2, 20, 12), (2, 2, 20))]
    mask = padding_mask(keys, padding)
    options = {"causal": causal, "attention_mask": mask.to(DEVICE)}
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (*inputs, *state)]
        if causal:
            options |= {"initial_state": LinearState(*leaves[3:]), "return_state": True}
        output = linear_attention(*leaves[:3], projection, backend=backend, **options)
        parts = (output[0], *output[1]) if causal else (output,)
        results.append(torch.autograd.grad(sum((part * part.detach().cos()).sum() for part in parts), leaves))
    for got, expected in zip(*results, strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()
    for gradient in results[0][1:3]:
        assert (gradient.transpose(1, 2).cpu()[~mask] == 0).all()


def test_half_precision_gradients_and_their_repetition(random_qkv, short_segments):
    inputs = [x.half().to(DEVICE) for x in random_qkv(batch=1, heads=2, groups=1, queries=70, width=8, value_width=8)]
    projection, results = directions(20, 8), []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float16), ("triton", torch.float16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = linear_attention(*leaves, projection, causal=True, backend=backend)
        results.append(torch.autograd.grad(output, leaves, output.detach().cos()))
    for expected, got, again in zip(*results, strict=True):
        assert got.dtype == torch.float16
        assert (got.double() - expected).norm() <= 2e-3 * expected.norm()
        assert torch.equal(got, again)


def test_float64_has_no_kernel(random_qkv):
    with pytest.raises(NotImplementedError, match="linear_attention: backend='triton'"):
        linear_attention(*random_qkv(), torch.randn(6, 5), causal=True, backend="triton")
