"""GLUE and other labelled sentences, from the hub, from official folders, from tables, or embedded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_sea.data.files import build_dataset, find_files
from lightning_sea.data.glue_rows import glue_rows
from lightning_sea.data.glue_tasks import GLUETask, get_task
from lightning_sea.data.loading import PadCollator, TrainSampler, train_loader
from lightning_sea.data.module import SplitDataModule
from lightning_sea.data.tokenizers import load_tokenizer, require_token, tokenizer_fingerprint

SUFFIXES = (".tsv", ".csv", ".jsonl", ".jsonl.gz", ".parquet")


class GLUEDataModule(SplitDataModule):
    """Sentences, or pairs of them, with labels.

    Batches are dictionaries: `input_ids`, `attention_mask` (and `token_type_ids` if the tokenizer gives them) int64
    [N, T], padded to the longest row on the tokenizer's side; `labels` int64 [N] (float32 for regression; absent in
    `predict`); `idx` int64 [N], the row's number in its split.

    Attributes for the model: `task`, `num_labels`, `tokenizer`, `pad_token_id`.
    """

    def __init__(
        self,
        task: str,
        tokenizer: str,
        source: str | dict[str, str] = "nyu-mll/glue",
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        """Load the tokenizer; the data follow in `setup`.

        Args:
            task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, or topics (the embedded summaries' topics).
            tokenizer: name or folder of the model whose tokenizer is used; "embedded:classifier" for the embedded one.
            source: a hub dataset with one configuration per task; a folder in the official layout (the task's own or
                that of all tasks); a folder of CSV, JSONL or Parquet files whose names tell their split and whose
                columns are the hub's; one such file, to evaluate only; a mapping from splits to files; or "embedded".
            max_length: longest row in tokens; longer ones are cut, and how many is reported.
            batch_size: training rows per process and step.
            eval_batch_size: rows per process and step in evaluation; `batch_size` if not given.
            num_workers: loader processes.
            num_proc: tokenising processes; without it one, in which fast tokenizers use all cores.
            seed: of the order of the training rows.
            cache_dir: where `datasets` keeps its cache, if not in its default place.

        Raises:
            ValueError: for an unknown task, or a tokenizer without a pad token.
        """
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.task: GLUETask = get_task(task)
        self.source = source
        self.max_length = max_length
        self.num_proc = num_proc
        self.cache_dir = cache_dir
        self.num_labels = self.task.num_labels
        self.tokenizer = load_tokenizer(tokenizer)
        self.pad_token_id = require_token(self.tokenizer, "pad", tokenizer, "batches of sentences need")
        self.collate = PadCollator(
            self.pad_token_id, self.tokenizer.padding_side, getattr(self.tokenizer, "pad_token_type_id", 0)
        )
        self.stage_splits = {
            "fit": ("train", *self.task.validation_splits),
            "validate": self.task.validation_splits,
            "test": self.task.test_splits,
            "predict": self.task.predict_splits,
        }
        self._tokenizer_fingerprint = tokenizer_fingerprint(self.tokenizer)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage.

        Raises ValueError if the data are unusable: a missing column, an unknown label, an empty file, wrong encoding.
        """
        super().setup(stage)
        if stage != "predict":
            for split in self.stage_splits[stage]:
                self._check_labels(split)

    def load_split(self, split: str) -> Dataset:
        """The tokenised rows of one split."""
        return self._tokenise(self._read_split(split), split)

    def train_dataloader(self) -> DataLoader:
        """Shuffled rows in full batches."""
        rows = self.splits["train"]
        sampler = TrainSampler(len(rows), *self.world, seed=self.seed)
        return train_loader(rows, sampler, self.collate, self.batch_size, self.num_workers)

    def predict_dataloader(self) -> list[DataLoader]:
        """One loader per submission file of the task, without labels."""
        self.splits |= {s: self.splits[s].remove_columns("labels") for s in self.task.predict_splits if self._has_labels(s)}
        return self.evaluation_loaders("predict")

    def _read_split(self, split: str) -> Dataset:
        source = self.source
        if isinstance(source, str) and source != "embedded" and (Path(source) / self.task.folder).is_dir():
            source = str(Path(source) / self.task.folder)
        splits = ("train", *self.task.validation_splits, *self.task.predict_splits)
        files = find_files(source, SUFFIXES, splits)
        if files is None:
            return self._read_hub(split)
        if split not in files:
            raise ValueError(f"source {source!r} has no split {split!r}; found {', '.join(files)}")
        arguments = {"task_name": self.task.name, "needs_label": split not in self.task.predict_splits}
        return build_dataset(glue_rows, files[split], arguments, self._features(), self.cache_dir)
