"""What training keeps in memory, and what saves some: records, gradient checkpointing, gradient accumulation."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny import RandomData

from lightning_sea.attention import SEAAttention
from lightning_sea.config import SEAConfig
from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import CausalLMModule, GLUEModule, OptimizerConfig, base

NO_LAYERS = dict.fromkeys(("est_kl", "est_mse", "attn_kl", "attn_mse", "context"), 0.0)
JITTERED = SEAConfig(
    k=4,
    predictor_length=32,
    bins="relative",
    decoder="conv",
    first_look_ratio=1,
    average_context="mean",
    jitter_probability=1.0,
)


class FirstGradients(Callback):
    """Keeps the gradients of the first optimiser step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 0:
            pairs = pl_module.named_parameters()
            self.grads = {name: parameter.grad.clone() for name, parameter in pairs if parameter.grad is not None}


@pytest.fixture(params=["lm", "classifier"])
def build(request, bert_dir, llama_dir):
    """Function of the module's arguments to a module; ``build.data`` makes data for it."""
    causal = request.param == "lm"

    def build(**arguments):
        torch.manual_seed(0)
        arguments["optimizer"] = OptimizerConfig(lr=1e-3, schedule="constant")
        if causal:
            return CausalLMModule(llama_dir, **arguments)
        return GLUEModule(bert_dir, task="sst2", **arguments)

    build.data = lambda **arguments: RandomData(causal=causal, **arguments)
    build.directory = llama_dir if causal else bert_dir
    return build


def fit(module, data, tmp_path, steps=2, **options) -> dict[str, torch.Tensor]:
    """Train, and return the gradients of the first step."""
    first = FirstGradients()
    trainer = Trainer(
        max_steps=steps,
        callbacks=[first],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        **{"accelerator": "cpu", **options},
    )
    trainer.fit(module, data)
    return first.grads


def checkpoint(module, *, use_reentrant=False):
    module.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return module


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("method", ["sea", "jittered", "no layer losses", "dense", "first stage"])
def test_gradient_checkpointing_changes_no_gradient(build, sea, tmp_path, method):
    arguments = {
        "sea": {"sea": sea},
        "jittered": {"sea": JITTERED},  # the second run of a layer has to draw the same edges
        "no layer losses": {"sea": sea, "distillation": DistillationConfig(**NO_LAYERS)},
        "dense": {"attention": "dense", "teacher": build.directory},
        "first stage": {"sea": sea, "estimator_steps": 1},
    }[method]
    expected = fit(build(**arguments), build.data(), tmp_path)
    module = checkpoint(build(**arguments))
    runs = []
    for layer in (layer for layer in module.student.modules() if isinstance(layer, SEAAttention)):
        layer.register_forward_hook(lambda *_: runs.append(1))
    actual = fit(module, build.data(), tmp_path)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in actual.items())
    if method != "dense":  # two layers, each forward and again in every step of the second stage
        assert len(runs) == (4 if method == "first stage" else 8)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_that_would_lose_gradients_is_refused(build, sea, tmp_path):
    module = checkpoint(build(sea=sea), use_reentrant=True)
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        fit(module, build.data(), tmp_path)


@pytest.mark.parametrize("estimator_steps", [0, 1])
def test_accumulated_gradients_are_those_of_one_large_batch(build, sea, tmp_path, estimator_steps):
    # no pooled keys: with a bin per key they estimate exactly, and gradients are what rounding leaves
    sea = sea.replace(pooling="none", first_look_ratio=1, average_context="mean")
    arguments = {"sea": sea, "estimator_steps": estimator_steps}
    whole = fit(build(**arguments), build.data(batch_size=4), tmp_path, steps=1)
    parts = fit(build(**arguments), build.data(batch_size=2), tmp_path, steps=1, accumulate_grad_batches=2)
    half = fit(build(**arguments), build.data(batch_size=2), tmp_path, steps=1)
    assert parts.keys() == whole.keys()
    largest = max(grad.abs().max() for grad in whole.values())
    for name, grad in parts.items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=float(1e-5 * largest), msg=name)
    assert any(not torch.allclose(grad, whole[name], rtol=0.1) for name, grad in half.items())


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ({"context": 0.0}, {"query", "key"}),
        ({**NO_LAYERS, "attn_kl": 1.0}, {"query", "key"}),
        ({**NO_LAYERS, "context": 1.0}, {"context"}),
        ({}, {"query", "key", "context"}),
    ],
)
def test_the_teachers_records_hold_what_losses_read(build, sea, tmp_path, monkeypatch, weights, kept):
    seen, original = [], base.layer_losses

    def watch(layers, config):
        for teacher, _ in layers:
            seen.append({name for name in ("query", "key", "value", "context") if getattr(teacher, name) is not None})
        return original(layers, config)

    monkeypatch.setattr(base, "layer_losses", watch)
    module = build(sea=sea, distillation=DistillationConfig(**weights))
    fit(module, build.data(), tmp_path, steps=1)
    assert seen == [kept, kept]
    module.keep_records = True
    seen.clear()
    fit(module, build.data(), tmp_path, steps=1)
    assert seen == [{"query", "key", "value", "context"}] * 2


def test_nothing_is_recorded_for_losses_that_have_no_weight(build, sea, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a model is recorded")

    monkeypatch.setattr(base, "AttentionRecorder", refuse)
    module = build(sea=sea, distillation=DistillationConfig(**NO_LAYERS))
    scores = []
    for layer in (layer for layer in module.student.modules() if isinstance(layer, SEAAttention)):
        layer.register_forward_hook(lambda _, __, output: scores.append(output[1].scores))
    assert fit(module, build.data(), tmp_path, steps=1)
    assert scores == [None, None]
    with pytest.raises(AssertionError, match="a model is recorded"):
        fit(build(sea=sea), build.data(), tmp_path, steps=1)
