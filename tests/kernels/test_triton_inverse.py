"""The inverted entry lists against the dense mask, in the interpreter where there is no GPU."""

import pytest
import torch

from sea_kernels.bins import bin_start
from sea_kernels.masks import BinMask, RunMask, kept_keys, pack_bits
from sea_kernels.spans import row_spans
from sea_kernels.triton_common import item_spans
from sea_kernels.triton_entries import EntryLists
from sea_kernels.triton_inverse import UNIT_BITS, InverseLists, cut_tiles

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 16


def random_bins(heads, queries, share=0.3):
    keep = torch.rand(1, heads, queries, 32, generator=torch.Generator().manual_seed(1)) < share
    return BinMask(pack_bits(keep).to(DEVICE), 32, "aligned")


def random_runs(heads, queries, width, window=0, stride=1):
    """Up to four runs of each row, some before its first key or in its window: those do not count."""
    generator = torch.Generator().manual_seed(1)
    runs = torch.rand(1, heads, queries, queries // width, generator=generator).argsort(-1)[..., :4]  # all different
    starts = torch.where(torch.rand(runs.shape, generator=generator) < 0.2, -1, runs * width).int()
    return RunMask(starts.sort(-1)[0].to(DEVICE), width, window, stride)


def invert(mask, num_keys, attention_mask=None, **options):
    lists = EntryLists(mask, num_keys, True, item_spans(attention_mask), **options)
    entries = [lists.build(*chunk) for chunk in lists.chunks()]
    return lists, InverseLists(lists, entries)


def listed_keys(inverse, heads, rows, num_keys):
    """How often each (head, row, key) is listed, and whether the blocks of every list ascend."""
    listed = torch.zeros(heads, rows, num_keys, dtype=torch.int64)
    offsets, elements = inverse.offsets.tolist(), inverse.rows.tolist()
    place = 0
    for head in range(heads):
        for level in range(inverse.first_level, inverse.first_level + inverse.levels):
            for unit in range(inverse.units):
                found = elements[offsets[place] : offsets[place + 1]]
                blocks = [element >> UNIT_BITS >> 4 for element in found]
                assert blocks == sorted(blocks)
                for element in found:
                    assert element % 2**UNIT_BITS == unit % 2**UNIT_BITS
                    listed[head, element >> UNIT_BITS, unit << level : (unit + 1) << level] += 1
                place += 1
    assert place + 1 == len(offsets)
    return listed


def assert_inverse(mask, queries, keys, attention_mask=None, **options):
    real = None if attention_mask is None else attention_mask.to(DEVICE)
    _, inverse = invert(mask, keys, real, **options)
    spans = row_spans(1, queries, keys, causal=True, attention_mask=attention_mask)
    first = int(spans.start[0])
    dense = kept_keys(mask if DEVICE == "cpu" else to_cpu(mask), spans, keys)[0][..., first:]
    listed = listed_keys(inverse, dense.shape[0], queries, keys)[..., : keys - first]
    seen = torch.arange(keys - first) < spans.length[0, :, None]  # units reach past a row's own key
    assert torch.equal(listed * seen, dense.long())


def to_cpu(mask):
    if isinstance(mask, BinMask):
        return BinMask(mask.bits.cpu(), mask.num_bins, mask.layout)
    return RunMask(mask.starts.cpu(), mask.width, mask.window, mask.stride)


@pytest.mark.parametrize(("queries", "keys", "sides"), [(63, 63, None), (1, 40, None), (111, 150, [(40, 7)])])
def test_bins_of_all_widths(padding_mask, queries, keys, sides):
    assert_inverse(random_bins(2, queries), queries, keys, None if sides is None else padding_mask(keys, sides))


def test_bins_narrower_than_a_unit():
    mask, spans = random_bins(2, 111), row_spans(1, 111, 111, causal=True)
    seen = bin_start(torch.arange(32), spans.length[0, :, None], 32, "aligned") < spans.length[0, :, None]
    mask.bits.bitwise_and_(pack_bits(seen).to(DEVICE))
    _, inverse = invert(mask, 111, unit=4)
    units = torch.nn.functional.pad(kept_keys(to_cpu(mask), spans, 111)[0], (0, 1)).unflatten(-1, (-1, 4))
    assert torch.equal(listed_keys(inverse, 2, 111, 112)[..., ::4], units.any(-1).long())


@pytest.mark.parametrize(
    ("width", "window", "stride", "sides"),
    [(4, 0, 1, None), (4, 8, 1, [(9, 5)]), (8, 16, 3, None), (1, 0, 4, [(40, 0)])],
)
def test_runs_and_windows(padding_mask, width, window, stride, sides):
    mask = random_runs(1, 40, width, window, stride)
    assert_inverse(mask, 40, 75, None if sides is None else padding_mask(75, sides))


def test_many_chunks_and_many_launches(monkeypatch):
    monkeypatch.setattr("sea_kernels.triton_inverse.CHUNK_BLOCKS", 2)
    mask = random_runs(1, 111, 4)
    monkeypatch.setattr("sea_kernels.triton_entries.LIST_BYTES", 3 * 8 * EntryLists(mask, 111, True, None).capacity)
    lists, inverse = invert(mask, 111)
    assert [first for first, _ in lists.chunks()] == [0, 3, 6]  # launches end within a chunk
    spans = row_spans(1, 111, 111, causal=True)
    listed = listed_keys(inverse, 1, 111, 112)[..., :111]
    assert torch.equal(listed.tril(), kept_keys(to_cpu(mask), spans, 111)[0].long())


@pytest.mark.parametrize("members", [1, 2])
def test_parts_cover_the_rows_of_every_tile(monkeypatch, members):
    monkeypatch.setattr("sea_kernels.triton_inverse.PART_ROWS", 8)
    monkeypatch.setattr("sea_kernels.triton_inverse.PART_MEANS", 1)
    queries = 80
    mask = random_runs(2, queries, 4)
    mask.starts.masked_fill_(mask.starts == 0, -1)[..., 0] = 0  # every row keeps the first run
    _, inverse = invert(mask, queries)
    parts = cut_tiles(inverse, queries, TILE, 2, members)
    per_head = -(-queries // TILE)
    offsets = inverse.offsets[: 2 * inverse.units].view(2, -1)[:, :: TILE // 4].cpu()  # of the first unit of a tile
    ends = torch.cat([offsets.flatten()[1:], inverse.offsets[-1:].cpu()])
    rows = (ends - offsets.flatten()).view(-1, members, per_head).sum(1).flatten()
    size, before = int(parts.size), parts.ends.cpu()
    assert size > rows.float().mean()
    assert torch.equal(before.diff(), (rows + size - 1) // size - 1)
    expected = torch.repeat_interleave(torch.arange(len(rows)), before.diff())
    assert len(expected) > 0
    assert torch.equal(parts.tile[: len(expected)].cpu(), expected)
    assert (parts.tile[len(expected) :] == len(rows)).all()
