"""Sparse attention against dense attention under the same mask, by hand, and against the published numbers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sea_kernels import chunks, sparse_attention
from sea_kernels.chunks import CHUNK_ELEMENTS, row_chunks
from sea_kernels.masks import BinMask, RunMask, kept_keys, pack_bits
from sea_kernels.spans import row_spans
from sea_kernels.sparse_attention import reference

SCALING = 0.6


@pytest.fixture
def small_chunks(monkeypatch):
    """Row chunks of two rows, so that small inputs take the path of long ones."""

    def two_rows(num_rows, elements_per_row):
        return [slice(first, min(first + 2, num_rows)) for first in range(0, num_rows, 2)]

    monkeypatch.setattr(reference, "row_chunks", two_rows)


def random_bins(batch, heads, queries, *, layout, density=0.4):
    keep = torch.rand(batch, heads, queries, 32, generator=torch.Generator().manual_seed(2)) < density
    return BinMask(pack_bits(keep), 32, layout)


def random_runs(batch, heads, queries, keys, *, window=2):
    """Up to three runs of two keys for every row, anywhere before its window."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.full((batch, heads, queries, 3), -1, dtype=torch.int32)
    for row in range(queries):
        runs = torch.arange(0, max(0, (keys - queries + row) // 2 * 2 - window), 2)
        for item in range(batch):
            for head in range(heads):
                chosen = runs[torch.randperm(len(runs), generator=generator)[:3]].sort().values
                starts[item, head, row, : len(chosen)] = chosen
    return RunMask(starts, width=2, window=window)


def dense(query, key, value, mask, *, causal, attention_mask=None, row_scale=None):
    """The same through PyTorch's dense attention with a T x S mask; rows that keep nothing are set to 0."""
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    spans = row_spans(batch, queries, keys, causal=causal, attention_mask=attention_mask)
    keep = kept_keys(mask, spans, keys)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    empty = ~keep.any(-1, keepdim=True)
    output = scaled_dot_product_attention(query, key, value, attn_mask=keep | empty, scale=SCALING)
    output = output.masked_fill(empty, 0)
    return output if row_scale is None else row_scale[..., None] * output


@pytest.mark.parametrize("layout", ["relative", "aligned"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("causal", "queries", "keys"), [(True, 37, 37), (True, 5, 41), (True, 1, 1), (False, 37, 37)])
def test_bins_equal_dense_attention_under_the_same_mask(
    random_qkv, small_chunks, layout, groups, causal, queries, keys
):
    query, key, value = random_qkv(groups=groups, queries=queries, keys=keys)
    mask = random_bins(2, 4, queries, layout=layout)
    scale = torch.rand(2, 4, queries, dtype=torch.float64)
    output = sparse_attention(query, key, value, mask, causal=causal, scaling=SCALING, row_scale=scale)
    expected = dense(query, key, value, mask, causal=causal, row_scale=scale)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (5, 41)])
@pytest.mark.parametrize("window", [0, 4])
def test_runs_equal_dense_attention_under_the_same_mask(random_qkv, small_chunks, queries, keys, window):
    query, key, value = random_qkv(queries=queries, keys=keys)
    mask = random_runs(2, 4, queries, keys, window=window)
    output = sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    torch.testing.assert_close(output, dense(query, key, value, mask, causal=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_everything_kept_is_dense_attention(random_qkv, small_chunks, causal):
    query, key, value = random_qkv(queries=45, groups=4)
    mask = BinMask(torch.full((2, 4, 45, 1), -1, dtype=torch.int32), 32, "relative")
    output = sparse_attention(query, key, value, mask, causal=causal, scaling=SCALING)
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=SCALING)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """Row 2 keeps keys 0 and 2 with scores 0 and log 3, row 1 keeps key 0 alone, row 0 nothing."""
    query = torch.tensor([1.0, 1.0, 2.0])[None, None, :, None]
    key = torch.tensor([0.0, 5.0, float(torch.tensor(3.0).log())])[None, None, :, None]
    value = torch.tensor([4.0, 100.0, 8.0])[None, None, :, None]
    keep = torch.zeros(1, 1, 3, 32, dtype=torch.bool)
    keep[0, 0, 1, 0] = True  # aligned bins of one key: the bin's number is the key's
    keep[0, 0, 2, [0, 2]] = True
    scale = torch.tensor([[[1.0, 0.5, 1.0]]])
    mask = BinMask(pack_bits(keep), 32, "aligned")
    output = sparse_attention(query, key, value, mask, causal=True, scaling=0.5, row_scale=scale)
    torch.testing.assert_close(output.flatten(), torch.tensor([0.0, 2.0, 7.0]))  # (1 * 4 + 3 * 8) / 4


def test_published_numbers(golden):
    mask, length = golden["attention_mask"], golden["q"].shape[2]
    kept = BinMask(pack_bits(golden["partial_attention_mask_before_interp"] >= 0), golden["num_bins"], "relative")
    scales = golden["estimated_scales"].sigmoid()

    def attend(value, row_scale=None):
        return sparse_attention(
            golden["q"],
            golden["k"],
            value,
            kept,
            causal=golden["causal"],
            scaling=golden["scaling"],
            attention_mask=mask,
            row_scale=row_scale,
        )

    matrix = attend(torch.eye(length).expand(*golden["v"].shape[:2], -1, -1))
    real = mask[:, None].expand(-1, matrix.shape[1], -1)
    torch.testing.assert_close(matrix[real], golden["attention_matrix"][real], rtol=0, atol=1e-6)
    mix = scales[..., 1:]
    context = mix * attend(golden["v"], scales[..., 0]) + (1 - mix) * golden["average_context_layer"]
    expected = golden["context"].unflatten(-1, (matrix.shape[1], -1)).transpose(1, 2)
    torch.testing.assert_close(context[real], expected[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("causal", "form"), [(True, "relative"), (True, "aligned"), (True, "runs"), (False, "relative"), (False, "aligned")]
)
@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 6), (2, 3)])
def test_padded_equals_unpadded(random_qkv, padding_mask, small_chunks, causal, left, right, form):
    query, key, value = random_qkv(batch=1, queries=30)
    real = slice(left, 30 - right)
    if form == "runs":
        mask = random_runs(1, 4, 30 - left - right, 30 - left - right)
        starts = torch.full((1, 4, 30, 3), 0, dtype=torch.int32)
        starts[:, :, real] = mask.starts
        padded = RunMask(starts, width=2, window=2)
    else:
        padded = random_bins(1, 4, 30, layout=form)
        mask = BinMask(padded.bits[:, :, real], 32, form)
    output = sparse_attention(
        query, key, value, padded, causal=causal, scaling=SCALING, attention_mask=padding_mask(30, [(left, right)])
    )
    rows = (x[:, :, real] for x in (query, key, value))
    expected = sparse_attention(*rows, mask, causal=causal, scaling=SCALING)
    torch.testing.assert_close(output[:, :, real], expected, rtol=1e-12, atol=1e-12)
    assert (output[:, :, :left] == 0).all()
    assert (output[:, :, 30 - right :] == 0).all()


def test_rows_that_keep_nothing_give_zeros_and_finite_gradients(random_qkv, padding_mask, small_chunks):
    inputs = [x.requires_grad_() for x in random_qkv(queries=6)]
    scale = torch.ones(2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = random_bins(2, 4, 6, layout="relative", density=1.0)
    mask.bits[0, 1, 3] = 0
    sides = padding_mask(6, [(0, 2), (6, 0)])
    output = sparse_attention(*inputs, mask, causal=True, scaling=SCALING, attention_mask=sides, row_scale=scale)
    output.sum().backward()
    assert (output[0, 1, 3] == 0).all()
    assert (output[0, :, 4:] == 0).all()
    assert (output[1] == 0).all()
    assert (output[0, 0, :4] != 0).all()
    for tensor in (*inputs, scale):
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[1] == 0).all()


@pytest.mark.parametrize("changed", [1, 7, 20])
@pytest.mark.parametrize("form", ["bins", "runs"])
def test_no_row_sees_a_later_key(random_qkv, changed, form):
    query, key, value = (x.float() for x in random_qkv(queries=21))
    everything = BinMask(torch.full((2, 4, 21, 1), -1, dtype=torch.int32), 32, "aligned")
    mask = everything if form == "bins" else random_runs(2, 4, 21, 21)
    before = sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    key[:, :, changed] += 1
    value[:, :, changed] -= 1
    after = sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    assert torch.equal(after[:, :, :changed], before[:, :, :changed])
    assert not torch.equal(after[:, :, changed], before[:, :, changed])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["relative", "runs"])
def test_gradients(random_qkv, padding_mask, small_chunks, causal, form):
    query, key, value = (x.requires_grad_() for x in random_qkv(heads=2, groups=1, queries=5, width=3, value_width=2))
    scale = torch.rand(2, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = random_bins(2, 2, 5, layout=form, density=0.6) if form == "relative" else random_runs(2, 2, 5, 5, window=0)
    sides = padding_mask(5, [(1, 0), (0, 2)])

    def attend(query, key, value, scale):
        return sparse_attention(
            query, key, value, mask, causal=causal, scaling=SCALING, attention_mask=sides, row_scale=scale
        )

    assert torch.autograd.gradcheck(attend, (query, key, value, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(random_qkv, small_chunks, dtype):
    query, key, value = (x.to(dtype) for x in random_qkv(queries=33))
    mask = random_bins(2, 4, 33, layout="aligned")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    assert output.dtype == dtype
    exact = sparse_attention(query.double(), key.double(), value.double(), mask, causal=True, scaling=SCALING)
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 1000, 16384])
@pytest.mark.parametrize("elements", [1, 1000, 12 * 16384, 2 * CHUNK_ELEMENTS])
def test_row_chunks_cover_every_row_and_are_bounded(num_rows, elements):
    parts = row_chunks(num_rows, elements)
    assert [row for chunk in parts for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
    assert all((chunk.stop - chunk.start) * elements <= max(CHUNK_ELEMENTS, elements) for chunk in parts)


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (80, 80), (10, 80)])
def test_scores_of_one_chunk_are_bounded(random_qkv, monkeypatch, queries, keys):
    query, key, value = random_qkv(queries=queries, keys=keys)
    mask = random_bins(2, 4, queries, layout="aligned")
    expected = sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    sizes = []

    def recorded(*args):
        keep = kept_keys(*args)
        sizes.append(keep.numel())
        return keep

    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(reference, "kept_keys", recorded)
    output = sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    assert max(sizes) <= 2000
    assert len(sizes) <= 2 * 2 * 4 * queries * keys / 2000  # and they are no smaller than they need to be
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_training_stores_nothing_of_rows_times_keys(random_qkv, small_chunks):
    query, key, value = (x.requires_grad_() for x in random_qkv(batch=1, heads=2, groups=1, queries=256))
    mask = random_bins(1, 2, 256, layout="aligned")
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        sparse_attention(query, key, value, mask, causal=True, scaling=SCALING)
    own = {x.untyped_storage().data_ptr() for x in (query, key, value, mask.bits)}
    extra = sum(x.numel() for x in stored if x.untyped_storage().data_ptr() not in own)
    assert extra <= 2 * query.numel()  # two rows of scores alone would be 1024, all of them 131072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(2, 2, 6, 5).double()}, "value has shape"),
        ({"query": torch.ones(2, 3, 7, 5).double()}, "query has 3 heads, expected a multiple of key's 2"),
        ({"row_scale": torch.ones(2, 4, 1)}, r"row_scale has shape \(2, 4, 1\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2)}, "attention_mask has a gap in item 0"),
        ({"mask": BinMask(torch.zeros(2, 4, 7, 2).int(), 32, "aligned")}, "mask.bits has shape"),
        ({"mask": BinMask(torch.zeros(2, 4, 7, 1), 32, "aligned")}, "mask.bits.dtype is torch.float32"),
        ({"mask": BinMask(torch.zeros(2, 4, 7, 1).int(), 33, "aligned")}, "num_bins is 33"),
        ({"mask": BinMask(torch.zeros(2, 4, 7, 1).int(), 32, "even")}, "mask.layout is 'even'"),
        ({"mask": RunMask(torch.zeros(2, 4, 6, 1).int(), 2)}, "mask.starts has shape"),
        ({"mask": RunMask(torch.zeros(2, 4, 7, 1).int(), 3)}, "mask.width is 3, expected a power of two"),
        ({"mask": RunMask(torch.zeros(2, 4, 7, 1).int(), 4, window=6)}, "mask.window is 6"),
        ({"mask": RunMask(torch.zeros(2, 4, 7, 1).int(), 4, stride=0)}, "mask.stride is 0"),
        ({"mask": RunMask(torch.zeros(2, 4, 7, 1).int(), 4, window=8), "causal": False}, "mask has window 8"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_errors_name_the_argument(random_qkv, change, message):
    arguments = dict(zip(("query", "key", "value"), random_qkv(), strict=True))
    arguments |= {"mask": random_bins(2, 4, 7, layout="relative"), "causal": True, "scaling": 1.0}
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments | change)


def test_a_mask_of_another_type_is_refused(random_qkv):
    with pytest.raises(TypeError, match="mask is a Tensor, expected a BinMask or a RunMask"):
        sparse_attention(*random_qkv(), torch.ones(2, 4, 7, 7), causal=True, scaling=1.0)
