"""Spans, bins and masks against loops over single rows and keys, by hand, and against the published masks."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from sea_kernels.backend import choose_backend
from sea_kernels.bins import aligned_width, bin_of, bin_sizes, bin_start, wanted_bins
from sea_kernels.checks import check_bins, check_choice, check_qkv, check_same_device, check_shape
from sea_kernels.masks import BinMask, RunMask, kept_keys, pack_bits, unpack_bits, window_start
from sea_kernels.spans import row_spans

LAYOUTS = ["relative", "aligned"]


class TestSpans:
    def test_causal(self):
        spans = row_spans(2, 3, 3, causal=True)
        assert spans.start.tolist() == [0, 0]
        assert spans.length.tolist() == [[1, 2, 3]] * 2
        assert spans.position.tolist() == [[0, 1, 2]] * 2

    def test_queries_are_the_last_positions(self):
        spans = row_spans(1, 2, 5, causal=True)
        assert spans.length.tolist() == [[4, 5]]
        assert spans.position.tolist() == [[3, 4]]

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("sides", [[(0, 0), (2, 0)], [(0, 3), (1, 2)], [(7, 0), (0, 7)], [(6, 0), (0, 6)]])
    @pytest.mark.parametrize("queries", [7, 3])
    def test_against_the_mask(self, padding_mask, causal, sides, queries):
        if not causal:
            queries = 7
        mask = padding_mask(7, sides)
        spans = row_spans(2, queries, 7, causal=causal, attention_mask=mask)
        for item in range(2):
            for row in range(queries):
                place = 7 - queries + row
                allowed = [key for key in range(7) if mask[item, key] and mask[item, place]]
                allowed = [key for key in allowed if key <= place or not causal]
                start, length = int(spans.start[item]), int(spans.length[item, row])
                assert list(range(start, start + length)) == allowed
                if length:
                    assert spans.position[item, row] == place - start

    def test_integer_masks_are_taken(self):
        spans = row_spans(1, 3, 3, causal=True, attention_mask=torch.tensor([[0, 1, 1]]))
        assert spans.length.tolist() == [[0, 1, 2]]

    @pytest.mark.parametrize(
        ("queries", "causal", "mask", "message"),
        [
            (4, True, None, "num_keys is 3 with num_queries 4"),
            (2, False, None, "bidirectional attention needs them equal"),
            (3, True, torch.ones(2, 3), r"attention_mask has shape \(2, 3\), expected \[batch, num_keys\] = \(1, 3\)"),
            (3, True, torch.tensor([[1, 0, 1]]), "attention_mask has a gap in item 0"),
        ],
    )
    def test_errors(self, queries, causal, mask, message):
        with pytest.raises(ValueError, match=message):
            row_spans(1, queries, 3, causal=causal, attention_mask=mask)

    def test_the_item_with_a_gap_is_named(self):
        mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1]])
        with pytest.raises(ValueError, match="gap in item 2"):
            row_spans(3, 3, 3, causal=True, attention_mask=mask)


class TestBins:
    @pytest.mark.parametrize("length", [1, 2, 5, 31, 32, 33, 64, 65, 100, 127, 129, 1000])
    @pytest.mark.parametrize("num_bins", [1, 4, 32])
    @pytest.mark.parametrize(
        ("layout", "shift"), [("aligned", 0), ("relative", 0), ("relative", 192), ("relative", -192)]
    )
    def test_bins_partition_the_keys(self, length, num_bins, layout, shift):
        """bin_of, bin_start and bin_sizes describe one and the same partition into contiguous runs."""
        lengths = torch.tensor(length)
        found = bin_of(torch.arange(length), lengths, num_bins, layout, shift).tolist()
        edges = bin_start(torch.arange(num_bins + 1), lengths, num_bins, layout, shift).tolist()
        assert edges[0] == 0
        assert edges[-1] == length
        expected = [index for index in range(num_bins) for _ in range(edges[index], edges[index + 1])]
        assert found == expected
        sizes = bin_sizes(lengths, num_bins, layout, shift)
        assert sizes.tolist() == torch.bincount(torch.tensor(found), minlength=num_bins).tolist()

    @pytest.mark.parametrize("length", [1, 7, 32, 33, 50, 1000])
    def test_relative_bins_are_the_papers(self, length):
        """floor((j + 1/2) K / L), where an exact integer goes to the bin below (the small subtrahend of the paper)."""
        exact = [math.ceil(Fraction(2 * key + 1, 2) * 32 / length) - 1 for key in range(length)]
        assert bin_of(torch.arange(length), torch.tensor(length), 32, "relative").tolist() == exact

    @pytest.mark.parametrize("shift", [0, 64, 192, -100, -192])
    @pytest.mark.parametrize("length", [3, 40, 100])
    def test_a_shift_moves_inner_edges_by_parts_of_a_key(self, shift, length):
        edges = bin_start(torch.arange(33), torch.tensor(length), 32, "relative", shift).tolist()
        inner = [Fraction(length * index, 32) + Fraction(1, 2) + Fraction(shift, 256) for index in range(1, 32)]
        assert edges == [0, *(min(max(math.floor(edge), 0), length) for edge in inner), length]

    @pytest.mark.parametrize(("num_bins", "longest"), [(1, 70), (4, 300), (32, 5000)])
    def test_aligned_width_is_the_smallest_power_of_two(self, num_bins, longest):
        lengths = torch.arange(longest)
        for length, width in zip(lengths.tolist(), aligned_width(lengths, num_bins).tolist(), strict=True):
            expected = 1
            while expected * num_bins < length:
                expected *= 2
            assert width == expected

    def test_aligned_bins_by_hand(self):
        sizes = bin_sizes(torch.tensor([3, 4, 5, 8, 9]), 4, "aligned")
        assert sizes.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [2, 2, 1, 0], [2, 2, 2, 2], [4, 4, 1, 0]]

    def test_relative_bins_by_hand(self):
        assert bin_sizes(torch.tensor([1, 2, 4, 6]), 4, "relative").tolist() == [
            [0, 1, 0, 0],  # (0 + 1/2) * 4 / 1 is exactly 2: the bin below
            [1, 0, 1, 0],  # 1 and 3: bins 0 and 2
            [1, 1, 1, 1],
            [2, 1, 2, 1],  # edges 0, 2, 3, 5, 6
        ]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_row_without_keys_has_empty_bins(self, layout):
        assert bin_sizes(torch.tensor([0]), 4, layout).tolist() == [[0, 0, 0, 0]]

    def test_long_rows_do_not_overflow(self):
        length = torch.tensor(2**20, dtype=torch.int64)
        assert bin_start(torch.tensor(1024), length, 1024, "relative") == 2**20
        assert bin_of(length - 1, length, 1024, "relative", 192) == 1023

    def test_wanted_bins_by_hand(self):
        lengths = torch.tensor([1, 7, 64, 100])
        assert wanted_bins(7, 1, lengths, 32, "relative").tolist() == [224, 32, 4, 2]  # 3.5 and 2.24
        assert wanted_bins(7, 2, lengths, 32, "relative").tolist() == [448, 64, 7, 4]  # 4.48
        assert wanted_bins(7, 1, lengths, 32, "aligned").tolist() == [7, 7, 4, 2]  # widths 1, 1, 2, 4: 3.5 and 1.75

    def test_wanted_bins_are_the_published_numbers(self, golden):
        real = golden["attention_mask"].sum(-1)
        if golden["grouping"] == "head":  # all real rows of a head are one group
            groups = [(int(length), length) for length in real]
        else:  # all heads of one row are a group
            groups = [(golden["q"].shape[1], torch.arange(1, int(length) + 1)) for length in real]
        wanted = [wanted_bins(golden["wanted"], *group, golden["num_bins"], "relative") for group in groups]
        assert torch.equal(torch.stack(wanted).flatten().float(), golden["per_item_top_k"].flatten())


class TestMasks:
    def test_bits_are_little_endian(self):
        keep = torch.zeros(64, dtype=torch.bool)
        keep[[0, 5, 31, 32, 62]] = True
        assert pack_bits(keep).tolist() == [1 + 2**5 - 2**31, 1 + 2**30]
        assert pack_bits(keep).dtype == torch.int32

    def test_unpack_inverts_pack(self):
        keep = torch.rand(3, 2, 96, generator=torch.Generator().manual_seed(0)) < 0.5
        assert torch.equal(unpack_bits(pack_bits(keep), 96), keep)

    def test_wrong_sizes(self):
        with pytest.raises(ValueError, match="keep has 33 bins"):
            pack_bits(torch.ones(33, dtype=torch.bool))
        with pytest.raises(ValueError, match="bits has 2 words"):
            unpack_bits(torch.zeros(2, dtype=torch.int32), 32)

    def test_published_masks(self, golden):
        bins = golden["partial_attention_mask_before_interp"] >= 0
        num_keys = golden["q"].shape[2]
        mask = BinMask(pack_bits(bins), golden["num_bins"], "relative")
        spans = row_spans(
            len(bins), num_keys, num_keys, causal=golden["causal"], attention_mask=golden["attention_mask"]
        )
        published = golden["partial_attention_mask"] >= 0
        assert published.any()
        assert torch.equal(kept_keys(mask, spans, num_keys), published)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("causal", [False, True])
    def test_bins_stretch_to_keys(self, padding_mask, layout, causal):
        keep = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(1)) < 0.5
        padding = padding_mask(40, [(2, 0), (0, 5)])
        spans = row_spans(2, 40, 40, causal=causal, attention_mask=padding)
        kept = kept_keys(BinMask(pack_bits(keep), 32, layout), spans, 40)
        edges = bin_start(torch.arange(33), spans.length[..., None], 32, layout).tolist()
        for item in range(2):
            for row in range(40):
                runs = [range(a, b) for a, b in zip(edges[item][row], edges[item][row][1:], strict=False)]
                for head in range(3):
                    bins = keep[item, head, row].nonzero().flatten().tolist()
                    expected = [int(spans.start[item]) + key for index in bins for key in runs[index]]
                    assert kept[item, head, row].nonzero().flatten().tolist() == expected

    @pytest.mark.parametrize("mask", ["bins", "runs"])
    def test_some_rows_are_a_slice_of_all(self, mask):
        generator = torch.Generator().manual_seed(1)
        if mask == "bins":
            mask = BinMask(pack_bits(torch.rand(2, 3, 9, 32, generator=generator) < 0.5), 32, "relative")
        else:
            starts = torch.randint(-1, 3, (2, 3, 9, 2), generator=generator).int() * 2
            mask = RunMask(starts.clamp_min(-1), width=2, window=2)
        spans = row_spans(2, 9, 12, causal=True)
        everything = kept_keys(mask, spans, 12)
        assert torch.equal(kept_keys(mask, spans, 12, slice(4, 7)), everything[:, :, 4:7])
        assert torch.equal(kept_keys(mask, spans, 8, slice(0, 4)), everything[:, :, :4, :8])

    def test_runs_by_hand(self):
        """Width 2, window 2: row 6 keeps its run [0, 2), the window's [4, 6) and its own incomplete run [6, 7)."""
        starts = torch.full((1, 1, 7, 2), -1, dtype=torch.int32)
        starts[0, 0, 6, 0] = 0
        kept = kept_keys(RunMask(starts, width=2, window=2), row_spans(1, 7, 7, causal=True), 7)[0, 0]
        expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [0, 1, 4, 5, 6]]
        assert [row.nonzero().flatten().tolist() for row in kept] == expected

    def test_runs_count_from_the_first_real_key(self):
        starts = torch.tensor([4, 0, -1]).int()[None, None, None].expand(1, 1, 10, -1)
        spans = row_spans(1, 10, 10, causal=True, attention_mask=torch.tensor([[0] * 3 + [1] * 7]))
        kept = kept_keys(RunMask(starts, width=2), spans, 10)[0, 0]
        assert kept[9].tolist() == [False] * 3 + [True, True, False, False, True, True, False]
        assert kept[7].nonzero().flatten().tolist() == [3, 4, 7]  # its second run is cut at the row's own position
        assert not kept[:3].any()

    def test_rows_of_one_stride_share_where_their_window_starts(self):
        starts = torch.full((1, 1, 8, 1), -1, dtype=torch.int32)
        mask = RunMask(starts, width=2, window=2, stride=3)
        assert window_start(torch.arange(8), mask).tolist() == [0, 0, 0, 0, 0, 0, 4, 4]
        kept = kept_keys(mask, row_spans(1, 8, 8, causal=True), 8)[0, 0]
        assert kept[5].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert kept[7].nonzero().flatten().tolist() == [4, 5, 6, 7]


class TestBackend:
    def test_automatic_choice_on_a_cpu_is_the_reference(self):
        assert choose_backend("auto", torch.ones(1), triton_exists=True, operation="op") == "reference"
        assert choose_backend("reference", torch.ones(1), triton_exists=True, operation="op") == "reference"

    def test_an_explicit_choice_never_falls_back(self, monkeypatch):
        with pytest.raises(NotImplementedError, match=r"op: backend='triton' .* no Triton form"):
            choose_backend("triton", torch.ones(1), triton_exists=False, operation="op")
        monkeypatch.setattr("sea_kernels.backend.has_triton", lambda: False)
        with pytest.raises(NotImplementedError, match="Triton is not installed"):
            choose_backend("triton", torch.ones(1), triton_exists=True, operation="op")
        monkeypatch.setattr("sea_kernels.backend.has_triton", lambda: True)
        assert choose_backend("triton", torch.ones(1), triton_exists=True, operation="op") == "triton"

    def test_automatic_choice_on_a_gpu_says_so_where_it_is_the_reference(self, monkeypatch, recwarn):
        monkeypatch.setattr("sea_kernels.backend.has_triton", lambda: True)
        on_gpu = SimpleNamespace(is_cuda=True)
        assert choose_backend("auto", on_gpu, triton_exists=True, operation="op") == "triton"
        assert choose_backend("reference", on_gpu, triton_exists=False, operation="op") == "reference"
        assert not recwarn
        with pytest.warns(UserWarning, match="op runs in PyTorch, slowly: it has no Triton form for these inputs"):
            assert choose_backend("auto", on_gpu, triton_exists=False, operation="op") == "reference"

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="backend is 'Triton', expected one of"):
            choose_backend("Triton", torch.ones(1), triton_exists=True, operation="op")


class TestChecks:
    def test_shape(self):
        check_shape("x", torch.ones(2, 3), (None, 3), "[a, b]")
        for shape in [(2, 4), (2, 3, 1), (3,)]:
            with pytest.raises(ValueError, match=r"x has shape .* expected \[a, b\] = \('any', 3\)"):
                check_shape("x", torch.ones(shape), (None, 3), "[a, b]")

    def test_choice(self):
        check_choice("x", "a", ("a", "b"))
        with pytest.raises(ValueError, match=r"x is 'c', expected one of \('a', 'b'\)"):
            check_choice("x", "c", ("a", "b"))

    @pytest.mark.parametrize("num_bins", [0, -32, 16, 33])
    def test_bins(self, num_bins):
        check_bins(64)
        with pytest.raises(ValueError, match=f"num_bins is {num_bins}"):
            check_bins(num_bins)

    def test_device(self):
        check_same_device(x=torch.ones(1), y=None, z=torch.ones(2))
        with pytest.raises(ValueError, match=r"different devices.*'z': device\(type='meta'\)"):
            check_same_device(x=torch.ones(1), z=torch.ones(1, device="meta"))

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (2, 4, 6), "query has shape"),
            (1, (1, 2, 6, 8), "key has shape"),
            (1, (2, 2, 6, 7), "key has shape"),
            (1, (2, 3, 6, 8), "query has 4 heads, expected a multiple of key's 3"),
            (1, (2, 0, 6, 8), "query has 4 heads, expected a multiple of key's 0"),
            (2, (2, 1, 6, 8), "value has shape"),
            (2, (2, 2, 5, 8), "value has shape"),
        ],
    )
    def test_attention_inputs(self, index, shape, message):
        inputs = [torch.ones(2, 4, 6, 8), torch.ones(2, 2, 6, 8), torch.ones(2, 2, 6, 3)]
        check_qkv(*inputs)
        inputs[index] = torch.ones(shape)
        with pytest.raises(ValueError, match=message):
            check_qkv(*inputs)

    def test_attention_inputs_share_a_dtype(self):
        with pytest.raises(ValueError, match=r"key has dtype torch.float16, expected query's torch.float32"):
            check_qkv(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4).half())
