"""New random features every so many training steps (Performer, arXiv 2009.14794; the reference does so every 1000)."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..adapt import sea_layers


class ProjectionRedraw(Callback):
    """Redraws the projections of the student's SEA layers every ``config.redraw_interval`` optimiser steps.

    The draw depends on ``seed`` and the step alone: all ranks, and a run that resumes, get the same features. Add this
    callback where features are used; configurations without them are left as they are. Logs nothing.

    Args:
        seed: of the draws, at least 0.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        # mixed down to 32 bits, because PyTorch's CPU generator reads no more of its seed
        mixed = int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        for layer in sea_layers(pl_module.student):
            interval = layer.config.redraw_interval
            if step and interval and step % interval == 0:
                layer.redraw_projection(generator)
