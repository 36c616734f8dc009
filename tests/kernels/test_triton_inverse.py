"""The inverted entry lists against the dense mask, in the interpreter where there is no GPU."""

import itertools

import pytest
import torch

from sea_kernels.masks import BinMask, RunMask, kept_keys, pack_bits, unpack_bits
from sea_kernels.spans import row_spans
from sea_kernels.triton_common import item_spans
from sea_kernels.triton_entries import EntryLists
from sea_kernels.triton_inverse import KINDS, UNIT_BITS, InverseLists
from sea_kernels.triton_parts import cut_tiles
from sea_kernels.triton_wide_lists import SPREAD, WideLists

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


def invert(mask, num_keys, attention_mask=None):
    lists = EntryLists(mask, num_keys, True, item_spans(attention_mask))
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


def assert_inverse(mask, queries, keys, attention_mask=None):
    real = None if attention_mask is None else attention_mask.to(DEVICE)
    _, inverse = invert(mask, keys, real)
    spans = row_spans(1, queries, keys, causal=True, attention_mask=attention_mask)
    first = int(spans.start[0])
    dense = kept_keys(to_cpu(mask), spans, keys)[0][..., first:]
    listed = listed_keys(inverse, dense.shape[0], queries, keys)[..., : keys - first]
    seen = torch.arange(keys - first) < spans.length[0, :, None]  # units reach past a row's own key
    assert torch.equal(listed * seen, dense.long())


def to_cpu(mask):
    return RunMask(mask.starts.cpu(), mask.width, mask.window, mask.stride)


def listed_tiles(inverse, lists, length, level):
    """How often each (head, block, level, tile of keys) is listed. The blocks of a list ascend and fit its kind."""
    first, levels = inverse.first_level, inverse.levels
    shape = lists.heads, lists.blocks, lists.levels, inverse.units << (first + levels - 5)
    listed, place = torch.zeros(shape, dtype=torch.int64), 0
    offsets, elements = inverse.offsets.tolist(), inverse.rows.tolist()
    for head, unit_level, unit, kind in itertools.product(
        range(lists.heads), range(first, first + levels), range(inverse.units), range(KINDS)
    ):
        found = elements[offsets[place] : offsets[place + 1]]
        assert found == sorted(found)
        tiles = slice(unit << (unit_level - 5), (unit + 1) << (unit_level - 5))
        for element in found:
            block, bin_level = element >> UNIT_BITS, element % 2**UNIT_BITS
            rows = slice(block * lists.rows, (block + 1) * lists.rows)
            seeing = length[rows] > 0
            whole = (level[rows][seeing] == bin_level).all() and length[rows][seeing].min() >= tiles.stop * 32
            whole = whole and bin_level >= lists.whole_level
            assert kind == (1 if whole and bin_level >= 4 else 0)
            listed[head, block, bin_level, tiles] += 1
        place += 1
    assert place + 1 == len(offsets)
    return listed


def assert_wide_inverse(queries, keys, rows, attention_mask=None, least_level=5):
    """Each block is listed once, with each of its levels, for the entries in which its rows of that level keep bins."""
    mask = random_bins(2, queries, share=0.1)
    length = row_spans(1, queries, keys, causal=True, attention_mask=attention_mask).length[0]
    level = torch.stack([length > (32 << step) for step in range(12)]).sum(0)
    index = torch.arange(32)
    kept = unpack_bits(mask.bits.cpu()[0], 32) & ((index << level[:, None]) < length[:, None])
    mask.bits.copy_(pack_bits(kept)[None])
    real = None if attention_mask is None else attention_mask.to(DEVICE)
    lists = WideLists(mask, keys, True, item_spans(real), rows, least_level)
    inverse = InverseLists(lists, [lists.build(*chunk) for chunk in lists.chunks()])
    listed = listed_tiles(inverse, lists, length, level)
    expected = torch.zeros_like(listed)
    for head, row, bin_ in kept.nonzero().tolist():
        block, width = row // rows, 1 << int(level[row])
        seen = slice(block * rows, (block + 1) * rows)
        low = int(level[seen][length[seen] > 0].min())
        entry = 1 << max(low, least_level)
        tiles = slice(bin_ * width // entry * entry // 32, -(-(bin_ + 1) * width // entry) * entry // 32)
        expected[head, block, level[row], tiles] = 1
    assert torch.equal(listed, expected)
    return lists


@pytest.mark.parametrize(
    ("queries", "keys", "sides", "least_level"),
    [
        (63, 63, None, 5),
        (1, 40, None, 5),
        (111, 150, [(40, 7)], 5),
        (90, 1060, None, 5),
        (40, 2070, None, 5),
        (90, 90, None, 6),
        (111, 550, [(40, 7)], 6),
        (90, 1060, None, 6),
    ],
)
def test_blocks_of_wide_lists(padding_mask, queries, keys, sides, least_level):
    real = None if sides is None else padding_mask(keys, sides)
    assert_wide_inverse(queries, keys, 32, real, least_level)


def test_many_chunks_and_many_launches_of_wide_lists(monkeypatch):
    monkeypatch.setattr("sea_kernels.triton_inverse.CHUNK_ROWS", 32)
    monkeypatch.setattr("sea_kernels.triton_wide_lists.LIST_BYTES", 3 * 4 * 2 * (2 * 32 + SPREAD))
    lists = assert_wide_inverse(111, 150, 16)
    assert [first for first, _ in lists.chunks()] == [0, 3, 6]  # launches end within a chunk


@pytest.mark.parametrize(
    ("width", "window", "stride", "sides"),
    [(4, 0, 1, None), (4, 8, 1, [(9, 5)]), (8, 16, 3, None), (1, 0, 4, [(40, 0)])],
)
def test_runs_and_windows(padding_mask, width, window, stride, sides):
    mask = random_runs(1, 40, width, window, stride)
    assert_inverse(mask, 40, 75, None if sides is None else padding_mask(75, sides))


def test_many_chunks_and_many_launches(monkeypatch):
    monkeypatch.setattr("sea_kernels.triton_inverse.CHUNK_ROWS", 32)
    mask = random_runs(1, 111, 4)
    monkeypatch.setattr("sea_kernels.triton_entries.LIST_BYTES", 3 * 8 * EntryLists(mask, 111, True, None).capacity)
    lists, inverse = invert(mask, 111)
    assert [first for first, _ in lists.chunks()] == [0, 3, 6]  # launches end within a chunk
    spans = row_spans(1, 111, 111, causal=True)
    listed = listed_keys(inverse, 1, 111, 112)[..., :111]
    assert torch.equal(listed.tril(), kept_keys(to_cpu(mask), spans, 111)[0].long())


@pytest.mark.parametrize("members", [1, 2])
def test_parts_cover_the_rows_of_every_tile(monkeypatch, members):
    monkeypatch.setattr("sea_kernels.triton_parts.PART_ROWS", 8)
    monkeypatch.setattr("sea_kernels.triton_parts.PART_MEANS", 1)
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
    sizes = [max(8, int(rows.sum()) * eighths // (8 * len(rows)) + 1) for eighths in range(1, 9)]
    counts = [torch.where(rows > s, (rows + s - 1) // s, 0) for s in sizes]
    chosen = next(i for i, count in enumerate(counts) if int(count.sum()) <= len(parts.tile))
    assert 0 < chosen < len(sizes) - 1
    assert size == sizes[chosen]
    assert torch.equal(before.diff(), counts[chosen])
    expected = torch.repeat_interleave(torch.arange(len(rows)), before.diff())
    assert len(expected) > 0
    assert torch.equal(parts.tile[: len(expected)].cpu(), expected)
    assert (parts.tile[len(expected) :] == len(rows)).all()
