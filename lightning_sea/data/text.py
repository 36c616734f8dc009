"""Running text for language models, from the hub, from files, or embedded."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
from datasets import Dataset, Features, Value, load_dataset
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .files import build_dataset, find_files, read_lines, read_rows, text_value
from .loading import PadCollator, WindowSampler, train_loader
from .module import SplitDataModule
from .tokenizers import load_tokenizer, require_token, tokenizer_fingerprint

SUFFIXES = (".txt", ".tokens", ".jsonl", ".jsonl.gz", ".csv", ".parquet")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Texts of the articles whose lines these are, in WikiText's form: a level-one heading begins an article."""
    article: list[str] = []
    blank = True
    for line in lines:
        text = line.strip()
        if blank and text.startswith("= ") and text.endswith(" =") and not text.startswith("= ="):
            yield from _joined(article)
            article = []
        article.append(line)
        blank = not text
    yield from _joined(article)


def text_rows(files: tuple[str, ...], text_column: str) -> Iterator[dict[str, str]]:
    """Documents of local files as rows {"text": …}; blank ones are left out.

    Raises ValueError, naming file, line and column, at a row that has no text.
    """
    for path in map(Path, files):
        if path.suffix == ".txt":
            documents = _joined([line for _, line in read_lines(path)])
        elif path.suffix == ".tokens":
            documents = articles(line for _, line in read_lines(path))
        else:
            documents = (text_value(row, text_column, where) for where, row in read_rows(path))
        yield from ({"text": document} for document in documents if document.strip())


def _joined(lines: list[str]) -> Iterator[str]:
    """The document of these lines; nothing if they are blank."""
    document = "".join(f"{line}\n" for line in lines)
    if document.strip():
        yield document


class EvaluationWindows(TorchDataset):
    """Windows of ``seq_len`` tokens, each ``stride`` tokens after the one before; the last may be shorter.

    Labels of tokens that the window before holds too are -100. Rows: ``input_ids`` and ``labels``, int64 [T].
    """

    def __init__(self, tokens: numpy.ndarray, seq_len: int, stride: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.stride = stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - self.seq_len) // self.stride))

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        input_ids = self.tokens[start : start + self.seq_len].astype(numpy.int64)
        labels = input_ids.copy()
        if index:
            labels[: self.seq_len - self.stride] = -100
        return {"input_ids": input_ids, "labels": labels}


class TrainingWindows(TorchDataset):
    """Windows of ``seq_len`` tokens, indexed by the position of their first token (see ``WindowSampler``)."""

    def __init__(self, tokens: numpy.ndarray, seq_len: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len

    def __getitem__(self, start: int) -> dict[str, numpy.ndarray]:
        input_ids = self.tokens[start : start + self.seq_len].astype(numpy.int64)
        return {"input_ids": input_ids, "labels": input_ids.copy()}


class TextDataModule(SplitDataModule):
    """Documents, each followed by the end-of-text token, as one stream of tokens that is cut into blocks.

    Training takes windows of ``seq_len`` tokens that tile the stream from an offset drawn anew for every epoch.
    Evaluation takes fixed windows from its start. Without ``stride`` they do not overlap: the first token of a block is
    only context. With ``stride`` s < seq_len each window begins s tokens after the one before, and its labels are -100
    where an earlier window has counted the token: every token but the stream's first counts exactly once, with at least
    seq_len - s tokens of context. The last window may be shorter and is padded.

    Batches are dictionaries of int64 [N, T]: ``input_ids``, ``attention_mask``, ``labels``. ``labels[t]`` is the token
    at t or -100; the model shifts them, so position 0 never counts.

    Attributes for the model: ``tokenizer``, ``pad_token_id``, ``seq_len``.
    """

    def __init__(
        self,
        tokenizer: str,
        source: str | dict[str, str] = "embedded",
        seq_len: int = 512,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        stride: int | None = None,
        subset: str | None = None,
        text_column: str = "text",
        wikitext_lines: bool = False,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        """Find the files and load the tokenizer; the text follows in ``setup``.

        Args:
            tokenizer: name or folder of the model whose tokenizer is used; "embedded:lm" for the embedded one.
            source: a hub dataset; a folder of files whose names tell their split; one file, to evaluate only; a mapping
                from splits to files; or "embedded". Files: .txt (one document each), .tokens (WikiText articles),
                .jsonl, .jsonl.gz, .csv or .parquet (one document per row).
            seq_len: tokens per window; at most the model's positions.
            batch_size: training windows per process and step.
            eval_batch_size: windows per process and step in evaluation; ``batch_size`` if not given.
            stride: tokens from one evaluation window to the next, 1 to seq_len - 1; without it windows do not overlap.
            subset: configuration of a hub dataset, such as wikitext-2-raw-v1.
            text_column: column of a hub dataset or of rows that holds the text.
            wikitext_lines: the rows of the hub dataset are lines of WikiText articles, not documents.
            num_workers: loader processes.
            num_proc: tokenising processes; without it one, in which fast tokenizers use all cores.
            seed: of the offsets and the order of the training windows.
            cache_dir: where ``datasets`` keeps its cache, if not in its default place.

        Raises:
            ValueError: for an unusable source, a tokenizer without an end-of-text token, or a stride out of range.
            FileNotFoundError: if the source is a path that does not exist.
        """
        super().__init__(source, batch_size, eval_batch_size, num_workers, num_proc, seed, cache_dir)
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len}; expected at least 2")
        if stride is not None and not 0 < stride < seq_len:
            raise ValueError(f"stride is {stride}; expected 1 to seq_len - 1 = {seq_len - 1}, or none")
        self.seq_len = seq_len
        self.stride = stride
        self.subset = subset
        self.text_column = text_column
        self.wikitext_lines = wikitext_lines
        self.files = find_files(source, SUFFIXES)
        self.stage_splits = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        self.tokenizer = load_tokenizer(tokenizer)
        self.eos_token_id = require_token(self.tokenizer, "eos", tokenizer, "separates documents")
        # Only the last, shorter window is padded, where neither mask nor labels count: any token serves.
        pad_token_id = self.tokenizer.pad_token_id
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id
        self.collate = PadCollator(self.pad_token_id, self.tokenizer.padding_side)
        self._tokenizer_fingerprint = tokenizer_fingerprint(self.tokenizer)

    def load_split(self, split: str) -> Dataset:
        """The documents of one split as rows of ``input_ids``, from the cache if it has them."""
        documents = self._read_hub(split) if self.files is None else self._read_files(split)

        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            encoded = self.tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
            return {"input_ids": [[*ids, self.eos_token_id] for ids in encoded["input_ids"]]}

        # Fast tokenizers change when called, so the fingerprint is made here, not from ``encode``.
        fingerprint = Hasher.hash((documents._fingerprint, self._tokenizer_fingerprint, self.eos_token_id))
        return documents.map(
            encode,
            batched=True,
            num_proc=self.num_proc,
            remove_columns=["text"],
            new_fingerprint=fingerprint,
            desc=f"Tokenising {split} text",
        )

    def rows(self, split: str) -> EvaluationWindows:
        """The fixed windows of a split."""
        return EvaluationWindows(self.stream(split), self.seq_len, self.stride or self.seq_len)

    def stream(self, split: str) -> numpy.ndarray:
        """All tokens of a loaded split, int32 [total], each document followed by the end-of-text token."""
        return numpy.concatenate([chunk.flatten() for chunk in self.splits[split].data["input_ids"].chunks])

    def train_dataloader(self) -> DataLoader:
        """Shuffled windows in full batches, from another offset in every epoch.

        Raises ValueError if the text is shorter than one window.
        """
        tokens = self.stream("train")
        if len(tokens) < self.seq_len:
            raise ValueError(f"seq_len is {self.seq_len}, but the training text has only {len(tokens)} tokens")
        sampler = WindowSampler(len(tokens), self.seq_len, *self.world, seed=self.seed)
        windows = TrainingWindows(tokens, self.seq_len)
        return train_loader(windows, sampler, self.collate, self.batch_size, self.num_workers)

    def _read_files(self, split: str) -> Dataset:
        features = Features({"text": Value("string")})
        return build_dataset(text_rows, self.files[split], {"text_column": self.text_column}, features, self.cache_dir)

    def _read_hub(self, split: str) -> Dataset:
        rows = load_dataset(self.source, self.subset, split=split, cache_dir=self.cache_dir)
        if self.text_column not in rows.column_names:
            raise ValueError(
                f"{self.source}, {split}: no column {self.text_column!r}; found {', '.join(rows.column_names)}"
            )
        rows = rows.select_columns([self.text_column]).rename_column(self.text_column, "text")
        if not self.wikitext_lines:
            return rows
        return Dataset.from_generator(
            _hub_articles,
            cache_dir=self.cache_dir,
            gen_kwargs={"rows": rows},
            fingerprint=Hasher.hash(("articles", rows._fingerprint)),
        )


def _hub_articles(rows: Dataset) -> Iterator[dict[str, str]]:
    yield from ({"text": article} for article in articles(row["text"].removesuffix("\n") for row in rows))
