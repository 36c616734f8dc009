"""New random features every so many training steps (Performer, arXiv 2009.14794; the reference does so every 1000)."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..adapt import sea_layers


class ProjectionRedraw(Callback):
    """Redraws the projections of the student's SEA layers every ``config.redraw_interval`` optimiser steps.

    The draw depends on ``seed`` and the step alone: all ranks, and a run that resumes, get the same features. Add this
    callback where features are used; configurations without them are left as they are. Logs nothing.

    Args:
        seed: of the draws, 0 to 2³¹ - 1.
    """

    def __init__(self, seed: int = 0) -> None:
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed is {seed}, expected 0 to 2**31 - 1")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        for layer in sea_layers(pl_module.student):
            interval = layer.config.redraw_interval
            if step and interval and step % interval == 0:
                layer.redraw_projection(generator)
