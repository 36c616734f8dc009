"""What the two data modules share: files, splits per stage, loaders, and where the process stands among others."""

from abc import abstractmethod
from pathlib import Path

from datasets import Dataset
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .loading import PadCollator, evaluation_loader


class SplitDataModule(LightningDataModule):
    """A data module whose splits are loaded once, when a stage first needs them.

    Subclasses set ``collate``, ``stage_splits`` (stage -> splits; "fit" has "train" first) and ``files`` (split ->
    files, or None for a hub dataset), and implement ``load_split``, which reads from the cache of ``datasets`` after
    its first call: rank 0 fills it in ``prepare_data``, all processes read it in ``setup``.
    """

    stage_splits: dict[str, tuple[str, ...]]
    files: dict[str, list[Path]] | None
    collate: PadCollator

    def __init__(
        self,
        source: str | dict[str, str],
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        num_proc: int | None,
        seed: int,
        cache_dir: str | None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.seed = seed
        self.cache_dir = cache_dir
        self.splits: dict[str, Dataset] = {}

    @abstractmethod
    def load_split(self, split: str) -> Dataset:
        """The tokenised rows of one split."""

    def rows(self, split: str) -> TorchDataset:
        """What the evaluation loader of a split goes through."""
        return self.splits[split]

    def splits_of(self, stage: str) -> tuple[str, ...]:
        """The splits that a stage needs; fitting does without validation if the source has no such split.

        Raises ValueError if the source lacks a needed split.
        """
        wanted = self.stage_splits[stage]
        if self.files is None:
            return wanted
        needed = wanted[:1] if stage == "fit" else wanted
        for split in needed:
            if split not in self.files:
                raise ValueError(
                    f"{stage} needs the split {split!r}, but source {self.source!r} has only {', '.join(self.files)}"
                )
        return tuple(split for split in wanted if split in self.files)

    def prepare_data(self) -> None:
        """Tokenise what the trainer's stage needs into the cache, in one process."""
        if self.trainer is not None:
            for split in self.splits_of(self.trainer.state.fn.value):
                if split not in self.splits:
                    self.load_split(split)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage ("fit", "validate", "test", "predict").

        Raises ValueError if the data are unusable: a missing column, an unknown label, an empty file, wrong encoding.
        """
        for split in self.splits_of(stage):
            if split not in self.splits:
                self.splits[split] = self.load_split(split)

    @property
    def world(self) -> tuple[int, int]:
        """Number of processes and this one's rank."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per validation split that the source has."""
        return self.evaluation_loaders("validate")

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per split that ``test`` measures."""
        return self.evaluation_loaders("test")

    def evaluation_loaders(self, stage: str) -> list[DataLoader]:
        """One loader per loaded split of the stage, in which every row counts once over all processes.

        So processes may have different numbers of batches, and an evaluation step must not communicate: metrics are
        combined once, at the end of the epoch.
        """
        return [
            evaluation_loader(self.rows(split), self.world, self.collate, self.eval_batch_size, self.num_workers)
            for split in self.stage_splits[stage]
            if split in self.splits
        ]
