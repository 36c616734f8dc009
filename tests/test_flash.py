"""Flash attention with its log-sum-exps, by itself and where a recorder asks for it."""

import pytest
import torch
from families import tiny_model, token_ids
from torch.nn import functional as F

from lightning_sea.adapt import convert
from lightning_sea.config import SEAConfig
from lightning_sea.distillation import DistillationConfig, only_what_losses_read
from lightning_sea.flash import attend_with_log_sum
from lightning_sea.recorder import AttentionRecorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5 if DEVICE == "cuda" else 2e-4  # the CPU approximates exp in half precision


def log_sums(query, key, *, causal, scaling):
    """In float64 from ``[N, H, T, D]`` and ``[N, G, T, D]``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = scaling * query.double() @ key.double().mT
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.logsumexp(-1)


def tensors(dtype, heads=4, groups=2, queries=37, keys=37, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, width), (2, groups, keys, width), (2, groups, keys, width)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("causal", "queries"), [(True, 37), (False, 37), (False, 1)])
@pytest.mark.parametrize("groups", [2, 4])
def test_context_and_log_sums(groups, causal, queries, dtype):
    query, key, value = tensors(dtype, groups=groups, queries=queries)
    context, log_sum = attend_with_log_sum(query, key, value, causal=causal, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3, enable_gqa=True)
    assert context.dtype == dtype
    if DEVICE == "cpu":
        assert torch.equal(context, expected)
    else:
        torch.testing.assert_close(context, expected, rtol=2e-2, atol=2e-2)
    assert log_sum.dtype == torch.float32
    torch.testing.assert_close(
        log_sum.double(), log_sums(query, key, causal=causal, scaling=0.3), rtol=0, atol=TOLERANCE
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="flash attention on a GPU takes half precision only")
def test_float32_log_sums_on_a_cpu():
    query, key, value = tensors(torch.float32)
    _, log_sum = attend_with_log_sum(query, key, value, causal=True, scaling=0.3)
    torch.testing.assert_close(log_sum.double(), log_sums(query, key, causal=True, scaling=0.3), rtol=0, atol=1e-5)


def test_none_where_flash_attention_does_not_run():
    double = tensors(torch.float64)
    assert attend_with_log_sum(*double, causal=True, scaling=0.3) is None
    query, key, value = tensors(torch.bfloat16)
    assert attend_with_log_sum(query, key, value[..., :8], causal=True, scaling=0.3) is None


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_recorded_log_sums_are_those_of_the_recorded_scores(family):
    model = tiny_model(family).to(DEVICE, torch.bfloat16)
    ids = token_ids(2, 20).to(DEVICE)
    with torch.no_grad(), AttentionRecorder(model, log_sums=True) as recorder:
        model(input_ids=ids)
    for record in recorder.records:
        expected = log_sums(record.query, record.key, causal=record.causal, scaling=record.scaling)
        torch.testing.assert_close(record.log_sum.double(), expected, rtol=0, atol=TOLERANCE)
    unread = DistillationConfig(est_kl=0, est_mse=0, attn_kl=0, attn_mse=0)
    assert only_what_losses_read(recorder.records[0], unread).log_sum is None
    assert only_what_losses_read(recorder.records[0], DistillationConfig()).log_sum is not None


def test_no_log_sums_unless_asked_for_nor_with_padding_nor_of_sea():
    model, ids = tiny_model("llama").to(DEVICE, torch.bfloat16), token_ids(2, 20).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def recorded(mask=None, **options):
        with torch.no_grad(), AttentionRecorder(model, **options) as recorder:
            model(input_ids=ids, attention_mask=mask)
        return [record.log_sum is not None for record in recorder.records]

    assert recorded(log_sums=True) == [True, True]
    assert recorded() == [False, False]
    assert recorded(mask, log_sums=True) == [False, False]
    convert(model, SEAConfig(k=6, predictor_length=32), layers=[1])
    assert recorded(log_sums=True) == [True, False]
