"""Gradients of sparse attention's Triton form against float64 autograd, in the interpreter where there is no GPU."""

import pytest
import torch

from sea_kernels import sparse_attention, triton_entries, triton_parts, triton_wide_lists, triton_wide_rows_keys
from sea_kernels.masks import BinMask, RunMask, kept_keys, pack_bits, window_start
from sea_kernels.spans import row_spans
from sea_kernels.sparse_attention import triton_backward, triton_backward_keys

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH_SIDES = [(53, 0), (5, 21)]
NAMES = "query", "key", "value", "row_scale"


def random_bins(shape, layout, shift=0, share=0.2, num_bins=32):
    keep = torch.rand(*shape, num_bins, generator=torch.Generator().manual_seed(1)) < share
    return BinMask(pack_bits(keep).to(DEVICE), num_bins, layout, shift)


def random_runs(shape, spans, slots, width, window=0, stride=1):
    """Different runs before the row's window (before its end, where it has none), some slots empty."""
    generator = torch.Generator().manual_seed(1)
    mask = RunMask(torch.empty(0), width, window, stride)
    windowed = window > 0 or stride > 1
    limit = window_start(spans.position, mask) if windowed else spans.length
    limit = torch.where(spans.length > 0, limit, 0)[:, None, :, None]
    order = torch.rand(*shape, int(limit.max()) // width + 1, generator=generator).argsort(-1)[..., :slots] * width
    starts = torch.where((order < limit) & (torch.rand(order.shape, generator=generator) < 0.8), order, -1)
    return RunMask(starts.int().to(DEVICE), width, window, stride)


def gradients(backend, tensors, mask, weights, **options):
    """Gradients of the weighted output to query, key, value and, if given, row_scale."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    row_scale = inputs[3] if len(inputs) > 3 else None
    output = sparse_attention(*inputs[:3], mask, row_scale=row_scale, backend=backend, **options)
    return torch.autograd.grad(output, inputs, weights.to(output.dtype).expand_as(output))


def assert_gradients(query, key, value, mask, *, causal, attention_mask=None, row_scale=None, tolerance=2e-6):
    """Every gradient's error against float64 is within ``tolerance`` of its size; on a GPU, two runs are equal."""
    real = None if attention_mask is None else attention_mask.to(DEVICE)
    options = {"causal": causal, "scaling": query.shape[-1] ** -0.5, "attention_mask": real}
    tensors = [x.to(DEVICE) for x in (query, key, value, row_scale) if x is not None]
    weights = torch.randn(*query.shape[:3], value.shape[-1], generator=torch.Generator().manual_seed(3)).to(query)
    weights = weights.to(DEVICE)
    found = gradients("triton", tensors, mask, weights, **options)
    exact = gradients("reference", [x.double() for x in tensors], mask, weights, **options)
    for name, tensor, ours, expected in zip(NAMES, tensors, found, exact, strict=False):
        assert ours.dtype == tensor.dtype, name
        assert ours.isfinite().all(), name
        error, size = (ours.double() - expected).norm(), expected.norm()
        assert error <= tolerance * size, f"{name}: {error / size}"
    if DEVICE == "cuda":  # programs of the interpreter run one after another anyway
        again = gradients("triton", tensors, mask, weights, **options)
        assert all(torch.equal(ours, other) for ours, other in zip(found, again, strict=True))
    return found


def random_scale(query):
    """Factors of rows, some of them 0, in the memory order of a layer that computes them from rows of all heads."""
    batch, heads, queries, _ = query.shape
    scale = torch.rand(batch, queries, heads, generator=torch.Generator().manual_seed(2)).transpose(1, 2)
    return scale.masked_fill(scale < 0.1, 0).to(query.dtype)


@pytest.mark.parametrize(
    ("layout", "queries", "keys", "padding"),
    [
        ("aligned", 63, 63, None),
        ("aligned", 1, 40, None),
        ("aligned", 30, 75, BOTH_SIDES),
        ("relative", 37, 37, None),
        ("relative", 1, 40, None),
        ("relative", 10, 63, [(58, 0), (5, 3)]),
    ],
)
def test_causal_bins(random_qkv, padding_mask, layout, queries, keys, padding):
    sizes = {"batch": 1 if padding is None else 2, "heads": 2, "groups": 1, "width": 16, "value_width": 8}
    query, key, value = (x.float() for x in random_qkv(queries=queries, keys=keys, **sizes))
    mask = random_bins(query.shape[:3], layout, shift=0 if layout == "aligned" else -190)
    real = None if padding is None else padding_mask(keys, padding)
    assert_gradients(query, key, value, mask, causal=True, attention_mask=real, row_scale=random_scale(query))


@pytest.mark.parametrize("keys", [540, 1060, 2090])  # bins of 16 and 32, 32 and 64, 64 and 128 keys
def test_rows_of_two_bin_widths_in_one_block(random_qkv, keys):
    sizes = {"batch": 1, "heads": 2 if keys < 1000 else 1, "groups": 1, "width": 8}
    query, key, value = (x.float() for x in random_qkv(queries=75, keys=keys, **sizes))
    mask = random_bins(query.shape[:3], "aligned", share=0.1)
    assert_gradients(query, key, value, mask, causal=True, row_scale=random_scale(query))


def test_tiles_of_bins_of_one_key(random_qkv, padding_mask):
    """64 keys of which a row's bits take two words, before rows whose bins have two keys."""
    sizes = {"batch": 1, "heads": 2, "groups": 1, "width": 8, "value_width": 16}
    query, key, value = (x.float() for x in random_qkv(queries=110, keys=150, **sizes))
    mask = random_bins(query.shape[:3], "aligned", num_bins=96)
    assert_gradients(query, key, value, mask, causal=True, attention_mask=padding_mask(150, [(20, 10)]))


@pytest.mark.parametrize("layout", ["aligned", "relative"])
def test_bidirectional_bins(random_qkv, padding_mask, layout):
    query, key, value = (x.float() for x in random_qkv(heads=1, groups=1, queries=50, width=16, value_width=16))
    real = padding_mask(50, [(10, 3), (50, 0)])  # the second item is empty
    mask = random_bins(query.shape[:3], layout)
    grads = assert_gradients(query, key, value, mask, causal=False, attention_mask=real)
    assert all(not grad[1].any() and not grad[0, :, :10].any() and grad[0, :, 10:47].any() for grad in grads)


@pytest.mark.parametrize(("width", "window", "stride"), [(4, 0, 1), (4, 8, 1), (8, 16, 3), (1, 0, 4)])
def test_causal_runs(random_qkv, padding_mask, width, window, stride):
    query, key, value = (x.float() for x in random_qkv(heads=1, groups=1, queries=30, keys=75, width=16))
    real = padding_mask(75, BOTH_SIDES)
    spans = row_spans(2, 30, 75, causal=True, attention_mask=real)
    mask = random_runs(query.shape[:3], spans, 3, width, window, stride)
    assert_gradients(query, key, value, mask, causal=True, attention_mask=real)


def test_bidirectional_runs_and_grouped_heads(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, queries=33, width=16, value_width=16))
    mask = random_runs(query.shape[:3], row_spans(1, 33, 33, causal=False), 3, 4)
    assert_gradients(query, key, value, mask, causal=False, row_scale=random_scale(query))


@pytest.mark.parametrize("sides", [None, (9, 13)])
@pytest.mark.parametrize("wide", [False, True])
def test_long_lists_are_cut_into_parts(random_qkv, padding_mask, monkeypatch, wide, sides):
    counts, cut = [], triton_parts.cut_tiles
    for module in (triton_wide_rows_keys, triton_backward_keys):
        monkeypatch.setattr(module, "cut_tiles", lambda *args: counts.append(cut(*args)) or counts[-1])
    monkeypatch.setattr("sea_kernels.triton_parts.PART_ROWS", 24)
    monkeypatch.setattr("sea_kernels.triton_parts.PART_MEANS", 1)
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=2, groups=1, queries=111, width=16))
    if wide:  # bins of 4 keys in the last rows, and narrower ones in the first
        monkeypatch.setattr("sea_kernels.triton_wide_lists.MOST_ROWS", 16)
        mask = random_bins(query.shape[:3], "aligned", share=0.05)
        mask.bits.bitwise_or_(1)
    else:
        starts = torch.zeros(1, 2, 111, 2, dtype=torch.int32, device=DEVICE)
        starts[..., 1] = torch.arange(111, device=DEVICE) // 8 * 8
        mask = RunMask(torch.where((starts == 0) & (torch.arange(2, device=DEVICE) == 1), -1, starts), 8)
    real = None if sides is None else padding_mask(111, [sides])
    assert_gradients(query, key, value, mask, causal=True, attention_mask=real, row_scale=random_scale(query))
    parts = counts[0].ends.diff()
    assert parts.max() > 1  # of the first tokens
    assert (parts == 0).any()


def test_two_runs_give_the_same_bits(random_qkv, monkeypatch):
    length = 2000 if DEVICE == "cuda" else 40  # the interpreter runs one program after another: nothing can race there
    monkeypatch.setattr("sea_kernels.triton_parts.PART_ROWS", 64)
    query, key, value = (x.half().to(DEVICE) for x in random_qkv(batch=1, heads=2, groups=1, queries=length, width=16))
    mask = random_bins(query.shape[:3], "aligned")
    mask.bits.bitwise_or_(1)
    options = {"causal": True, "scaling": 0.25}
    first, second = (gradients("triton", [query, key, value], mask, value.new_ones(()), **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("form", ["bins", "runs"])
def test_heads_in_several_slices(random_qkv, monkeypatch, form):
    for module in (triton_backward, triton_wide_rows_keys):
        monkeypatch.setattr(module, "BUFFER_BYTES", 1)
    for module in (triton_entries, triton_wide_lists):
        monkeypatch.setattr(module, "LIST_BYTES", 1)
    monkeypatch.setattr(triton_wide_lists, "MOST_ROWS", 16)
    query, key, value = (x.float() for x in random_qkv(queries=20, width=16))
    mask = random_bins(query.shape[:3], "aligned")
    if form == "runs":
        mask = random_runs(query.shape[:3], row_spans(2, 20, 20, causal=True), 2, 4)
    assert_gradients(query, key, value, mask, causal=True, row_scale=random_scale(query))


def test_rows_without_keys_have_no_gradients(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, queries=20, width=16))
    mask = random_bins(query.shape[:3], "aligned", share=0.5)
    mask.bits[:, :, 3:18] = 0
    grads = assert_gradients(query, key, value, mask, causal=True, row_scale=random_scale(query))
    assert not grads[0][:, :, 3:18].any()
    assert not grads[3][:, :, 3:18].any()


def test_nothing_kept(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, queries=20, width=16))
    mask = BinMask(torch.zeros(1, 4, 20, 1, dtype=torch.int32, device=DEVICE), 32, "aligned")
    assert not any(grad.any() for grad in assert_gradients(query, key, value, mask, causal=True))


@pytest.mark.parametrize("num_bins", [32, 96])
def test_half_precision_odd_width_and_transposed_inputs(random_qkv, num_bins):
    sizes = {"batch": 1, "heads": 2, "groups": 1, "queries": 80, "width": 59, "value_width": 24}
    query, key, value = (x.half().transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(**sizes))
    mask = random_bins(query.shape[:3], "aligned", num_bins=num_bins)
    assert_gradients(query, key, value, mask, causal=True, row_scale=random_scale(query), tolerance=2e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has no bfloat16 and is slow")
@pytest.mark.parametrize("form", ["bins", "relative", "runs", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_inputs(random_qkv, padding_mask, form, dtype):
    length, sizes = 3000, {"heads": 4, "groups": 2, "width": 64, "value_width": 64}
    query, key, value = (x.to(dtype) for x in random_qkv(queries=length, **sizes))
    real = padding_mask(length, [(0, 77), (500, 0)])
    spans = row_spans(2, length, length, causal=True, attention_mask=real)
    if form in ("bins", "relative"):
        layout = "aligned" if form == "bins" else form
        mask = random_bins(query.shape[:3], layout, share=0.1, num_bins=256)
    else:
        mask = random_runs(query.shape[:3], spans, 16, 4, *((8, 3) if form == "window" else ()))
        if form == "runs":  # attention sinks
            mask.starts.masked_fill_(mask.starts == 0, -1)
            mask.starts[..., 0] = torch.where(spans.length.to(DEVICE)[:, None] > 0, 0, -1)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    options = {"causal": True, "attention_mask": real, "row_scale": random_scale(query), "tolerance": tolerance}
    assert_gradients(query, key, value, mask, **options)


def test_full_mask_has_the_gradients_of_dense_attention(random_qkv):
    tensors = random_qkv(batch=1, heads=2, queries=33, width=16, value_width=16)
    tensors = [x.float().to(DEVICE).requires_grad_() for x in tensors]
    mask = BinMask(torch.full((1, 2, 33, 1), -1, dtype=torch.int32, device=DEVICE), 32, "aligned")
    output = sparse_attention(*tensors, mask, causal=True, scaling=0.3, backend="triton")
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.3)
    grads = [torch.autograd.grad(result.square().sum(), tensors) for result in (output, dense)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_keys_that_no_row_keeps_have_no_gradients(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=2, groups=1, queries=63, width=16))
    mask = random_bins(query.shape[:3], "aligned", share=0.03)
    _, grad_key, grad_value = assert_gradients(query, key, value, mask, causal=True)
    own = BinMask(mask.bits.cpu(), 32, "aligned")
    kept = kept_keys(own, row_spans(1, 63, 63, causal=True), 63).any(2).any(1)[0]
    assert 0 < kept.sum() < 63
    assert not grad_key[0, 0, ~kept].any()
    assert torch.equal((grad_value[0, 0] != 0).any(-1).cpu(), kept)


def test_only_what_is_asked_for(random_qkv):
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(batch=1, queries=20, width=16))
    mask = random_bins(query.shape[:3], "aligned")
    options = {"causal": True, "scaling": 0.3, "backend": "triton"}
    sparse_attention(query, key.requires_grad_(), value, mask, **options).sum().backward()
    assert key.grad is not None
    assert query.grad is None
    assert value.grad is None
    with torch.no_grad():
        assert sparse_attention(query, key, value, mask, **options).grad_fn is None


def test_training_stores_one_number_per_row_beside_inputs_and_output(random_qkv):
    query, key, value = (x.float().to(DEVICE).requires_grad_() for x in random_qkv(batch=1, queries=40, width=16))
    mask = random_bins(query.shape[:3], "aligned")
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        output = sparse_attention(query, key, value, mask, causal=True, scaling=0.3, backend="triton")
    own = {x.untyped_storage().data_ptr() for x in (query, key, value, output)}
    assert [x.numel() for x in stored if x.untyped_storage().data_ptr() not in own] == [4 * 40]
