"""Training for any budget: every step keeps as many keys as it draws, so that its k may be chosen afterwards."""

import random
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..adapt import set_k


class DrawnBudget(Callback):
    """Draws the k of every training step, for a model that will be used with several.

    Between steps, and so in validation and in what is saved, the model has the k of its configuration. A draw depends
    on ``seed`` and the optimiser step alone: all ranks, all batches that accumulate, and a run that resumes draw the
    same. A dense model is left as it is, and the log says so. After two looks every k compiles kernels of its own.

    Args:
        choices: the values of k, at least one, each at least 1.
        seed: of the draws.
    """

    def __init__(self, choices: list[int], seed: int = 0) -> None:
        if not choices or min(choices) < 1:
            raise ValueError(f"choices is {choices}, expected at least one k of at least 1")
        self.choices, self.seed = list(choices), seed
        self._configured: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module.student, "sea_conversion"):
            rank_zero_info("DrawnBudget: the model is dense and has no k to draw.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if hasattr(pl_module.student, "sea_conversion"):
            self._configured = pl_module.student.sea_conversion.config.k
            set_k(pl_module.student, random.Random(f"{self.seed} {trainer.global_step}").choice(self.choices))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._configured is not None:
            set_k(pl_module.student, self._configured)
            self._configured = None
