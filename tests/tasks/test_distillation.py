"""The losses: the authors' numbers, padding, and the formulas by hand."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from lightning_sea.attention import Estimate
from lightning_sea.distillation import (
    DistillationConfig,
    attention_losses,
    estimation_losses,
    hidden_loss,
    layer_losses,
    logit_loss,
    mean_over_layers,
    mean_over_rows,
    weighted_sum,
)
from lightning_sea.recorder import LayerRecord
from sea_kernels import state_loss
from sea_kernels.masks import BinMask

GOLDEN = Path(__file__).parent.parent / "golden"


def make_record(query, key, context=None, estimate=None, *, causal=True, mask=None, scaling=1.0) -> LayerRecord:
    return LayerRecord(query, key, key, context, scaling, mask, causal, estimate)


def make_estimate(scores) -> Estimate:
    bits = torch.zeros(*scores.shape[:3], scores.shape[-1] // 32, dtype=torch.int32)
    gates = torch.ones(scores.shape[:3])
    mask, length = BinMask(bits, scores.shape[-1], "relative"), scores.shape[2]
    return Estimate(scores, mask, gates, gates, "relative", 0, num_keys=length, causal=True)


def test_layer_losses_reproduce_the_authors_numbers():
    with safe_open(GOLDEN / "causal_T20.safetensors", "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("w.")}  # noqa: SIM118
    batch, heads, length, width = golden["q"].shape
    # the teacher's scores are given as such: queries and keys that give them are the scores themselves and the identity
    key = torch.eye(length).expand(batch, heads, length, length)
    context = golden["teacher_context"].view(batch, length, heads, width)
    teacher = make_record(golden["teacher_scores"], key, context)
    student_context = golden["context"].view(batch, length, heads, width)
    estimate = make_estimate(golden["estimated_attention_score"])
    student = make_record(golden["q"], golden["k"], student_context, estimate)
    config = DistillationConfig.paper_opt()
    total = weighted_sum(layer_losses([(teacher, student)], config), config)
    assert float(total) == pytest.approx(float(golden["loss"]), rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_no_loss(causal):
    """One item alone, and the same item padded on the right beside a longer one: its part of the mean is the same."""
    generator = torch.Generator().manual_seed(0)
    config = DistillationConfig()
    query, key, own = torch.randn(3, 2, 2, 10, 8, generator=generator)
    scores = torch.randn(2, 2, 10, 32, generator=generator)
    contexts = torch.randn(2, 2, 10, 2, 8, generator=generator)

    def losses(items: slice, length: int, mask) -> dict:
        teacher = make_record(
            query[items, :, :length], key[items, :, :length], contexts[0, items, :length], causal=causal, mask=mask
        )
        estimate = make_estimate(scores[items, :, :length])
        student = make_record(
            own[items, :, :length],
            key[items, :, :length],
            contexts[1, items, :length],
            estimate,
            causal=causal,
            mask=mask,
        )
        found = layer_losses([(teacher, student)], config)
        states = [contexts[0, items, :length], contexts[1, items, :length]]
        found["hidden"] = hidden_loss(states[:1], states[1:], mask, config)
        return found

    mask = torch.arange(10) < torch.tensor([[6], [10]])
    together, first, second = losses(slice(2), 10, mask), losses(slice(1), 6, None), losses(slice(1, 2), 10, None)
    assert set(together) == {"est_kl", "est_mse", "attn_kl", "attn_mse", "context", "hidden"}
    for name, loss in together.items():
        assert float(loss) == pytest.approx(float((first[name] + second[name]) / 2), rel=1e-5), name


@pytest.mark.parametrize("mask", [None, torch.arange(10) < torch.tensor([[6], [10]])])
def test_losses_of_several_layers_are_their_means(mask):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for scores in (None, *torch.randn(2, 2, 2, 10, 32, generator=generator)):
        query, key, own = torch.randn(3, 2, 2, 10, 8, generator=generator)
        contexts = torch.randn(2, 2, 10, 2, 8, generator=generator)
        estimate = None if scores is None else make_estimate(scores)
        teacher = make_record(query, key, contexts[0], mask=mask)
        layers.append((teacher, make_record(own, key, contexts[1], estimate, mask=mask)))
    config = DistillationConfig()
    together = layer_losses(layers, config)
    alone = mean_over_layers([layer_losses([layer], config) for layer in layers])
    assert together.keys() == alone.keys() == {"est_kl", "est_mse", "attn_kl", "attn_mse", "context"}
    for name, loss in together.items():
        torch.testing.assert_close(loss, alone[name], msg=name)
    assert layer_losses([], config) == {}


def test_attention_losses_are_zero_for_the_teachers_own_scores_and_learn_otherwise():
    query, key = torch.randn(2, 1, 2, 7, 4, generator=torch.Generator().manual_seed(0))
    teacher = make_record(query, key)
    same = attention_losses(teacher, make_record(2 * query, key, scaling=0.5))
    assert all(abs(float(loss)) < 1e-6 for loss in same.values())
    own = (query + 0.5).requires_grad_()
    teacher_query = query.clone().requires_grad_()
    losses = attention_losses(make_record(teacher_query, key), make_record(own, key))
    sum(losses.values()).backward()
    assert own.grad.abs().sum() > 0
    assert teacher_query.grad is None


def test_estimation_losses_reach_the_scores_only():
    query, key = (tensor.requires_grad_() for tensor in torch.randn(2, 1, 2, 7, 4))
    scores = torch.randn(1, 2, 7, 32, requires_grad=True)
    sum(estimation_losses(make_record(query, key), make_estimate(scores)).values()).backward()
    assert scores.grad.abs().sum() > 0
    assert query.grad is None
    assert key.grad is None


def test_means_by_hand():
    values = torch.tensor([[1.0, 3.0, float("nan")], [4.0, 6.0, 8.0]])
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_over_rows(values, real) == pytest.approx((2 + 6) / 2)
    assert mean_over_rows(values[1:, None].expand(-1, 5, -1), real[1:]) == pytest.approx(6)
    assert mean_over_rows(values[1:], None) == pytest.approx(6)
    layers = [{"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, {"b": torch.tensor(4.0)}]
    assert {name: float(loss) for name, loss in mean_over_layers(layers).items()} == {"a": 1.0, "b": 3.0}


def test_state_loss_by_hand():
    teacher, student = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert state_loss([teacher], [student], attention_mask=None, relative=False) == pytest.approx(1 / 4)
    assert state_loss([teacher], [student], attention_mask=None, relative=True) == pytest.approx(1 / 8)
    real = torch.tensor([[True, False]])
    assert state_loss([teacher], [student], attention_mask=real, relative=False) == pytest.approx(1 / 2)
    assert state_loss([teacher], [student], attention_mask=real, relative=True) == pytest.approx(1 / 4)


def test_logit_loss_is_a_divergence_or_a_squared_error():
    teacher, student = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    target = torch.distributions.Categorical(logits=teacher)
    divergence = torch.distributions.kl_divergence(target, torch.distributions.Categorical(logits=student))
    torch.testing.assert_close(logit_loss(teacher, student), divergence.mean())
    real = torch.arange(5) < 4
    torch.testing.assert_close(logit_loss(teacher, student, real.expand(3, 5)), divergence[:, :4].mean())
    torch.testing.assert_close(logit_loss(teacher[:, 0], student[:, 0]), divergence[:, 0].mean())
    one_output = F.mse_loss(student[:, 0, :1], teacher[:, 0, :1])
    torch.testing.assert_close(logit_loss(teacher[:, 0, :1], student[:, 0, :1]), one_output)
