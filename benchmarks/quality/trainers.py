"""Trainers of the quality tables: one device, no logger, no checkpoints, no validation."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

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
