"""Make the embedded corpus and the embedded teachers' training text from a file of Wikipedia lead summaries.

    python benchmarks/teachers/make_excerpt.py SUMMARIES [--train-file outputs/teachers/train.jsonl.gz]

SUMMARIES is a .jsonl.gz file with one object per line: title, topic, text. A hash of the title decides where a summary
goes, so other summaries or another order change no other one's place. The embedded corpus takes the shares below; the
training file takes every summary but the corpus' validation and test ones, so no teacher has read what it is measured
on.
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lightning_sea.data.embedded import CORPUS
from lightning_sea.data.files import read_rows

# Upper ends, in 1/10000 of all summaries.
SHARES = {"test": 900, "validation": 1300, "train": 2600}


def split_of(title: str) -> str | None:
    """The corpus split of a summary; None if it is not part of the corpus."""
    place = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % 10_000
    return next((split for split, end in SHARES.items() if place < end), None)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as .jsonl.gz, equal bytes for equal rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", type=Path)
    parser.add_argument("--train-file", type=Path, default=Path("outputs/teachers/train.jsonl.gz"))
    arguments = parser.parse_args()
    rows = [{key: row[key] for key in ("title", "topic", "text")} for _, row in read_rows(arguments.summaries)]
    splits = [split_of(row["title"]) for row in rows]
    for name in SHARES:
        write_rows(CORPUS / f"{name}.jsonl.gz", [row for row, split in zip(rows, splits, strict=True) if split == name])
    train = [row for row, split in zip(rows, splits, strict=True) if split not in ("validation", "test")]
    write_rows(arguments.train_file, train)


if __name__ == "__main__":
    main()
