"""Base of the callbacks that look at attention records: asks the module to keep them only for the batches looked at."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

STAGES = {"train": "train", "validate": "val", "sanity_check": "val", "test": "test", "predict": "predict"}


def stage_name(trainer: Trainer) -> str:
    """The prefix of metric keys: "train", "val" or "test"."""
    return STAGES[trainer.state.stage.value]


def logs_this_step(trainer: Trainer) -> bool:
    """Whether the trainer sends the metrics of the training step under way to a logger."""
    return bool(trainer.loggers) and (trainer.global_step + 1) % trainer.log_every_n_steps == 0


class RecordingCallback(Callback):
    """Sets ``pl_module.keep_records`` before batches that ``wants`` picks and hands them to ``look`` afterwards.

    A module that supports this has ``keep_records: bool`` and fills ``layer_records``, a list of pairs of the teacher's
    and the student's LayerRecord (empty for a dense student), during a step for which it is set; it lets go of them at
    the end of the step. Several such callbacks share one recording.
    """

    def wants(self, trainer: Trainer, batch_index: int) -> bool:
        """Whether to look at this batch; ``trainer.state.stage`` says where we are."""
        raise NotImplementedError

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Use ``pl_module.layer_records``."""
        raise NotImplementedError

    def _before(self, trainer: Trainer, pl_module: LightningModule, batch_index: int) -> None:
        self._wanted = self.wants(trainer, batch_index)
        pl_module.keep_records = pl_module.keep_records or self._wanted

    def _after(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        pl_module.keep_records = False
        if self._wanted:
            self.look(trainer, pl_module, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._before(trainer, pl_module, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._after(trainer, pl_module, batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._before(trainer, pl_module, batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._after(trainer, pl_module, batch)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._before(trainer, pl_module, batch_idx)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._after(trainer, pl_module, batch)
