"""What the two data modules share: splits per stage, loaders, and where the process stands among others."""

from abc import abstractmethod
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_sea.data.loading import PadCollator, evaluation_loader


class SplitDataModule(LightningDataModule):
    """A data module whose splits are loaded once, when a stage first needs them.

    Subclasses set `collate`, `stage_splits` (stage -> splits) and `optional_splits`, and implement `load_split`, which
    reads from `datasets`' cache after its first call: rank 0 fills it in `prepare_data`, all processes read it in
    `setup`.
    """

    stage_splits: dict[str, tuple[str, ...]]
    optional_splits: tuple[str, ...] = ()
    collate: PadCollator

    def __init__(self, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.splits: dict[str, Any] = {}

    @abstractmethod
    def load_split(self, split: str) -> Any:
        """The tokenised rows of one split; None for an optional split that the source lacks."""

    def prepare_data(self) -> None:
        """Tokenise what the trainer's stage needs into the cache, in one process."""
        if self.trainer is not None:
            for split in self.stage_splits[self.trainer.state.fn.value]:
                self.load_split(split)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage ("fit", "validate", "test", "predict")."""
        for split in self.stage_splits[stage]:
            if split not in self.splits:
                self.splits[split] = self.load_split(split)

    @property
    def world(self) -> tuple[int, int]:
        """Number of processes and this one's rank."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def evaluation_loaders(self, stage: str) -> list[DataLoader]:
        """One loader per evaluation split of the stage, in which every row counts once over all processes."""
        return [
            evaluation_loader(self.splits[split], self.world, self.collate, self.eval_batch_size, self.num_workers)
            for split in self.stage_splits[stage]
            if split != "train" and self.splits[split] is not None
        ]

    def val_dataloader(self) -> list[DataLoader]:
        """Loaders of the validation splits."""
        stage = "fit" if "train" in self.splits else "validate"
        return self.evaluation_loaders(stage)

    def test_dataloader(self) -> list[DataLoader]:
        """Loaders of the splits that `test` measures."""
        return self.evaluation_loaders("test")
