"""Counts, dense masks and CSR matrices of one mask agree, with the published mask and by hand."""

import pytest
import torch

from sea_kernels import chunks, count_keys, select_bins, to_dense, to_flat_csr
from sea_kernels.masks import BinMask, RunMask, pack_bits

K = 32
SIDES = [(0, 0), (11, 0), (0, 13), (6, 5)]


def test_published_selection_stretches_to_the_published_mask(golden):
    kept = golden["partial_attention_mask_before_interp"] > -1
    mask = BinMask(pack_bits(kept), golden["num_bins"], "relative")
    num_keys = kept.shape[2]
    place = {"num_keys": num_keys, "causal": golden["causal"], "attention_mask": golden["attention_mask"]}
    published = golden["partial_attention_mask"] > -1
    if not golden["causal"]:  # padding rows mean nothing there, and keep nothing here
        published &= golden["attention_mask"][:, None, :, None]
    assert torch.equal(to_dense(mask, **place), published)
    assert torch.equal(count_keys(mask, **place), published.sum(-1))


@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize(
    ("causal", "queries", "layout"), [(True, 40, "aligned"), (True, 9, "relative"), (False, 40, "relative")]
)
def test_all_forms_agree(padding_mask, monkeypatch, causal, queries, layout, small_chunks):
    if small_chunks:
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * 3 * 40 * 4)
    generator = torch.Generator().manual_seed(5)
    place = {"num_keys": 40, "causal": causal, "attention_mask": padding_mask(40, SIDES)}
    scores = torch.randn(4, 3, queries, K, generator=generator)
    mask = select_bins(scores, k=6, layout=layout, grouping="causal_batch", **place)
    dense = to_dense(mask, **place)
    assert torch.equal(count_keys(mask, **place), dense.sum(-1))
    flat = dense.transpose(1, 2).flatten(2)  # columns run over heads, then keys
    values = torch.randn(4, 3, queries, 40, dtype=torch.float64, generator=generator)
    for item, (ones, stored) in enumerate(
        zip(to_flat_csr(mask, **place), to_flat_csr(mask, values=values, **place), strict=True)
    ):
        assert ones.layout == torch.sparse_csr
        assert torch.equal(ones.to_dense(), flat[item].float())
        assert stored.values().numel() == dense[item].sum()
        expected = (values[item] * dense[item]).transpose(0, 1).flatten(1)
        assert torch.equal(stored.to_dense(), expected)


def test_runs_and_window_by_hand():
    # One head, 12 keys, runs of 2, window of 2 before the own run. Row 11 (own run 10) has keys 8 to 11 in its window.
    starts = torch.full((1, 1, 12, 2), -1, dtype=torch.int32)
    starts[0, 0, 11] = torch.tensor([0, 4])
    starts[0, 0, 6] = torch.tensor([2, -1])  # own run 6, window from 4
    mask = RunMask(starts, width=2, window=2)
    dense = to_dense(mask, num_keys=12, causal=True)[0, 0]
    assert dense[11].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 8, 9, 10, 11]
    assert dense[6].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]
    assert dense[0].nonzero()[:, 0].tolist() == [0]
    assert torch.equal(count_keys(mask, num_keys=12, causal=True)[0, 0], dense.sum(-1))


def test_runs_without_a_window_end_at_the_last_key():
    starts = torch.tensor([0, 8]).int().expand(1, 1, 10, 2)
    mask = RunMask(starts, width=4)
    assert count_keys(mask, num_keys=10, causal=True)[0, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 5, 6]
    assert count_keys(mask, num_keys=10, causal=False)[0, 0].tolist() == [6] * 10


def test_shared_rows_count_no_key_twice():
    # Rows 4 to 7 share one estimate: their window reaches from key 4 to themselves, over the run that starts there.
    starts = torch.tensor([0, 4]).int().expand(1, 1, 8, 2)
    mask = RunMask(starts, width=4, window=0, stride=4)
    dense = to_dense(mask, num_keys=8, causal=True)
    assert torch.equal(count_keys(mask, num_keys=8, causal=True), dense.sum(-1))
    assert dense[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_errors_name_the_argument():
    mask = BinMask(torch.zeros(1, 2, 4, 1, dtype=torch.int32), K, "relative")
    with pytest.raises(ValueError, match="values has shape"):
        to_flat_csr(mask, num_keys=4, causal=True, values=torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match="num_keys is 3"):
        count_keys(mask, num_keys=3, causal=True)
    with pytest.raises(TypeError, match="mask is a Tensor"):
        to_dense(mask.bits, num_keys=4, causal=True)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        to_dense(mask, num_keys=4, causal=True, attention_mask=torch.ones(1, 5))
