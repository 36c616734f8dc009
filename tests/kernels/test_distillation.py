"""The losses of distillation against the formulas over dense T x T maps."""

import pytest
import torch

from sea_kernels import attention_loss, chunks, estimation_loss, teacher_statistics
from sea_kernels.bins import bin_of
from sea_kernels.spans import row_spans

K = 32
SIDES = [(0, 0), (5, 0), (0, 6), (9, 4)]
CASES = [  # causal, queries, keys
    (True, 40, 40),
    (True, 9, 75),
    (True, 20, 20),  # fewer keys than bins
    (False, 66, 66),
    (False, 20, 20),
]


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    """With small chunks, rows are handled four at a time and recomputed in the backward pass."""
    if request.param:
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * 4 * 4 * 20)


def visible_keys(batch, queries, keys, causal, attention_mask):
    """bool [N, 1, T, S]."""
    spans = row_spans(batch, queries, keys, causal=causal, attention_mask=attention_mask)
    place = torch.arange(keys) - spans.start[:, None]
    return ((place >= 0)[:, None] & (place[:, None] < spans.length[..., None]))[:, None], spans


def dense_attention(query, key, visible, scaling):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (scaling * query @ key.mT).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


def dense_distance(teacher, other, visible):
    """KL(teacher || other) and the squared error of every row."""
    real = visible & (teacher > 0)
    ratio = torch.where(real, teacher, 1).log() - torch.where(real, other, 1).log()
    return (teacher * ratio).sum(-1), (other - teacher).square().sum(-1)


def stretched(scores, spans, visible, layout, shift):
    """softmax over K, stretched to the keys and normalised again."""
    place = (torch.arange(visible.shape[-1]) - spans.start[:, None]).clamp_min(0)
    index = bin_of(place[:, None], spans.length[..., None], K, layout, shift)
    index = index[:, None].expand(-1, scores.shape[1], -1, -1)
    estimate = scores.softmax(-1).gather(-1, index).masked_fill(~visible, 0)
    return estimate / estimate.sum(-1, keepdim=True).clamp_min(1e-300)


def random_scores(*shape):
    return 2 * torch.randn(*shape, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def value_and_gradients(losses, inputs):
    weights = torch.rand(2, *losses[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    total = sum((weight * loss).sum() for weight, loss in zip(weights, losses, strict=True))
    return (*losses, *torch.autograd.grad(total, inputs))


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("layout", "shift"), [("relative", 0), ("relative", 150), ("aligned", 0)])
@pytest.mark.parametrize(("causal", "queries", "keys"), CASES)
def test_estimation_loss_is_the_dense_formula(
    random_qkv, padding_mask, chunked, causal, queries, keys, layout, shift, padded
):
    query, key, _ = random_qkv(batch=4, heads=4, groups=2, queries=queries, keys=keys)
    mask = padding_mask(keys, SIDES) if padded else None
    visible, spans = visible_keys(4, queries, keys, causal, mask)
    teacher = dense_attention(query, key, visible, 1.3)
    place = {"layout": layout, "causal": causal, "attention_mask": mask, "shift": shift}

    statistics = teacher_statistics(query, key, num_bins=K, scaling=1.3, **place)
    scores = random_scores(4, 4, queries).requires_grad_()
    actual = value_and_gradients(estimation_loss(scores, statistics, num_keys=keys, **place), [scores])
    expected = dense_distance(teacher, stretched(scores, spans, visible, layout, shift), visible)
    assert_equal(actual, value_and_gradients(expected, [scores]))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "queries", "keys"), CASES)
def test_attention_loss_is_the_dense_formula(random_qkv, padding_mask, chunked, causal, queries, keys, padded):
    query, key, _ = (tensor.requires_grad_() for tensor in random_qkv(4, 4, 2, queries, keys))
    teacher_query, teacher_key, _ = random_qkv(4, 4, 4, queries, keys, width=7)
    mask = padding_mask(keys, SIDES) if padded else None
    visible, _ = visible_keys(4, queries, keys, causal, mask)
    maps = dense_attention(teacher_query, teacher_key, visible, 0.6), dense_attention(query, key, visible, 0.9)

    losses = attention_loss(
        teacher_query,
        teacher_key,
        query,
        key,
        causal=causal,
        teacher_scaling=0.6,
        scaling=0.9,
        attention_mask=mask,
    )
    actual = value_and_gradients(losses, [query, key])
    assert_equal(actual, value_and_gradients(dense_distance(*maps, visible), [query, key]))
