"""The kernels train as the PyTorch forms do: the same losses in every step, of both stages.

On a GPU the embedded language model learns for fifty steps; in the interpreter a tiny one for a few.
"""

import statistics
from functools import cache, partial
from pathlib import Path

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
BAND = {"rel": 1e-3, "abs": 1e-6}  # how far a loss in fp32 may lie from the reference's, in every step
# In half precision a row keeps another key here and there, which moves the parts of that step's loss by some percent,
# also the reference's own. So they have a band in the median step, and their sum in every step; and over all steps they
# may lie little farther from those in fp32 (root mean square) than the reference's do.
HALF_BAND = 0.01
LARGEST_ERROR_RATIO = 1.5
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


def train(llama_dir: str, directory: Path, backend: str, precision: str) -> list[dict[str, float]]:
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
        default_root_dir=directory,
        limit_val_batches=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in LOSSES:
            patch.setattr(distillation.ops, name, partial(getattr(distillation.ops, name), backend=backend))
        trainer.fit(module, data)
    return curve.steps


def deviation(losses: list[dict[str, float]], exact: list[dict[str, float]], name: str) -> float:
    """Root mean square over the steps that have this loss."""
    squares = [(ours[name] - theirs[name]) ** 2 for ours, theirs in zip(losses, exact, strict=True) if name in theirs]
    return (sum(squares) / len(squares)) ** 0.5


def median_difference(losses: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    """Median over the steps that have this loss, relative."""
    pairs = [(ours[name], theirs[name]) for ours, theirs in zip(losses, others, strict=True) if name in theirs]
    return statistics.median(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def trained(llama_dir, tmp_path_factory):
    """The losses of every step by backend and precision; each run is trained once."""
    return cache(partial(train, llama_dir, tmp_path_factory.mktemp("convergence")))


@pytest.mark.slow
def test_kernels_train_as_the_reference_does(trained):
    kernels, reference = trained("triton", "32-true"), trained("reference", "32-true")
    assert len(kernels) == len(reference) == STEPS
    for step, (ours, theirs) in enumerate(zip(kernels, reference, strict=True)):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, **BAND), f"step {step}"
    assert kernels != reference  # not one backend twice
    first, last = reference[ESTIMATOR_STEPS], reference[-1]
    change = {name: abs(last[name] - loss) / max(abs(loss), BAND["abs"]) for name, loss in first.items()}
    assert max(change.values()) > 5 * BAND["rel"], "the losses stay where they were: there is nothing to agree about"


@pytest.mark.slow
@pytest.mark.skipif(not GPU, reason="the interpreter has no bf16")
def test_half_precision_costs_kernels_what_it_costs_the_reference(trained):
    exact, reference, kernels = (
        trained(*run) for run in (("reference", "32-true"), ("reference", "bf16-mixed"), ("triton", "bf16-mixed"))
    )
    assert kernels != reference
    for step, (ours, theirs) in enumerate(zip(kernels, reference, strict=True)):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=HALF_BAND), f"step {step}"
    medians = {name: median_difference(kernels, reference, name) for name in exact[-1]}
    assert max(medians.values()) <= HALF_BAND, medians
    ratios = {name: deviation(kernels, exact, name) / deviation(reference, exact, name) for name in exact[-1]}
    assert max(ratios.values()) <= LARGEST_ERROR_RATIO, ratios
