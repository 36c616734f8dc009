"""Tiles of bins that all rows of a block see whole, which the Triton form of attention to bins takes without a mask.

With 32 bins, rows of 129 keys or more have bins of at least 8 keys, and rows of 257, 513, 1025 or more of 16, 32, 64.
"""

import pytest
import torch

from sea_kernels import far_field_attention, sparse_attention, triton_wide_lists, triton_wide_rows
from sea_kernels.masks import BinMask, pack_bits
from sea_kernels.spans import row_spans
from sea_kernels.triton_common import item_spans

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 64  # of a block


def random_bins(shape, share=0.3, shared_rows=16, own=None):
    """Bins that neighbouring rows mostly agree on; every fifth row keeps nothing but bin ``own [T]``."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(*shape[:2], -(-shape[2] // shared_rows), 32, generator=generator) < share
    keep = keep.repeat_interleave(shared_rows, 2)[:, :, : shape[2]]
    keep ^= torch.rand(*shape, 32, generator=generator) < 0.1
    keep[:, :, ::5] = False
    if own is not None:
        keep[:, :, torch.arange(shape[2]), own] = True
    return BinMask(pack_bits(keep).to(DEVICE), 32, "aligned")


def whole_entries(mask, keys, *, causal, attention_mask=None, level=triton_wide_lists.LEAST_LEVEL):
    """The third number of ``meta`` as the lists have it, and computed from the rows' bits. [N * H, blocks]"""
    real = None if attention_mask is None else attention_mask.to(DEVICE)
    lists = triton_wide_lists.WideLists(mask, keys, causal, item_spans(real), ROWS, whole_level=level)
    listed = torch.cat([lists.build(*chunk).meta for chunk in lists.chunks()], 1)[..., 2].cpu()
    batch, heads, queries, _ = mask.bits.shape
    spans = row_spans(batch, queries, keys, causal=causal, attention_mask=attention_mask)
    expected = torch.zeros(batch, heads, lists.blocks, dtype=torch.int32)
    bits = ((mask.bits.cpu() >> torch.arange(32)) & 1) != 0
    for item in range(batch):
        for block in range(lists.blocks):
            rows = slice(block * ROWS, (block + 1) * ROWS)
            length = spans.length[item, rows]
            width = 2 ** torch.stack([length > (32 << step) for step in range(12)]).sum(0)
            seeing = length > 0
            if not seeing.any() or len(set(width[seeing].tolist())) > 1 or int(width[seeing][0]) < 2**level:
                continue
            width, joined = int(width[seeing][0]), max(1, 32 // int(width[seeing][0]))
            kept = bits[item, :, rows][:, seeing].any(1).unflatten(-1, (32 // joined, joined)).any(-1)
            inside = (torch.arange(32 // joined) + 1) * joined * width <= int(length[seeing].min())
            expected[item, :, block] = (kept & inside).sum(-1)
    return listed, expected.flatten(0, 1)


@pytest.fixture
def launches(monkeypatch):
    """Number of blocks of every launch."""
    blocks, original = [], triton_wide_lists.WideLists.build

    def remember(self, first_block, num_blocks):
        blocks.append(num_blocks)
        return original(self, first_block, num_blocks)

    monkeypatch.setattr(triton_wide_lists.WideLists, "build", remember)
    return blocks


def assert_same(query, key, value, mask, *, causal, attention_mask=None, scaling=0.35, tolerance=1e-6):
    """The Triton form's error against float64 is within ``tolerance`` of the result's size."""
    place = {"causal": causal, "scaling": scaling}
    place["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    inputs = [tensor.to(DEVICE) for tensor in (query, key, value)]
    output = sparse_attention(*inputs, mask, backend="triton", **place)
    exact = sparse_attention(*(x.double() for x in inputs), mask, backend="reference", **place)
    assert (output.double() - exact).norm() <= tolerance * exact.norm()
    assert not output[:, :, ::5].any()


@pytest.mark.parametrize(
    ("queries", "keys", "scaling"),
    [
        (70, 200, 0.35),
        (100, 480, 0.35),
        (140, 700, 0.35),
        (100, 1100, 0.35),
        (100, 1100, -0.35),
        (100, 1100, 0.0),
        (150, 1100, 0.35),
    ],
)
def test_causal_rows_behind_a_cache(random_qkv, queries, keys, scaling):
    sizes = {"batch": 1, "heads": 2, "groups": 1, "width": 8, "value_width": 6}
    query, key, value = (x.float() for x in random_qkv(queries=queries, keys=keys, **sizes))
    mask = random_bins(query.shape[:3])
    listed, expected = whole_entries(mask, keys, causal=True)
    assert torch.equal(listed, expected)
    assert (listed > 0).any()
    assert_same(query, key, value, mask, causal=True, scaling=scaling)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_all_rows_of_a_long_input(random_qkv, launches, dtype, tolerance):
    query, key, value = (x.to(dtype) for x in random_qkv(batch=1, heads=1, groups=1, queries=1400, width=16))
    mask = random_bins(query.shape[:3])
    assert_same(query, key, value, mask, causal=True, tolerance=tolerance)
    assert launches == [22]
    listed, expected = whole_entries(mask, 1400, causal=True)
    assert torch.equal(listed, expected)
    # Blocks of 2, 4 and 8 have rows with bins of two widths, and those before the third have smaller ones.
    assert [block for block in range(22) if listed[0, block] == 0] == [0, 1]


def test_smaller_bins_are_not_whole_unless_asked_for(random_qkv):
    mask = random_bins((1, 1, 640))
    listed, expected = whole_entries(mask, 640, causal=True, level=5)
    assert torch.equal(listed, expected)
    assert [block for block in range(10) if listed[0, block] > 0] == [8, 9]


@pytest.mark.parametrize(("keys", "causal"), [(230, True), (700, True), (700, False)])
def test_padding_on_both_sides(random_qkv, padding_mask, keys, causal):
    sizes = {"batch": 3, "heads": 1, "groups": 1, "width": 8, "value_width": 8}
    queries = 70 if keys == 230 else 150 if causal else keys
    query, key, value = (x.float() for x in random_qkv(queries=queries, keys=keys, **sizes))
    real = padding_mask(keys, [(31, 0), (20, 37), (keys, 0)])
    mask = random_bins(query.shape[:3])
    listed, expected = whole_entries(mask, keys, causal=causal, attention_mask=real)
    assert torch.equal(listed, expected)
    assert (listed > 0).any()
    query[~real[:, None, keys - queries :].expand(query.shape[:3])] = float("nan")  # padding rows never matter
    assert_same(query, key, value, mask, causal=causal, attention_mask=real)


@pytest.mark.parametrize("keys", [200, 400, 600, 1030])
def test_bidirectional_rows(random_qkv, launches, keys):
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=keys, width=8))
    mask = random_bins(query.shape[:3], share=0.2)
    assert_same(query, key, value, mask, causal=False)
    assert launches == [-(-keys // ROWS)]
    listed, expected = whole_entries(mask, keys, causal=False)
    assert torch.equal(listed, expected)
    assert (listed > 0).all()


@pytest.mark.parametrize("keys", [400, 700])
def test_rows_without_64_keys_at_a_time(random_qkv, keys):
    """Wide rows take smaller blocks, and 32 keys at a time."""
    query, key, value = (x.half() for x in random_qkv(batch=1, heads=2, groups=1, queries=40, keys=keys, width=96))
    assert_same(query, key, value, random_bins(query.shape[:3]), causal=True, tolerance=1e-3)


def test_rows_far_apart(random_qkv, monkeypatch):
    monkeypatch.setattr(triton_wide_rows, "MOST_STRIDE", 8)
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=2, groups=2, queries=40, keys=480, width=8))
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    assert_same(query, key, value, random_bins(query.shape[:3]), causal=True)


def test_several_launches(random_qkv, launches, monkeypatch):
    monkeypatch.setattr(triton_wide_lists, "LIST_BYTES", 1)
    query, key, value = (x.float() for x in random_qkv(batch=1, heads=1, groups=1, queries=200, keys=1100, width=8))
    assert_same(query, key, value, random_bins(query.shape[:3]), causal=True)
    assert launches == [1, 1, 1, 1]


@pytest.mark.parametrize(("queries", "keys"), [(60, 500), (70, 640), (60, 1200)])
def test_far_field_joins_what_the_rows_have(random_qkv, launches, queries, keys):
    sizes = {"batch": 1, "heads": 2, "groups": 1, "width": 16, "value_width": 8}
    query, key, value = (x.float().to(DEVICE) for x in random_qkv(queries=queries, keys=keys, **sizes))
    width = {500: 16, 640: 32, 1200: 64}[keys]
    mask = random_bins(query.shape[:3], own=torch.arange(keys - queries, keys) // width)
    centre = 0.3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    place = {"centre": centre, "causal": True, "scaling": 0.25}
    output = far_field_attention(query, key, value, mask, None, backend="triton", **place)
    exact = [x.double() for x in (query, key, value)]
    exact = far_field_attention(*exact, mask, None, backend="reference", **place)
    assert (output.double() - exact).norm() <= 1e-6 * exact.norm()
    assert launches == [-(-queries // ROWS)]


def test_keys_behind_a_block_are_not_read(random_qkv):
    """In bins of 128 keys, 64 rows see nothing of the second half of the bin that they begin."""
    query, key, value = random_qkv(batch=1, heads=1, groups=1, queries=128, keys=2176, width=8)
    query, key, value = (x.detach().float().to(DEVICE) for x in (query, key, value))
    keep = torch.zeros(1, 1, 128, 32, dtype=torch.bool)
    keep[..., [0, 16]] = True
    mask = BinMask(pack_bits(keep).to(DEVICE), 32, "aligned")
    value[:, :, 2112:] = float("nan")
    query.requires_grad_()
    output = sparse_attention(query, key, value, mask, causal=True, scaling=0.35, backend="triton")
    assert output[:, :, :64].isfinite().all()
    grad = torch.autograd.grad(output[:, :, :64].square().sum(), query)[0]
    assert grad[:, :, :64].isfinite().all()
    assert grad.any()


def assert_same_gradients(
    query, key, value, mask, *, causal, attention_mask=None, row_scale=None, scaling=0.35, tolerance=2e-6
):
    """Every gradient's error against float64 is within ``tolerance`` of its size."""
    place = {"causal": causal, "scaling": scaling}
    place["attention_mask"] = None if attention_mask is None else attention_mask.to(DEVICE)
    tensors = [x.to(DEVICE) for x in (query, key, value, row_scale) if x is not None]
    weights = torch.randn(*query.shape[:3], value.shape[-1], generator=torch.Generator().manual_seed(2)).to(DEVICE)
    grads = []
    for backend, dtype in (("triton", query.dtype), ("reference", torch.float64)):
        inputs = [(x if backend == "triton" else x.to(dtype).nan_to_num()).detach().requires_grad_() for x in tensors]
        scale = inputs[3] if row_scale is not None else None
        output = sparse_attention(*inputs[:3], mask, row_scale=scale, backend=backend, **place)
        grads.append(torch.autograd.grad(output, inputs, weights.to(query.dtype).to(dtype)))
    for ours, exact in zip(*grads, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
    assert not grads[0][0][:, :, ::5].any()


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dtype", "tolerance"),
    [
        (40, 200, 2, torch.float32, 2e-6),  # bins of 8 keys
        (40, 480, 1, torch.float32, 2e-6),  # of 16
        (80, 700, 2, torch.float32, 2e-6),  # of 32
        (200, 1180, 1, torch.float32, 2e-6),  # of 32 in the first rows, then of 64
        (70, 2120, 1, torch.float16, 2e-3),  # of 128
    ],
)
def test_gradients_behind_a_cache(random_qkv, launches, monkeypatch, queries, keys, heads, dtype, tolerance):
    monkeypatch.setattr("sea_kernels.triton_parts.PART_ROWS", 64)  # a part may begin and end in lists of any kind
    monkeypatch.setattr("sea_kernels.triton_parts.PART_MEANS", 1)
    sizes = {"batch": 1, "heads": heads, "groups": 1, "width": 8, "value_width": 6}
    query, key, value = (x.to(dtype) for x in random_qkv(queries=queries, keys=keys, **sizes))
    scale = torch.rand(query.shape[:3], generator=torch.Generator().manual_seed(3)).to(dtype)
    mask = random_bins(query.shape[:3], share=0.1)
    assert_same_gradients(query, key, value, mask, causal=True, row_scale=scale, tolerance=tolerance)
    assert launches == [-(-queries // ROWS)] * 2  # of both passes of the queries, and of the gradient of the keys


def test_gradients_with_negative_scores_in_several_launches(random_qkv, launches, monkeypatch):
    capacity = 2 * 32 + triton_wide_lists.SPREAD
    monkeypatch.setattr(triton_wide_lists, "LIST_BYTES", 4 * capacity * 2)  # blocks by twos
    query, key, value = (x.half() for x in random_qkv(batch=1, heads=1, groups=1, queries=140, keys=330, width=8))
    assert_same_gradients(query, key, value, random_bins(query.shape[:3]), causal=True, scaling=-0.35, tolerance=2e-3)
    assert launches == [2, 1] * 2


def test_gradients_of_rows_that_take_32_keys_at_a_time(random_qkv, launches):
    query, key, value = (x.half() for x in random_qkv(batch=1, heads=1, groups=1, queries=40, keys=560, width=96))
    assert_same_gradients(query, key, value, random_bins(query.shape[:3]), causal=True, tolerance=3e-3)
    assert launches == [2, 1, 2]  # the gradient of wide queries takes larger blocks, and has lists of its own


@pytest.mark.parametrize(("causal", "queries"), [(True, 70), (False, 550)])
def test_gradients_with_padding_on_both_sides(random_qkv, padding_mask, causal, queries):
    sizes = {"batch": 1, "heads": 1, "groups": 1, "width": 4, "value_width": 4}
    query, key, value = (x.float() for x in random_qkv(queries=queries, keys=550, **sizes))
    real = padding_mask(550, [(21, 9)])
    query[~real[:, None, 550 - queries :]] = float("nan")  # padding rows never matter
    assert_same_gradients(query, key, value, random_bins(query.shape[:3]), causal=causal, attention_mask=real)
