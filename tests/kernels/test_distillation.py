"""The losses of distillation against the formulas over dense T x T maps."""

import pytest
import torch

from sea_kernels import (
    attention_loss,
    chunks,
    estimation_loss,
    kept_mass,
    select_bins,
    teacher_statistics,
    to_dense,
)
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


def test_published_loss(golden):
    """L_est + L_attn + L_ctx of the published implementation, from rows and their reduction."""
    causal, scaling, mask = golden["causal"], golden["scaling"], golden["attention_mask"]
    length = golden["q"].shape[2]
    place = {"causal": causal, "attention_mask": mask}
    # A query times the identity is a row of the teacher's scores.
    identity = torch.eye(length).expand(2, 2, length, length)
    teacher = golden["teacher_scores"], identity

    statistics = teacher_statistics(*teacher, num_bins=K, layout="relative", scaling=1.0, **place)
    estimation = estimation_loss(golden["estimated_attention_score"], statistics, layout="relative", **place)
    attention = attention_loss(*teacher, golden["q"], golden["k"], teacher_scaling=1.0, scaling=scaling, **place)
    total = (golden["context"] - golden["teacher_context"]).square().mean()
    for rows in (estimation, attention):
        kl, square_error = published_means(*rows, **place)
        total = total + 0.1 * kl + square_error
    total = total + padding_square_error(golden)
    torch.testing.assert_close(total, golden["loss"], rtol=0, atol=1e-5)


def published_means(kl, square_error, *, causal, attention_mask):
    """KL over real rows (heads add up where attention is bidirectional), squared error over the whole T x T square."""
    rows = attention_mask.sum() * (kl.shape[1] if causal else 1)
    return kl.sum() / rows, square_error.sum() / (square_error.numel() * kl.shape[2])


def padding_square_error(golden):
    """What the published mean also counts: padding rows, which see the real keys there."""
    mask, rows = golden["attention_mask"], ~golden["attention_mask"]
    if golden["causal"]:
        assert mask.all()
        return 0.0
    length = mask.sum(-1)[:, None].expand(mask.shape)
    visible = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
    place = torch.arange(mask.shape[1])
    index = bin_of(place[None, None], length[..., None], K, "relative")[:, None].expand(-1, 2, -1, -1)
    teacher = golden["teacher_scores"].masked_fill(~visible, -torch.inf).softmax(-1)
    estimate = golden["estimated_attention_score"].gather(-1, index).masked_fill(~visible, -torch.inf).softmax(-1)
    scores = golden["scaling"] * golden["q"] @ golden["k"].mT
    student = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    error = (estimate - teacher).square().sum(-1) + (student - teacher).square().sum(-1)
    return (error * rows[:, None]).sum() / teacher.numel()


@pytest.mark.parametrize("layout", ["relative", "aligned"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(random_qkv, padding_mask, causal, layout):
    query, key, _ = random_qkv(queries=40)
    scores = random_scores(2, 4, 40)
    padded = [torch.nn.functional.pad(tensor, (0, 0, 5, 8), value=3.0) for tensor in (query, key, scores)]
    results = []
    for (q, k, y), mask in (((query, key, scores), None), (padded, padding_mask(53, [(5, 8)] * 2))):
        place = {"causal": causal, "attention_mask": mask}
        statistics = teacher_statistics(q, k, num_bins=K, layout=layout, scaling=1.0, **place)
        losses = estimation_loss(y, statistics, layout=layout, **place)
        losses += attention_loss(q, k, y[..., :8], y[..., 8:16], teacher_scaling=1.0, scaling=0.3, **place)
        results.append((*statistics, *losses))
    for plain, inside in zip(*results, strict=True):
        torch.testing.assert_close(inside[:, :, 5:45], plain, rtol=1e-12, atol=1e-12)
        assert not inside[:, :, :5].any()
        assert not inside[:, :, 45:].any()


def test_later_tokens_change_nothing(random_qkv):
    query, key, _ = random_qkv(queries=60)
    before, after = [], []
    for results in (before, after):
        if results is after:
            query[:, :, 30:] += 1
            key[:, :, 30:] -= 1
        statistics = teacher_statistics(query, key, num_bins=K, layout="aligned", causal=True, scaling=1.0)
        losses = attention_loss(query, key, key[:, [0, 0, 1, 1]], query, causal=True, teacher_scaling=1.0, scaling=1.0)
        results.extend((*statistics, *losses))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :, :30], other[:, :, :30])
        assert not torch.equal(one[:, :, 30:], other[:, :, 30:])


def test_perfect_estimates_cost_nothing(random_qkv):
    """With a bin for every key, the logarithm of the teacher's own map has no loss, whatever is added to a row."""
    query, key, _ = random_qkv(queries=K)
    place = {"layout": "aligned", "causal": True}
    statistics = teacher_statistics(query, key, num_bins=K, scaling=1.0, **place)
    scores = statistics.mass.clamp_min(1e-300).log() + torch.randn(2, 4, K, 1, dtype=torch.float64)
    for loss in estimation_loss(scores, statistics, **place):
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    losses = attention_loss(query, key, query, key, causal=True, teacher_scaling=1.0, scaling=1.0)
    for loss in losses:
        assert not loss.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(random_qkv, dtype):
    query, key, _ = (tensor.to(dtype) for tensor in random_qkv(queries=40))
    scores = random_scores(2, 4, 40).to(dtype)
    results = []
    for cast in (lambda tensor: tensor, lambda tensor: tensor.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, k, y = cast(query), cast(key), cast(scores)
            statistics = teacher_statistics(q, k, num_bins=K, layout="relative", causal=True, scaling=0.5)
            losses = estimation_loss(y, statistics, layout="relative", causal=True)
            losses += attention_loss(q, k, 2 * q, k, causal=True, teacher_scaling=0.5, scaling=0.5)
        results.append((*statistics, *losses))
    for half, single in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, single)


def test_the_teacher_gets_no_gradient(random_qkv):
    query, key, _ = (tensor.requires_grad_() for tensor in random_qkv(queries=20))
    statistics = teacher_statistics(query, key, num_bins=K, layout="aligned", causal=True, scaling=1.0)
    assert not any(tensor.requires_grad for tensor in statistics)
    losses = attention_loss(query, key, query.detach(), key.detach(), causal=True, teacher_scaling=1.0, scaling=1.0)
    assert not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "queries", "keys"), CASES)
def test_kept_mass_is_the_dense_share(random_qkv, padding_mask, chunked, causal, queries, keys, padded):
    query, key, _ = random_qkv(batch=4, heads=4, groups=2, queries=queries, keys=keys)
    mask = padding_mask(keys, SIDES) if padded else None
    visible, _ = visible_keys(4, queries, keys, causal, mask)
    place = {"causal": causal, "attention_mask": mask}
    bins = select_bins(random_scores(4, 4, queries), k=8, layout="aligned", grouping="query", num_keys=keys, **place)
    actual = kept_mass(query, key, bins, scaling=1.3, **place)
    kept = to_dense(bins, num_keys=keys, **place)
    expected = (dense_attention(query, key, visible, 1.3) * kept).sum(-1)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_errors_name_the_argument(random_qkv):
    query, key, _ = random_qkv(queries=20)
    scores = torch.zeros(2, 4, 20, K)
    place = {"layout": "aligned", "causal": True}
    statistics = teacher_statistics(query, key, num_bins=K, scaling=1.0, **place)
    with pytest.raises(ValueError, match="num_bins is 20"):
        teacher_statistics(query, key, num_bins=20, scaling=1.0, **place)
    with pytest.raises(ValueError, match="log_sum has shape"):
        teacher_statistics(query, key, num_bins=K, scaling=1.0, log_sum=query[..., 0, 0], **place)
    with pytest.raises(ValueError, match="shift is 3"):
        estimation_loss(scores, statistics, shift=3, **place)
    with pytest.raises(ValueError, match=r"statistics\.mass has shape"):
        estimation_loss(scores[:, :, 1:], statistics, num_keys=20, **place)
    with pytest.raises(ValueError, match="teacher_query has shape"):
        attention_loss(query[:, :, 1:], key[:, :, 1:], query, key, causal=True, teacher_scaling=1.0, scaling=1.0)
    with pytest.raises(TypeError, match="mask is a Tensor"):
        kept_mass(query, key, scores, causal=True, scaling=1.0)
    with pytest.raises(NotImplementedError, match="triton"):
        teacher_statistics(query, key, num_bins=K, scaling=1.0, backend="triton", **place)
