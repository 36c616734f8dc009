"""GLUE and other labelled sentences, from the hub, from official folders, from tables, or embedded."""

from pathlib import Path

import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from .files import build_dataset, find_files
from .glue_rows import UNLABELLED, glue_rows
from .glue_tasks import GLUETask, get_task
from .loading import PadCollator, TrainSampler, evaluation_loader, train_loader
from .module import SplitDataModule
from .tokenizers import load_tokenizer, require_token, tokenizer_fingerprint

SUFFIXES = (".tsv", ".csv", ".jsonl", ".jsonl.gz", ".parquet")


class GLUEDataModule(SplitDataModule):
    """Sentences, or pairs of them, with labels.

    Batches are dictionaries: ``input_ids``, ``attention_mask`` (and ``token_type_ids`` if the tokenizer gives them)
    int64 [N, T], padded to the longest row on the tokenizer's side; ``labels`` int64 [N] (float32 for regression;
    absent in ``predict``); ``idx`` int64 [N], the row's number in its split.

    Attributes for the model: ``task``, ``num_labels``, ``tokenizer``, ``pad_token_id``, ``max_length``.
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
        """Find the files and load the tokenizer; the rows follow in ``setup``.

        Args:
            task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, imdb (reviews, from files), or topics (the
                embedded summaries' topics).
            tokenizer: name or folder of the model whose tokenizer is used; "embedded:classifier" for the embedded one.
            source: a hub dataset with one configuration per task; a folder in the official layout (the task's own or
                that of all tasks); a folder of CSV, JSONL or Parquet files whose names tell their split and whose
                columns are the hub's; one such file, to evaluate only; a mapping from splits to files; or "embedded".
            max_length: longest row in tokens; longer ones are cut, and how many is reported.
            batch_size: training rows per process and step.
            eval_batch_size: rows per process and step in evaluation; ``batch_size`` if not given.
            num_workers: loader processes.
            num_proc: tokenising processes; without it one, in which fast tokenizers use all cores.
            seed: of the order of the training rows.
            cache_dir: where ``datasets`` keeps its cache, if not in its default place.

        Raises:
            ValueError: for an unknown task, an unusable source, or a tokenizer without a pad token.
            FileNotFoundError: if the source is a path that does not exist.
        """
        super().__init__(source, batch_size, eval_batch_size, num_workers, num_proc, seed, cache_dir)
        self.task: GLUETask = get_task(task)
        self.num_labels = self.task.num_labels
        self.max_length = max_length
        self.files = find_files(self._task_folder(), SUFFIXES, self.task.splits)
        self.stage_splits = {
            "fit": ("train", *self.task.validation_splits),
            "validate": self.task.validation_splits,
            "test": self.task.test_splits,
            "predict": self.task.predict_splits,
        }
        self.tokenizer = load_tokenizer(tokenizer)
        self.pad_token_id = require_token(self.tokenizer, "pad", tokenizer, "batches of sentences need")
        self.collate = PadCollator(
            self.pad_token_id, self.tokenizer.padding_side, getattr(self.tokenizer, "pad_token_type_id", 0)
        )
        self._tokenizer_fingerprint = tokenizer_fingerprint(self.tokenizer)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage.

        Raises ValueError if the data are unusable: a missing column, an unknown label, an empty file, wrong encoding.
        """
        new = [split for split in self.splits_of(stage) if split not in self.splits]
        super().setup(stage)
        for split in new:
            self._check_lengths(split)
        if stage != "predict":
            for split in self.splits_of(stage):
                self._check_labels(split)

    def load_split(self, split: str) -> Dataset:
        """The tokenised rows of one split, from the cache if it has them."""
        dataset = self._read_hub(split) if self.files is None else self._read_files(split)
        columns = self.task.columns

        def encode(rows: dict[str, list]) -> dict[str, list]:
            return self.tokenizer(*(rows[column] for column in columns), truncation=True, max_length=self.max_length)

        # Fast tokenizers change when called, so the fingerprint is made here, not from ``encode``.
        fingerprint = Hasher.hash((dataset._fingerprint, self._tokenizer_fingerprint, columns, self.max_length))
        encoded = dataset.map(
            encode,
            batched=True,
            num_proc=self.num_proc,
            remove_columns=list(columns),
            new_fingerprint=fingerprint,
            desc=f"Tokenising {self.task.name} {split}",
        )
        return encoded.rename_column("label", "labels")

    def train_dataloader(self) -> DataLoader:
        """Shuffled rows in full batches."""
        rows = self.splits["train"]
        sampler = TrainSampler(len(rows), *self.world, seed=self.seed)
        return train_loader(rows, sampler, self.collate, self.batch_size, self.num_workers)

    def predict_dataloader(self) -> list[DataLoader]:
        """One loader per submission file of the task, without labels."""
        return [
            evaluation_loader(
                self.splits[split].remove_columns("labels"),
                self.world,
                self.collate,
                self.eval_batch_size,
                self.num_workers,
            )
            for split in self.task.predict_splits
        ]

    def _task_folder(self) -> str | dict[str, str]:
        """The source; the task's own folder if the source is that of all tasks."""
        if isinstance(self.source, str) and (Path(self.source) / self.task.folder).is_dir():
            return str(Path(self.source) / self.task.folder)
        return self.source

    def _read_files(self, split: str) -> Dataset:
        label = Value("float32") if self.task.is_regression else Value("int64")
        features = Features(
            {**dict.fromkeys(self.task.columns, Value("string")), "label": label, "idx": Value("int64")}
        )
        arguments = {"task_name": self.task.name, "needs_label": split not in self.task.predict_splits}
        return build_dataset(glue_rows, self.files[split], arguments, features, self.cache_dir)

    def _read_hub(self, split: str) -> Dataset:
        dataset = load_dataset(self.source, self.task.name, split=split, cache_dir=self.cache_dir)
        wanted = [*self.task.columns, "label", "idx"]
        for column in wanted:
            if column not in dataset.column_names:
                raise ValueError(
                    f"{self.source}, {self.task.name}, {split}: no column {column!r}; "
                    f"found {', '.join(dataset.column_names)}"
                )
        label = dataset.features["label"]
        if isinstance(label, ClassLabel) and tuple(label.names) != self.task.labels:
            raise ValueError(
                f"{self.source}, {self.task.name}: labels {', '.join(label.names)}; "
                f"expected {', '.join(self.task.labels)}"
            )
        return dataset.select_columns(wanted)

    def _check_labels(self, split: str) -> None:
        labels = pyarrow.compute.unique(self.splits[split].data["labels"])
        if UNLABELLED in labels.to_pylist():
            raise ValueError(
                f"source {self.source!r}: split {split!r} of {self.task.name} has rows without a label; "
                f"only ``predict`` can use it"
            )

    def _check_lengths(self, split: str) -> None:
        lengths = pyarrow.compute.list_value_length(self.splits[split].data["input_ids"]).to_numpy()
        if not lengths.all():
            raise ValueError(f"{self.task.name} {split}: row {int(lengths.argmin())} has no token")
        longest = int((lengths >= self.max_length).sum())
        if longest:
            rank_zero_info(
                f"{self.task.name} {split}: {longest} of {len(lengths)} rows fill max_length = {self.max_length}; "
                f"what is longer was cut"
            )
