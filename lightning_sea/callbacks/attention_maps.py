"""Pictures of attention while training."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ..visualization import attention_matrices, check_index, plot_matrices
from .recording import RecordingCallback


class AttentionMapLogger(RecordingCallback):
    """Draws the first item of the first validation (or test) batch: teacher, estimate, mask and result of some heads.

    Each picture goes to TensorBoard as ``attention/layer_00_head_00``, and as a PNG, its step in the name, to the
    folder ``attention`` of the logger's folder (of the trainer's root folder without one). Layers without an estimate
    (dense ones and baselines) and ranks other than 0 draw nothing.

    Args:
        layers: layers drawn, 0-based.
        heads: query heads drawn of each.
        max_tokens: rows and keys drawn; the maps of one head are built for the whole item, T x T.
    """

    def __init__(self, layers: tuple[int, ...] = (0,), heads: tuple[int, ...] = (0,), max_tokens: int = 256) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
        self.layers = layers
        self.heads = heads
        self.max_tokens = max_tokens
        self.written: list[Path] = []

    def wants(self, trainer: Trainer, batch_index: int) -> bool:
        first = batch_index == 0 and not trainer.training and not trainer.sanity_checking
        return first and trainer.is_global_zero

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "attention"  # all ranks must ask

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        records = pl_module.layer_records
        for layer in self.layers if records else ():
            check_index("layer", layer, len(records))
            teacher, student = records[layer]
            if student.estimate is None:
                continue
            for head in self.heads:
                matrices = attention_matrices(teacher, student, head=head, max_tokens=self.max_tokens)
                figure = plot_matrices(matrices, f"layer {layer}, head {head}, step {trainer.global_step}")
                self._write(trainer, figure, f"layer_{layer:02d}_head_{head:02d}")

    def _write(self, trainer: Trainer, figure: Any, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}_step_{trainer.global_step:06d}.png"
        figure.savefig(path, dpi=150)
        self.written.append(path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(f"attention/{name}", figure, trainer.global_step)
