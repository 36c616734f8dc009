"""Reading rows from files, with errors that name the file and the line; and finding the files of a source."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .embedded import CORPUS

SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = {"dev": "validation", "valid": "validation", "val": "validation"}


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and texts of the lines of a UTF-8 file, plain or .gz, without line ends and byte order mark.

    Raises ValueError at a byte that is not UTF-8, naming the line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, _decode(path, number, line).removesuffix("\n").removesuffix("\r")
        except gzip.BadGzipFile as error:
            raise ValueError(f"{path}: expected a gzip file ({error})") from None


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; "
            f"save the file as UTF-8"
        ) from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .csv, .jsonl, .jsonl.gz or .parquet file as (where, columns); ``where`` names file and line for errors.

    Raises ValueError at a line that is no row of that format.
    """
    name = path.name.lower()
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _json_rows(path)
    return _parquet_rows(path)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    header = next(reader, [])
    try:
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                raise ValueError(f"{where}: {len(fields)} fields; expected {len(header)} ({', '.join(header)})")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); expected one object per line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__}; expected one JSON object per line")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error})") from None
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def text_value(row: dict[str, Any], column: str, where: str) -> str:
    """The text of one column.

    Raises ValueError if the column is missing or holds no text.
    """
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}; found {', '.join(map(repr, row))}")
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: column {column!r} holds {row[column]!r}; expected text")
    return row[column]


def find_files(
    source: str | dict[str, str], suffixes: tuple[str, ...], splits: tuple[str, ...] = SPLITS
) -> dict[str, list[Path]] | None:
    """The files of each split of a local source; None if the source is a hub dataset's name.

    source: "embedded"; a folder whose files name their split (train, validation | valid | val | dev, test); one file,
        which every split but "train" reads; or a mapping from splits to files or "embedded".

    Raises ValueError or FileNotFoundError if there is no such file, or none of a split.
    """
    if isinstance(source, dict):
        return {split: _mapped_files(split, value, suffixes, splits) for split, value in source.items()}
    path = CORPUS if source == "embedded" else Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path, suffixes, splits)
    if path.is_file():
        _check_suffix(path, suffixes)
        return {split: [path] for split in splits if split != "train"}
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and not source.lower().endswith(suffixes):
        return None
    raise FileNotFoundError(f"source {source!r}: no such file or folder, nor a hub dataset's name")


def _mapped_files(split: str, value: str, suffixes: tuple[str, ...], splits: tuple[str, ...]) -> list[Path]:
    if split not in splits:
        raise ValueError(f"source names a split {split!r}; expected some of {', '.join(splits)}")
    if value == "embedded":
        files = _folder_files(CORPUS, suffixes, splits)
        if split not in files:
            raise ValueError(f"the embedded corpus has no split {split!r}; found {', '.join(files)}")
        return files[split]
    path = Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"source of split {split!r}: no such file: {path}")
    _check_suffix(path, suffixes)
    return [path]


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.name.lower().endswith(suffixes):
        raise ValueError(f"{path}: expected a file that ends in {', '.join(suffixes)}")


def _folder_files(folder: Path, suffixes: tuple[str, ...], splits: tuple[str, ...]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)
        if suffix is not None:
            words = re.split(r"[\W_]+", path.name.lower()[: -len(suffix)])
            words = [_SPLIT_WORDS.get(word, word) for word in words]
            for split in splits:
                # Official folders hold other tables beside the data (MRPC's dev_ids.tsv): TSV names must match wholly.
                if words == split.split("_") or (suffix != ".tsv" and set(split.split("_")) <= set(words)):
                    files.setdefault(split, []).append(path)
    if not files:
        raise FileNotFoundError(f"{folder}: no file of a split; expected names with {', '.join(splits)}")
    for split, paths in files.items():
        if len({"".join(path.suffixes[-1:]) for path in paths}) > 1:
            raise ValueError(f"{folder}: split {split!r} in several formats: {', '.join(p.name for p in paths)}")
    return files


def build_dataset(
    rows: Callable[..., Iterable[dict[str, Any]]],
    files: list[Path],
    arguments: dict[str, Any],
    features: Features,
    cache_dir: str | None,
) -> Dataset:
    """The rows that ``rows(files=…, **arguments)`` yields, as a dataset in the cache, read anew when a file changes.

    Raises ValueError, as ``rows`` does, and if there is no row at all.
    """
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    try:
        return Dataset.from_generator(
            _some_rows,
            features=features,
            cache_dir=cache_dir,
            gen_kwargs={"rows": rows, "files": tuple(map(str, files)), **arguments},
            fingerprint=Hasher.hash((_READER_VERSION, rows.__qualname__, stamps, arguments, features)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _some_rows(
    rows: Callable[..., Iterable[dict[str, Any]]], files: tuple[str, ...], **arguments: Any
) -> Iterator[dict[str, Any]]:
    empty = True
    for row in rows(files=files, **arguments):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{', '.join(files)}: no rows")


# Raise it when a reader changes what it yields: cached rows of older versions are then read anew.
_READER_VERSION = 1
