"""The first stage layer by layer against the same losses over all layers at once, and what it keeps alive."""

import weakref

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from tiny import RandomData

from lightning_sea import adapt
from lightning_sea.distillation import DistillationConfig, estimation_losses, mean_over_layers, weighted_sum
from lightning_sea.recorder import AttentionRecorder
from lightning_sea.tasks import CausalLMModule, GLUEModule, layerwise
from lightning_sea.tasks.layerwise import with_gradients_alone


@pytest.fixture(params=["lm", "classifier"])
def build(request, bert_dir, llama_dir, sea, tmp_path):
    """Function of arguments to a module that is ready for a training step, and a batch of data."""

    def build(**arguments):
        torch.manual_seed(0)  # SEA's own parameters start at random
        arguments = {"sea": sea, "estimator_steps": 1, **arguments}
        causal = request.param == "lm"
        module = CausalLMModule(llama_dir, **arguments) if causal else GLUEModule(bert_dir, task="sst2", **arguments)
        module.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
        data = RandomData(causal=causal)
        return module, data.collate(data.items[:4])

    return build


def losses_at_once(module, batch):
    """Losses of all layers, and their weighted sum, with one graph for all of them."""
    with torch.no_grad(), AttentionRecorder(module.teacher) as recorder:
        module._forward(module.teacher.base_model, batch)
    losses = []
    for index, layer in zip(module.student.sea_conversion.layers, adapt.sea_layers(module.student), strict=True):
        seen = recorder.records[index]
        place = {"scaling": seen.scaling, "attention_mask": seen.attention_mask}
        losses.append(estimation_losses(seen, layer.estimate(seen.query, seen.key, seen.value, **place)))
    losses = mean_over_layers(losses)
    return losses, weighted_sum(losses, module.distillation)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("layers", [None, [1]])
def test_losses_and_gradients_are_those_of_all_layers_at_once(build, layers):
    module, batch = build(layers=layers)
    expected, expected_loss = losses_at_once(module, batch)
    losses, loss = module._estimator_losses(batch)
    assert losses == expected
    torch.testing.assert_close(loss, expected_loss)
    assert not any(loss.requires_grad for loss in losses.values())
    expected, actual = gradients(module, 3 * expected_loss), gradients(module, 3 * loss)
    assert set(actual) == set(expected)
    assert any(grad.any() for grad in actual.values())
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name])


def test_losses_without_weight_are_left_out(build):
    module, batch = build(distillation=DistillationConfig(est_kl=0.0, est_mse=2.0))
    losses, loss = module._estimator_losses(batch)
    assert set(losses) == {"est_mse"}
    torch.testing.assert_close(loss, 2 * losses["est_mse"])


@pytest.mark.parametrize("keep_records", [False, True])
def test_nothing_of_a_layer_outlives_it(build, monkeypatch, keep_records):
    module, batch = build()
    module.keep_records = keep_records
    tensors, alive = [], []

    def watch(record, estimate):
        alive.append(sum(tensor() is not None for tensor in tensors))
        tensors.extend(weakref.ref(tensor) for tensor in (record.query, record.key, record.value, estimate.scores))
        return estimation_losses(record, estimate)

    monkeypatch.setattr(layerwise, "estimation_losses", watch)
    module._estimator_losses(batch)
    assert alive == ([0, 4] if keep_records else [0, 0])
    assert len(module.layer_records) == (2 if keep_records else 0)


def test_gradients_keep_their_size_whatever_the_scale():
    """In half precision the way back through a product loses small gradients unless they are scaled up on it."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    unused = torch.nn.Parameter(torch.tensor(5.0))
    for scale, survives in ((1.0, False), (2.0**15, True)):
        loss = (weight.half() * 1e-4).float().sum() * 1e-5
        reduced = with_gradients_alone(loss, [weight, unused], torch.tensor(scale))
        assert reduced == loss.detach()
        (grad, none) = torch.autograd.grad(7 * reduced, [weight, unused], allow_unused=True)
        assert none is None
        torch.testing.assert_close(grad, torch.full((2,), 7e-9 if survives else 0.0), rtol=1e-2, atol=0)


def test_a_gradient_scaler_sees_its_scale_once(build):
    module, batch = build()
    expected = gradients(module, module._estimator_losses(batch)[1])
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module.trainer = Trainer(accelerator="cpu", logger=False, plugins=[plugin])
    _, loss = module._estimator_losses(batch)  # outside autocast: the scale is the only difference
    actual = gradients(module, plugin.scaler.scale(loss))
    assert set(actual) == set(expected)
    for name, grad in actual.items():
        torch.testing.assert_close(grad, 1024 * expected[name])
