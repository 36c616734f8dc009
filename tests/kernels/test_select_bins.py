"""Grouped top-k: hand-computed cases, the published selection, budgets, ties, forced bins and padding."""

import pytest
import torch

from sea_kernels import chunks, count_keys, select_bins
from sea_kernels.bins import aligned_width, bin_of
from sea_kernels.masks import unpack_bits
from sea_kernels.spans import row_spans

K = 32
SIDES = [(0, 0), (11, 0), (0, 13), (6, 5)]


def random_scores(batch=4, heads=3, queries=40, dtype=torch.float32):
    return torch.randn(batch, heads, queries, K, generator=torch.Generator().manual_seed(4)).to(dtype)


def selected(scores, **arguments):
    return unpack_bits(select_bins(scores, **arguments).bits, K)


def test_published_selection_up_to_ties(golden):
    scores = golden["estimated_attention_probs"]
    kept = selected(
        scores,
        k=golden["wanted"],
        causal=golden["causal"],
        layout="relative",
        grouping=golden["grouping"],
        attention_mask=golden["attention_mask"],
    )
    published = golden["partial_attention_mask_before_interp"] > -1
    if golden["causal"]:  # all heads of a row compete; else all rows of a head
        scores, kept, published = (tensor.transpose(1, 2) for tensor in (scores, kept, published))
    scores, kept, published = (tensor.flatten(2) for tensor in (scores, kept, published))
    assert torch.equal(kept.sum(-1), published.sum(-1))
    # Bins may differ where scores are equal; the scores that were chosen may not.
    assert torch.equal(*(scores.masked_fill(~chosen, -1).sort(-1)[0] for chosen in (kept, published)))


def test_rounding_of_the_budget_by_hand():
    # One head, K = 32, k = 3. Row t has L = t + 1 keys and keeps round(3 * 32 / L) of its 32 bins:
    # L = 1, 2 and 3 allow all 32; L = 5: 19.2; L = 6: 16; L = 7: 13.7; L = 64: 1.5, rounded up.
    kept = selected(random_scores(1, 1, 64), k=3, causal=True, layout="relative", grouping="query")[0, 0].sum(-1)
    assert kept[[0, 1, 2, 4, 5, 6, 63]].tolist() == [32, 32, 32, 19, 16, 14, 2]
    # Aligned bins hold w = 1 key up to L = 32 and 2 keys up to 64: round(3 / w) of the ceil(L / w) that exist.
    kept = selected(random_scores(1, 1, 64), k=3, causal=True, layout="aligned", grouping="query")[0, 0].sum(-1)
    assert kept[[0, 1, 2, 3, 31, 32, 63]].tolist() == [1, 2, 3, 3, 3, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouping", ["query", "head", "batch", "causal_batch"])
def test_kept_bins_are_the_largest_of_their_group(grouping, dtype):
    scores = random_scores(2, 3, 40, dtype)
    kept = selected(scores, k=7, causal=False, layout="relative", grouping=grouping)
    rows, heads = {"query": (1, 1), "head": (40, 1), "batch": (40, 3), "causal_batch": (1, 3)}[grouping]
    budget = (2 * rows * heads * 7 * K + 40) // (2 * 40)
    order = {"query": "nhtk", "head": "nhtk", "batch": "nhtk", "causal_batch": "nthk"}[grouping]
    groups = [torch.einsum(f"nhtk->{order}", x.float()).reshape(-1, rows * heads * K) for x in (scores, kept)]
    for values, chosen in zip(*groups, strict=True):
        best = values.sort(descending=True, stable=True)[1][:budget]
        assert chosen.nonzero()[:, 0].tolist() == best.sort()[0].tolist()


@pytest.mark.parametrize("layout", ["relative", "aligned"])
@pytest.mark.parametrize("grouping", ["query", "head", "batch", "causal_batch"])
def test_ties_go_to_the_lowest_index(grouping, layout):
    scores = torch.zeros(1, 2, 4, K)
    scores[..., 1::2] = -0.0  # equal to 0.0
    budget = 4 if layout == "aligned" else K  # L = 4: all bins that exist, of one row
    kept = selected(scores, k=2, causal=False, layout=layout, grouping=grouping)[0]
    flat = kept.transpose(0, 1) if grouping == "causal_batch" else kept
    flat = flat[..., :4] if layout == "aligned" else flat
    size = {"query": 1, "head": 4, "batch": 8, "causal_batch": 2}[grouping] * budget
    expected = (torch.arange(size) < size // 2).expand(flat.numel() // size, size)
    assert torch.equal(flat.reshape(-1, size), expected)
    if layout == "aligned":
        assert not kept[..., 4:].any()


@pytest.mark.parametrize("layout", ["relative", "aligned"])
@pytest.mark.parametrize(
    ("causal", "grouping"),
    [(True, "query"), (True, "causal_batch"), (False, "head"), (False, "batch"), (False, "query")],
)
def test_forced_bins_count_and_padding_does_not(padding_mask, causal, grouping, layout):
    scores, mask = random_scores(), padding_mask(40, SIDES)
    spans = row_spans(4, 40, 40, causal=causal, attention_mask=mask)
    length, real = spans.length, spans.length > 0
    arguments = {"causal": causal, "layout": layout, "grouping": grouping, "attention_mask": mask}
    kept = selected(scores, k=6, keep_first=True, keep_own=True, **arguments)
    free = selected(scores, k=6, **arguments)
    for position in (torch.zeros_like(length), spans.position):
        index = bin_of(position, length, K, layout)[:, None, :, None].expand(-1, 3, -1, 1)
        assert kept.gather(-1, index)[real[:, None, :, None].expand_as(index)].all()
    assert not kept[~real[:, None].expand(-1, 3, -1)].any()
    group = {"query": (3,), "causal_batch": (1, 3), "head": (2, 3), "batch": (1, 2, 3)}[grouping]
    assert (kept.sum(group) - free.sum(group)).abs().max() <= 3  # only where forced bins exceed the budget
    if layout == "aligned":
        used = -(-length // aligned_width(length, K))
        assert not kept[(torch.arange(K) >= used[..., None])[:, None].expand_as(kept)].any()


@pytest.mark.parametrize("layout", ["relative", "aligned"])
@pytest.mark.parametrize("grouping", ["query", "causal_batch", "head", "batch"])
def test_rows_keep_as_many_keys_as_promised(grouping, layout):
    length = 128  # both layouts have bins of 4 keys
    mask = select_bins(random_scores(2, 3, length), k=20, causal=False, layout=layout, grouping=grouping)
    count = count_keys(mask, num_keys=length, causal=False).float()
    assert count.mean() == 20
    assert (count.std() == 0) == (grouping == "query")


@pytest.mark.parametrize("grouping", ["query", "causal_batch"])
def test_rows_with_no_more_than_k_keys_are_dense(grouping):
    for layout in ("relative", "aligned"):
        mask = select_bins(random_scores(2, 3, 50), k=16, causal=True, layout=layout, grouping=grouping)
        count = count_keys(mask, num_keys=50, causal=True)
        assert torch.equal(count[:, :, :16], torch.arange(1, 17).expand(2, 3, 16))
        assert (count[:, :, 17:] < torch.arange(18, 51)).any(-1).all()


@pytest.mark.parametrize("grouping", ["query", "causal_batch"])
@pytest.mark.parametrize("layout", ["relative", "aligned"])
def test_padding_a_cache_and_chunks_change_nothing(padding_mask, monkeypatch, grouping, layout):
    scores = random_scores(1, 3, 40)
    arguments = {"k": 5, "causal": True, "layout": layout, "grouping": grouping, "keep_first": True, "keep_own": True}
    plain = selected(scores, **arguments)
    padded = torch.nn.functional.pad(scores, (0, 0, 3, 4), value=9.0)
    inside = selected(padded, attention_mask=padding_mask(47, [(3, 4)]), **arguments)
    assert torch.equal(inside[:, :, 3:43], plain)
    cached = selected(scores[:, :, 33:], num_keys=40, **arguments)
    assert torch.equal(cached, plain[:, :, 33:])
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 3 * K * 7)
    assert torch.equal(selected(scores, **arguments), plain)


def test_shift_moves_the_own_bin():
    own = {}
    for shift in (0, 192):
        arguments = {"k": 1, "causal": False, "layout": "relative", "grouping": "query", "keep_own": True}
        kept = selected(torch.zeros(1, 1, 70, K), shift=shift, **arguments)[0, 0]
        own[shift] = bin_of(torch.arange(70), torch.tensor(70), K, "relative", shift)
        assert kept.gather(-1, own[shift][:, None]).all()
        assert (kept.sum(-1) == 1).all()
    assert not torch.equal(own[0], own[192])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grouping": "head"}, "grouping is 'head'"),
        ({"grouping": "rows"}, "grouping is 'rows'"),
        ({"layout": "even"}, "layout is 'even'"),
        ({"k": 0}, "k is 0"),
        ({"scores": torch.zeros(1, 1, 4, 40)}, "num_bins is 40"),
        ({"scores": torch.zeros(1, 1, 4, K, dtype=torch.int32)}, "scores has dtype torch.int32"),
        ({"scores": torch.zeros(1, 4, K)}, "scores has shape"),
        ({"num_keys": 3}, "num_keys is 3"),
        ({"layout": "aligned", "shift": 5}, "shift is 5"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"scores": torch.zeros(1, 1, 4, K), "k": 2, "causal": True, "layout": "relative", "grouping": "query"}
    with pytest.raises(ValueError, match=message):
        select_bins(**(arguments | change))
