"""Training the baselines, and the dense model with a teacher: losses, checkpoints, callbacks, errors."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from tiny import RandomData

from lightning_sea.adapt import sea_layers
from lightning_sea.callbacks import AttentionMapLogger, ProjectionRedraw, SparsityMonitor
from lightning_sea.config import SEAConfig
from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import CausalLMModule, GLUEModule, OptimizerConfig

METHODS = ("performer", "cosformer", "window")
SHARED = DistillationConfig(est_kl=0.0, est_mse=0.0, attn_kl=0.0, attn_mse=0.0, context=0.0)


@pytest.fixture(params=["lm", "classifier"])
def build(request, bert_dir, llama_dir):
    """Function of the module's arguments to a module and its data."""

    def make(**arguments):
        torch.manual_seed(0)
        arguments["optimizer"] = OptimizerConfig(lr=1e-3, schedule="constant")
        if request.param == "lm":
            return CausalLMModule(**{"model": llama_dir, **arguments}), RandomData(causal=True)
        return GLUEModule(**{"model": bert_dir, "task": "sst2", **arguments}), RandomData(causal=False)

    make.directory = llama_dir if request.param == "lm" else bert_dir
    return make


class Losses(Callback):
    """Keeps what the module logs in every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module, data, steps, tmp_path, *callbacks, **options) -> tuple[Trainer, list[dict[str, float]]]:
    losses = Losses()
    defaults = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "callbacks": [losses, *callbacks],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "limit_val_batches": 0,
    }
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, data)
    return trainer, losses.steps


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_baselines_learn_from_their_teacher(build, method, tmp_path):
    module, data = build(sea=SEAConfig(method=method, k=6), distillation=SHARED)
    before = weights(module)
    data.batch_size = len(data.items)  # the same items in every step
    trainer, losses = fit(module, data, 15, tmp_path)
    assert set(losses[0]) == {"train/loss", "train/hidden", "train/logit", "train/task"}
    assert losses[-1]["train/loss"] < 0.9 * losses[0]["train/loss"]
    assert not [name for name, value in weights(module).items() if torch.equal(value, before[name])]
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "some.ckpt")
    assert loaded.student.sea_conversion.config.method == method
    (measured,) = trainer.test(module, data, verbose=False)
    assert trainer.test(loaded, data, verbose=False) == [measured]


def test_losses_of_queries_keys_and_context_apply_to_baselines_and_those_of_estimates_do_not(build, tmp_path):
    module, data = build(sea=SEAConfig(method="window", k=6), distillation=DistillationConfig())
    _, losses = fit(module, data, 1, tmp_path)
    names = {"loss", "attn_kl", "attn_mse", "context", "hidden", "logit", "task"}
    assert set(losses[0]) == {f"train/{name}" for name in names}


def test_a_dense_model_with_a_teacher_is_distilled(build, tmp_path):
    # the experiment's estimator_steps may stay: a dense model has no such stage
    module, data = build(attention="dense", teacher=build.directory, distillation=SHARED, estimator_steps=2)
    before = weights(module)
    trainer, losses = fit(module, data, 3, tmp_path)
    assert set(losses[0]) == {"train/loss", "train/hidden", "train/logit", "train/task"}
    # it starts as its own teacher and moves away on the task alone
    assert losses[0]["train/hidden"] == pytest.approx(0.0, abs=1e-9)
    assert losses[0]["train/logit"] == pytest.approx(0.0, abs=1e-6)
    assert losses[2]["train/hidden"] > 1e-6
    for step in losses:
        terms = {name: getattr(SHARED, name) * step[f"train/{name}"] for name in ("hidden", "logit", "task")}
        assert step["train/loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
    assert not module.teacher.training
    teacher = dict(module.teacher.named_parameters())
    assert all(torch.equal(teacher[name.removeprefix("student.")], value) for name, value in before.items())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "some.ckpt")
    assert loaded.distils
    (measured,) = trainer.test(module, data, verbose=False)
    assert trainer.test(loaded, data, verbose=False) == [measured]


def test_a_dense_model_without_a_teacher_learns_its_task_alone(build, tmp_path):
    module, data = build(attention="dense", distillation=SHARED)
    _, losses = fit(module, data, 1, tmp_path)
    assert set(losses[0]) == {"train/loss", "train/task"}
    with pytest.raises(ValueError, match="attention is 'dense' and teacher is null"):
        _ = module.teacher


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_find_nothing_to_show_and_redraw_features(build, method, tmp_path):
    module, data = build(sea=SEAConfig(method=method, k=6, redraw_interval=2), distillation=SHARED)
    pictures = AttentionMapLogger()
    callbacks = pictures, SparsityMonitor(), ProjectionRedraw()
    start = [buffer.clone() for layer in sea_layers(module.student) for buffer in layer.buffers()]
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "limit_val_batches": 1}
    trainer, _ = fit(module, data, 3, tmp_path, *callbacks, **options)
    logged = {name.rsplit("/", 1)[-1] for name in trainer.callback_metrics}
    assert {"loss", "hidden"} <= logged
    assert not logged & {"keys_per_query", "density", "kept_mass", "prob_scale", "mix_scale"}
    assert pictures.written == []
    end = [buffer for layer in sea_layers(module.student) for buffer in layer.buffers()]
    assert len(end) == (2 if method == "performer" else 0)
    assert not any(torch.equal(a, b) for a, b in zip(start, end, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_stages_and_weights_without_an_estimator_are_refused(build, method):
    config = SEAConfig(method=method)
    with pytest.raises(ValueError, match=f"estimator_steps is 3 with method='{method}', which has no estimator"):
        build(sea=config, estimator_steps=3)
    alone = dict.fromkeys(("attn_kl", "attn_mse", "context", "hidden", "logit", "task"), 0.0)
    with pytest.raises(ValueError, match=f"est_kl and est_mse alone, and '{method}' attention has no estimator"):
        build(sea=config, distillation=DistillationConfig(**alone))


def test_an_exported_baseline_keeps_its_method(build, tmp_path):
    module, data = build(sea=SEAConfig(method="window", k=6), distillation=SHARED, export_dir=str(tmp_path / "model"))
    fit(module, data, 1, tmp_path)
    options = {"model": str(tmp_path / "model"), "teacher": build.directory}
    loaded, _ = build(sea=SEAConfig(method="window", k=9), **options)
    assert sea_layers(loaded.student)[0].config == SEAConfig(method="window", k=9)
    with pytest.raises(ValueError, match="'method': 'sea'"):
        build(sea=SEAConfig(), **options)
