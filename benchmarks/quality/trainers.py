"""Trainers of the quality tables: one device, no logger, no checkpoints, no validation."""

import random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_sea.adapt import set_k

SPARSITY = {  # column to metric
    "keys_per_row": "keys_per_query",
    "pooled_per_row": "pooled_per_query",
    "kept_mass": "kept_mass",
    "density": "density",
}


class ResidentStrategy(SingleDeviceStrategy):
    """Leaves the model on the device when a trainer is done.

    The usual teardown moves it to the CPU and empties the allocator's cache; after each of many tests of one model that
    takes longer than the test.
    """

    def teardown(self) -> None:
        self.precision_plugin.teardown()


class DrawnK(Callback):
    """Every training step keeps as many keys as it draws, the same numbers under the same seed.

    Args:
        choices: values of k.
        seed: of the numbers.
    """

    def __init__(self, choices: list[int], seed: int) -> None:
        self.choices, self.generator = choices, random.Random(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        set_k(pl_module.student, self.generator.choice(self.choices))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def trainer(callbacks: list, **changes) -> Trainer:
    """A trainer for one fit, or for any number of tests of one model."""
    return Trainer(
        accelerator="auto",
        devices=1,
        strategy=ResidentStrategy(device()),
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **changes,
    )


def sparsity(found: dict[str, float]) -> dict[str, float]:
    """Columns of what SEA kept, of those metrics that a test logged."""
    return {column: round(found[f"test/{name}"], 4) for column, name in SPARSITY.items() if f"test/{name}" in found}
