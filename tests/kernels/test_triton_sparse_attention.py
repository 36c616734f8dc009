"""The Triton form of sparse attention against the PyTorch form, in the interpreter where there is no GPU."""

import pytest
import torch

from sea_kernels import sparse_attention
from sea_kernels.masks import BinMask, RunMask, pack_bits, window_start
from sea_kernels.spans import row_spans

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH_SIDES = [(31, 0), (0, 21)]


def random_bins(shape, layout, shift=0, share=0.2, num_bins=32):
    keep = torch.rand(*shape, num_bins, generator=torch.Generator().manual_seed(1)) < share
    return BinMask(pack_bits(keep).to(DEVICE), num_bins, layout, shift)


def random_runs(shape, spans, slots, width, window=0, stride=1):
    """Runs anywhere before the row's window (before its end, where it has none), some slots empty."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.full((*shape, slots), -1, dtype=torch.int32)
    mask = RunMask(starts, width, window, stride)
    windowed = window > 0 or stride > 1
    limit = window_start(spans.position, mask) // width if windowed else (spans.length + width - 1) // width
    for item, head, row in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        room = int(limit[item, row]) if spans.length[item, row] > 0 else 0
        count = min(room, int(torch.randint(0, slots + 1, (), generator=generator)))
        chosen = torch.randperm(max(room, 0), generator=generator)[:count].sort()[0]
        starts[item, head, row, :count] = (chosen * width).int()
    return RunMask(starts.to(DEVICE), width, window, stride)


def assert_same(query, key, value, mask, *, causal, attention_mask=None, row_scale=None, tolerance=1e-6):
    """The Triton form's error against float64 is within ``tolerance`` of the result's size."""
    rest = {"causal": causal, "scaling": query.shape[-1] ** -0.5, "attention_mask": attention_mask}
    inputs = [tensor.to(DEVICE) for tensor in (query, key, value)]
    scale = None if row_scale is None else row_scale.to(DEVICE)
    rest["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    output = sparse_attention(*inputs, mask, row_scale=scale, backend="triton", **rest)
    exact = sparse_attention(*(x.double() for x in inputs), mask, row_scale=scale, backend="reference", **rest)
    assert output.dtype == query.dtype
    assert (output.double() - exact).norm() <= tolerance * exact.norm()
    return output


@pytest.mark.parametrize("layout", ["aligned", "relative"])
@pytest.mark.parametrize(
    ("queries", "keys", "padding"), [(63, 63, None), (1, 40, None), (20, 20, None), (40, 111, BOTH_SIDES)]
)
def test_causal_bins_match(random_qkv, padding_mask, layout, queries, keys, padding):
    sizes = {"batch": 1 if padding is None else 2, "heads": 2, "groups": 1, "width": 16, "value_width": 8}
    query, key, value = (x.float() for x in random_qkv(queries=queries, keys=keys, **sizes))
    mask = random_bins(query.shape[:3], layout, shift=0 if layout == "aligned" else -190)
    real = None if padding is None else padding_mask(keys, padding)
    scale = torch.rand(query.shape[:3], generator=torch.Generator().manual_seed(2))
    assert_same(query, key, value, mask, causal=True, attention_mask=real, row_scale=scale)


@pytest.mark.parametrize("keys", [540, 1060, 2090])  # bins of 16 and 32 keys, of 32 and 64, of 64 and 128
def test_rows_of_two_bin_widths_in_one_block(random_qkv, keys):
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=2, groups=1, queries=90, keys=keys, width=8))
    assert_same(query, key, value, random_bins(query.shape[:3], "aligned", share=0.1), causal=True)


@pytest.mark.parametrize("layout", ["aligned", "relative"])
def test_bidirectional_bins_match(random_qkv, padding_mask, layout):
    query, key, value = (x.float() for x in random_qkv(heads=2, queries=70, width=16, value_width=16))
    real = padding_mask(70, [(10, 3), (70, 0)])  # the second item is empty
    output = assert_same(query, key, value, random_bins(query.shape[:3], layout), causal=False, attention_mask=real)
    assert not output[1].any()


@pytest.mark.parametrize(("width", "window", "stride"), [(4, 0, 1), (4, 8, 1), (8, 16, 3), (1, 0, 4)])
def test_causal_runs_match(random_qkv, padding_mask, width, window, stride):
    query, key, value = (x.float() for x in random_qkv(heads=2, queries=40, keys=111, width=16, value_width=16))
    real = padding_mask(111, BOTH_SIDES)
    spans = row_spans(2, 40, 111, causal=True, attention_mask=real)
    mask = random_runs(query.shape[:3], spans, 3, width, window, stride)
    assert_same(query, key, value, mask, causal=True, attention_mask=real)


def test_bidirectional_runs_match(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, queries=63, width=16, value_width=16))
    mask = random_runs(query.shape[:3], row_spans(1, 63, 63, causal=False), 5, 4)
    assert_same(query, key, value, mask, causal=False)


def test_runs_that_many_rows_share_count_once(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=64, width=16))
    starts = torch.tensor([0, 8, 16, -1], dtype=torch.int32, device=DEVICE).expand(1, 1, 64, 4)
    starts = torch.where(starts > torch.arange(64, device=DEVICE)[:, None], -1, starts)
    assert_same(query, key, value, RunMask(starts.contiguous(), 4), causal=True)


def test_rows_without_bins_give_zeros(random_qkv):
    query, key, value = (x.float() for x in random_qkv(batch=1, queries=20, width=16))
    mask = BinMask(torch.zeros(1, 4, 20, 1, dtype=torch.int32, device=DEVICE), 32, "aligned")
    assert not assert_same(query, key, value, mask, causal=True).any()


@pytest.mark.parametrize("num_bins", [32, 96])
def test_half_precision_odd_width_and_transposed_inputs(random_qkv, num_bins):
    sizes = {"batch": 1, "queries": 80, "width": 59, "value_width": 24}
    query, key, value = (x.half().transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(**sizes))
    mask = random_bins(query.shape[:3], "aligned", num_bins=num_bins)
    assert_same(query, key, value, mask, causal=True, tolerance=1e-3)


def test_full_mask_is_dense_attention(random_qkv):
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(groups=4, queries=33, width=16, value_width=16))
    mask = BinMask(torch.full((2, 4, 33, 1), -1, dtype=torch.int32, device=DEVICE), 32, "aligned")
    output = sparse_attention(query, key, value, mask, causal=True, scaling=0.3, backend="triton")
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


def test_float64_has_no_kernel(random_qkv):
    query, key, value = (tensor.to(DEVICE) for tensor in random_qkv(batch=1))
    with pytest.raises(NotImplementedError, match="no Triton form"):
        sparse_attention(
            query, key, value, random_bins((1, 4, 7), "aligned"), causal=True, scaling=1.0, backend="triton"
        )
