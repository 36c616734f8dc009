"""The far field against a naive formula row by row, against dense attention where both are equal, and by hand."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sea_kernels import count_pooled, far_field_attention, pooled_selection, second_look
from sea_kernels.far_field import reference
from sea_kernels.masks import BinMask, RunMask, kept_keys, pack_bits, unpack_bits
from sea_kernels.spans import row_spans

SCALING = 0.6
BINS = 32
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Row chunks of 16 rows, so that small inputs take the path of long ones."""

    def few_rows(num_rows, elements_per_row):
        return [slice(first, min(first + 16, num_rows)) for first in range(0, num_rows, 16)]

    monkeypatch.setattr(reference, "row_chunks", few_rows)


def centre_of(heads=4, width=5):
    return torch.randn(heads, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def masks_of(query, key, looks, *, causal, attention_mask=None, k=20, width=2, window=0, stride=1):
    """Kept keys, and the first look's bins if there are two looks, as the layers select them."""
    heads = query.shape[1]
    place = {"causal": causal, "scaling": SCALING, "attention_mask": attention_mask, "keep_first": True}
    weights = {"mean_weight": torch.full((heads,), 0.5), "bound_weight": torch.full((heads,), 0.5)}
    bins = pooled_selection(query, key, k=k * looks, num_bins=BINS, keep_own=True, stride=stride, **weights, **place)
    if looks == 1:
        return bins, None
    return second_look(query, key, bins, k=k, width=width, window=window, stride=stride, **weights, **place), bins


def naive(query, key, value, kept, coarse, centre, *, causal, attention_mask=None):
    """Every row alone: its parts as a list of (score, value), then one softmax. Every key is in one part."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    spans = row_spans(batch, queries, keys, causal=causal, attention_mask=attention_mask)
    dense = kept_keys(kept, spans, keys)
    bits = None if coarse is None else unpack_bits(coarse.bits, BINS)
    output = torch.zeros(batch, heads, queries, value.shape[-1], dtype=query.dtype)
    for item in range(batch):
        first = int(spans.start[item])
        for head in range(heads):
            group = head // (heads // key.shape[1])
            for row in range(queries):
                length = int(spans.length[item, row])
                if not length:
                    continue
                looked = None if bits is None else bits[item, head, row]
                near = dense[item, head, row, first : first + length].nonzero().flatten().tolist()
                runs = far_runs(near, length, looked, None if coarse is None else kept.width)
                assert sorted([*near, *(place for run in runs for place in run)]) == list(range(length))
                scores, values = [], []
                q, u = SCALING * query[item, head, row], centre[head]
                for run in [[place] for place in near] + runs:
                    k, v = (x[item, group, first:][run] for x in (key, value))
                    mass = (k @ u).exp()
                    share = mass / mass.sum()
                    alone = len(run) == 1
                    scores.append(q @ k[0] if alone else (q - u) @ (share @ k) + mass.sum().log())
                    values.append(share @ v)
                output[item, head, row] = torch.stack(scores).softmax(-1) @ torch.stack(values)
    return output


def far_runs(near, length, looked, width):
    """Runs of neighbours that are pooled; ``looked`` says which bins were split into runs of ``width``."""
    bin_width = 1
    while BINS * bin_width < length:
        bin_width *= 2
    runs, near = [], set(near)
    for index, start in enumerate(range(0, length, bin_width)):
        inside = list(range(start, min(start + bin_width, length)))
        split = looked is not None and width < bin_width and (looked[index] or near & set(inside))
        step = width if split else bin_width
        pieces = [inside[place : place + step] for place in range(0, len(inside), step)]
        runs += [piece for piece in pieces if not near & set(piece)]
    return runs


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize(("causal", "queries", "keys"), [(True, 75, 75), (True, 20, 140), (False, 70, 70)])
def test_it_is_the_naive_formula(random_qkv, looks, causal, queries, keys):
    query, key, value = random_qkv(queries=queries, keys=keys)
    kept, coarse = masks_of(query, key, looks, causal=causal)
    output = far_field_attention(query, key, value, kept, coarse, centre=centre_of(), causal=causal, scaling=SCALING)
    torch.testing.assert_close(output, naive(query, key, value, kept, coarse, centre_of(), causal=causal), **EXACT)


@pytest.mark.parametrize(
    "options",
    [{"width": 8}, {"width": 2, "window": 8}, {"width": 4, "stride": 4}, {"width": 2, "window": 6, "stride": 8}],
)
def test_wide_runs_windows_and_shared_rows_leave_no_key_out(random_qkv, options):
    query, key, value = random_qkv(batch=1, queries=140)
    kept, coarse = masks_of(query, key, 2, causal=True, **options)
    output = far_field_attention(query, key, value, kept, coarse, centre=centre_of(), causal=True, scaling=SCALING)
    torch.testing.assert_close(output, naive(query, key, value, kept, coarse, centre_of(), causal=True), **EXACT)


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_equals_unpadded_and_padding_rows_are_zero(random_qkv, padding_mask, looks, causal):
    query, key, value = random_qkv(batch=3, queries=90)
    mask = padding_mask(90, [(0, 20), (30, 0), (7, 9)])
    kept, coarse = masks_of(query, key, looks, causal=causal, attention_mask=mask)
    options = {"centre": centre_of(), "causal": causal, "scaling": SCALING}
    output = far_field_attention(query, key, value, kept, coarse, attention_mask=mask, **options)
    assert not output.transpose(1, 2)[~mask].any()
    expected = naive(query, key, value, kept, coarse, centre_of(), causal=causal, attention_mask=mask)
    torch.testing.assert_close(output, expected, **EXACT)
    for item in range(3):
        alone = [x[item : item + 1, :, mask[item]] for x in (query, key, value)]
        masks = masks_of(*alone[:2], looks, causal=causal)
        torch.testing.assert_close(
            output[item : item + 1, :, mask[item]], far_field_attention(*alone, *masks, **options)
        )


def dense(query, key, value, causal):
    return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=SCALING, enable_gqa=True)


@pytest.mark.parametrize("causal", [True, False])
def test_one_key_per_bin_is_dense_attention_whatever_is_kept(random_qkv, causal):
    query, key, value = random_qkv(queries=BINS)
    options = {"centre": centre_of(), "causal": causal, "scaling": SCALING}
    expected = dense(query, key, value, causal)
    for looks in (1, 2):
        kept = masks_of(query, key, looks, causal=causal, k=2)
        torch.testing.assert_close(far_field_attention(query, key, value, *kept, **options), expected, **EXACT)
    if not causal:
        nothing = BinMask(torch.zeros(2, 4, BINS, 1, dtype=torch.int32), BINS, "aligned")
        torch.testing.assert_close(far_field_attention(query, key, value, nothing, **options), expected, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_keeping_everything_is_dense_attention(random_qkv, causal):
    query, key, value = random_qkv(queries=100)
    everything = BinMask(torch.full((2, 4, 100, 1), -1, dtype=torch.int32), BINS, "aligned")
    options = {"centre": centre_of(), "causal": causal, "scaling": SCALING}
    output = far_field_attention(query, key, value, everything, **options)
    torch.testing.assert_close(output, dense(query, key, value, causal), **EXACT)


def test_bins_are_exact_for_a_query_at_the_centre(random_qkv):
    query, key, value = random_qkv(batch=1, queries=100)
    kept, coarse = masks_of(query, key, 2, causal=True, k=8)
    query = (centre_of() / SCALING)[None, :, None].expand_as(query)
    output = far_field_attention(query, key, value, kept, coarse, centre=centre_of(), causal=True, scaling=SCALING)
    torch.testing.assert_close(output, dense(query, key, value, True), **EXACT)


def test_two_bins_by_hand():
    """33 keys make bins of 2. The last row keeps its own bin, of one key; centre 0 pools means with log 2."""
    key = torch.zeros(1, 1, 33, 1, dtype=torch.float64)
    key[..., :4, 0] = torch.tensor([1.0, 3.0, -1.0, 0.0])
    value = torch.arange(33.0, dtype=torch.float64).view(1, 1, 33, 1)
    kept = BinMask(pack_bits((torch.arange(BINS) == 16).view(1, 1, 1, BINS)), BINS, "aligned")
    query = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    output = far_field_attention(query, key, value, kept, centre=torch.zeros(1, 1), causal=True, scaling=1.0)
    far = [2 * math.exp(0.5 * 2), 2 * math.exp(0.5 * -0.5), *[2.0] * 14]  # means of keys 2, -0.5, 0, …
    middle = [2 * index + 0.5 for index in range(16)]
    expected = (sum(f * m for f, m in zip(far, middle, strict=True)) + 32) / (sum(far) + 1)
    assert output.item() == pytest.approx(expected, rel=1e-12)

    # Around u = ln 3 the bin of keys 1 and 3 weighs them 3 to 27: its key is 2.8, its value 0.9, its mass 30.
    centre = torch.full((1, 1), math.log(3), dtype=torch.float64)
    output = far_field_attention(query, key, value, kept, centre=centre, causal=True, scaling=1.0)
    offset = 0.5 - math.log(3)
    far = [30 * math.exp(2.8 * offset), 4 / 3 * math.exp(-0.25 * offset), *[2.0] * 14]  # -1 and 0: a third to one
    middle[:2] = [0.9, 2.75]
    expected = (sum(f * m for f, m in zip(far, middle, strict=True)) + 32) / (sum(far) + 1)
    assert output.item() == pytest.approx(expected, rel=1e-12)


def test_no_row_sees_the_future(random_qkv):
    query, key, value = random_qkv(queries=100)
    kept, coarse = masks_of(query, key, 2, causal=True)
    options = {"centre": centre_of(), "causal": True, "scaling": SCALING}
    before = far_field_attention(query, key, value, kept, coarse, **options)
    key[:, :, 61:] += 5
    value[:, :, 61:] -= 3
    after = far_field_attention(query, key, value, kept, coarse, **options)
    assert torch.equal(before[:, :, :61], after[:, :, :61])
    assert (before[:, :, 61:] != after[:, :, 61:]).any(-1).all()


@pytest.mark.parametrize("looks", [1, 2])
def test_large_scores_do_not_overflow(random_qkv, looks):
    query, key, value = (x.float() for x in random_qkv(queries=100))
    kept, coarse = masks_of(query, key, looks, causal=True)
    output = far_field_attention(
        query, 100 * key, value, kept, coarse, centre=100 * centre_of(), causal=True, scaling=SCALING
    )
    assert output.isfinite().all()
    assert output.abs().max() <= value.abs().max() * (1 + 1e-5)


@pytest.mark.parametrize("looks", [1, 2])
def test_gradients_are_those_of_finite_differences(random_qkv, padding_mask, looks):
    query, key, value = random_qkv(batch=1, heads=2, groups=1, queries=18, keys=68, width=2, value_width=1)
    mask = padding_mask(68, [(2, 1)])
    masks = masks_of(query, key, looks, causal=True, attention_mask=mask, k=8)
    inputs = [x.requires_grad_() for x in (query, key, value, centre_of(2, 2))]

    def attend(query, key, value, centre):
        return far_field_attention(
            query, key, value, *masks, centre=centre, causal=True, scaling=SCALING, attention_mask=mask
        )

    assert torch.autograd.gradcheck(attend, inputs)


def test_half_precision_is_computed_in_float32(random_qkv):
    tensors = [x.bfloat16() for x in random_qkv(queries=100)]
    kept, coarse = masks_of(*tensors[:2], 2, causal=True)
    options = {"centre": centre_of().bfloat16(), "causal": True, "scaling": SCALING}
    output = far_field_attention(*tensors, kept, coarse, **options)
    assert output.dtype == torch.bfloat16
    options["centre"] = options["centre"].float()
    wide = far_field_attention(*(x.float() for x in tensors), kept, coarse, **options)
    assert torch.equal(output, wide.bfloat16())


def test_training_stores_nothing_of_rows_times_keys(random_qkv):
    inputs = [x.requires_grad_() for x in random_qkv(batch=1, heads=2, groups=1, queries=512)]
    masks = masks_of(*inputs[:2], 2, causal=True, width=4)
    stored = {}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        far_field_attention(*inputs, *masks, centre=centre_of(2), causal=True, scaling=SCALING)
    assert sum(stored.values()) < 24 * inputs[0].numel()  # scores of all rows alone would be 102 times as many


def runs(rows=7, starts=0):
    return RunMask(torch.full((2, 4, rows, 1), starts, dtype=torch.int32), width=8)


def bins(rows=7, layout="aligned", bits=-1):
    return BinMask(torch.full((2, 4, rows, 1), bits, dtype=torch.int32), BINS, layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": runs()}, "coarse is a NoneType beside a RunMask, expected a BinMask beside a RunMask"),
        ({"coarse": bins()}, "coarse is a BinMask beside a BinMask"),
        ({"kept": bins(layout="relative")}, "kept.layout is 'relative', expected 'aligned'"),
        ({"kept": runs(), "coarse": bins(layout="relative")}, "coarse.layout is 'relative'"),
        ({"kept": runs(), "coarse": bins(rows=6)}, r"mask.bits has shape \(2, 4, 6, 1\)"),
        ({"kept": bins(bits=1)}, "leaves out a causal row's own position .first in item 0, head 0, 2 keys long"),
        ({"kept": runs(starts=-1), "coarse": bins()}, "leaves out a causal row's own position"),
        ({"centre": torch.zeros(2, 5)}, r"centre has shape \(2, 5\), expected \[num_heads, head_dim\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2)}, "attention_mask has a gap in item 0"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_errors_name_the_argument(random_qkv, change, message):
    arguments = dict(zip(("query", "key", "value"), random_qkv(), strict=True))
    arguments |= {"kept": bins(), "centre": centre_of(), "causal": True, "scaling": 1.0}
    with pytest.raises(ValueError, match=message):
        far_field_attention(**arguments | change)


def test_triton_is_refused(random_qkv):
    with pytest.raises(NotImplementedError, match="far_field_attention: backend='triton' was asked for"):
        far_field_attention(*random_qkv(), bins(), centre=centre_of(), causal=True, scaling=1.0, backend="triton")


def test_pooled_runs_are_counted_by_hand():
    """The last of 40 rows, 20 bins of two keys: it keeps 3 bins, or two single keys inside 4 bins of the first look."""
    bins = torch.zeros(1, 1, 1, BINS, dtype=torch.bool)
    bins[..., [0, 3, 19]] = True
    assert count_pooled(BinMask(pack_bits(bins), BINS, "aligned"), num_keys=40, causal=True).tolist() == [[[17]]]
    bins[..., 7] = True
    coarse = BinMask(pack_bits(bins), BINS, "aligned")
    runs = RunMask(torch.tensor([[[[6, 39]]]], dtype=torch.int32), width=1)
    # 16 bins outside the first look, and 8 keys inside it of which two are kept
    assert count_pooled(runs, coarse, num_keys=40, causal=True).tolist() == [[[16 + 6]]]


def test_padding_rows_count_no_pooled_runs(random_qkv, padding_mask):
    query, key, _ = random_qkv(queries=50, width=5)
    mask = padding_mask(50, [(9, 0), (0, 21)])
    kept, coarse = masks_of(query, key, 2, causal=True, attention_mask=mask)
    counts = count_pooled(kept, coarse, num_keys=50, causal=True, attention_mask=mask)
    assert not counts.transpose(1, 2)[~mask].any()
    alone = [x[1:, :, :29] for x in (query, key)]
    unpadded = count_pooled(*masks_of(*alone, 2, causal=True), num_keys=29, causal=True)
    assert torch.equal(counts[1:, :, :29], unpadded)


@pytest.mark.parametrize(
    ("looks", "causal", "options"),
    [
        (1, True, {}),
        (1, False, {}),
        (2, True, {}),
        (2, False, {}),
        (2, True, {"width": 4}),
        (2, True, {"width": 8, "k": 32}),  # wider than most rows' bins
        (2, True, {"window": 6}),
        (2, True, {"stride": 4}),
        (2, True, {"stride": 4, "width": 8, "k": 32}),
    ],
)
def test_counts_are_of_the_runs_that_attention_takes(random_qkv, padding_mask, looks, causal, options):
    query, key, _ = random_qkv(queries=150, width=5)
    mask = padding_mask(150, [(0, 0), (9, 20)])
    kept, coarse = masks_of(query, key, looks, causal=causal, attention_mask=mask, **options)
    spans = row_spans(2, 150, 150, causal=causal, attention_mask=mask)
    near = kept_keys(kept, spans._replace(start=torch.zeros_like(spans.start)), 150)
    runs = reference._far_runs(near, spans.length, kept, coarse, slice(None))
    taken = torch.stack([far.sum(-1).expand(near.shape[:3]) for _, far in runs]).sum(0)
    assert torch.equal(count_pooled(kept, coarse, num_keys=150, causal=causal, attention_mask=mask), taken)
