"""The kernels train as the PyTorch forms do: the same losses in every step, of both stages.

On a GPU the embedded language model learns for fifty steps; in the interpreter a tiny one for a few.
"""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny import RandomData

from lightning_sea import distillation
from lightning_sea.config import SEAConfig
from lightning_sea.data import TextDataModule
from lightning_sea.tasks import CausalLMModule, OptimizerConfig

GPU = torch.cuda.is_available()
STEPS, ESTIMATOR_STEPS = (50, 10) if GPU else (5, 2)
# How far a loss may lie from the reference's, relative and absolute: rounding changes here and there what a row keeps.
BANDS = {"32-true": (0.02, 1e-6), "bf16-mixed": (0.05, 1e-4)} if GPU else {"32-true": (1e-3, 1e-6)}
LOSSES = ("teacher_statistics", "estimation_loss", "attention_loss")


class Curve(Callback):
    """All losses of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def setting(llama_dir):
    """Model, configuration of SEA, and data that is long enough for wide bins and a far field."""
    if GPU:
        data = TextDataModule("embedded:lm", source="embedded", seq_len=512, batch_size=4)
        return "embedded:lm", SEAConfig(k=32, predictor_length=64, first_look_ratio=4), data
    config = SEAConfig(k=6, predictor_length=32, first_look_ratio=1)  # the interpreter is slow
    return llama_dir, config, RandomData(causal=True, size=1, batch_size=1, seq_len=34)


def train(monkeypatch, llama_dir, tmp_path, backend, precision) -> list[dict[str, float]]:
    """The losses of every step with one backend, of the operations and of the losses alike."""
    torch.manual_seed(0)
    model, config, data = setting(llama_dir)
    optimizer = OptimizerConfig(lr=1e-4 if GPU else 1e-3, sea_lr_factor=30.0 if GPU else 10.0, schedule="constant")
    module = CausalLMModule(
        model,
        sea=config.replace(backend=backend),
        estimator_steps=ESTIMATOR_STEPS,
        optimizer=optimizer,
        layers=None if GPU else [1],
    )
    curve = Curve()
    trainer = Trainer(
        accelerator="gpu" if GPU else "cpu",
        devices=1,
        precision=precision,
        max_steps=STEPS,
        callbacks=[curve],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
    )
    with monkeypatch.context() as patch:
        for name in LOSSES:
            patch.setattr(distillation.ops, name, partial(getattr(distillation.ops, name), backend=backend))
        trainer.fit(module, data)
    return curve.steps


@pytest.mark.slow
@pytest.mark.parametrize("precision", BANDS)
def test_kernels_train_as_the_reference_does(monkeypatch, llama_dir, tmp_path, precision):
    relative, absolute = BANDS[precision]
    kernels, reference = (
        train(monkeypatch, llama_dir, tmp_path, backend, precision) for backend in ("triton", "reference")
    )
    assert len(kernels) == len(reference) == STEPS
    for step, (ours, theirs) in enumerate(zip(kernels, reference, strict=True)):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=relative, abs=absolute), f"step {step}"
    assert kernels != reference  # not one backend twice
    first, last = reference[ESTIMATOR_STEPS], reference[-1]
    change = {name: abs(last[name] - loss) / max(abs(loss), absolute) for name, loss in first.items()}
    assert max(change.values()) > 5 * relative, "the losses stay where they were: there is nothing to agree about"
