"""Heads with budgets of their own, found before the first step."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..adapt import sea_layers
from ..budgets import calibrate_budgets


class HeadBudgetCalibration(Callback):
    """Shares the budget of k keys among all heads when a training begins, see ``budgets.calibrate_budgets``.

    The first batches of the data module's training data decide, on every process those of the first one. A training
    that resumes has its budgets from the checkpoint. A model without budgets, such as a dense one or another method's,
    is left as it is, and the log says so: one experiment's callbacks serve all methods that it compares.

    Args:
        batches: how many, at least 1.
    """

    def __init__(self, batches: int = 4) -> None:
        if batches < 1:
            raise ValueError(f"batches is {batches}, expected at least 1")
        self.batches = batches

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return
        layers = [layer for layer in sea_layers(pl_module.student) if hasattr(layer, "budgets")]
        if not layers:
            rank_zero_info("HeadBudgetCalibration: no layer of the model has budgets, so there is nothing to share.")
            return
        if trainer.datamodule is None:
            raise ValueError("HeadBudgetCalibration takes its batches from a data module: pass one to trainer.fit")
        with trainer.precision_plugin.forward_context():
            calibrate_budgets(pl_module.student, self._inputs(trainer, pl_module))
        for layer in layers:
            layer.budgets.assign(trainer.strategy.broadcast(layer.budgets.share))

    def _inputs(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[str, Any]]:
        generator = torch.get_rng_state()  # a loader draws a seed for its workers
        for batch in islice(trainer.datamodule.train_dataloader(), self.batches):
            batch = trainer.strategy.batch_to_device(batch)
            inputs = {name: batch[name] for name in pl_module.input_names if name in batch}
            yield inputs | pl_module.forward_options
        torch.set_rng_state(generator)
