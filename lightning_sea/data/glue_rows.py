"""Rows of a GLUE task from local files: the official TSV layout with its quirks, and CSV, JSONL and Parquet."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import read_lines, read_rows, text_value
from .glue_tasks import GLUETask, get_task

UNLABELLED = -1


def glue_rows(files: tuple[str, ...], task_name: str, needs_label: bool) -> Iterator[dict[str, Any]]:
    """Rows with the task's hub columns, ``label`` and ``idx``.

    ``label`` is an index, a number for regression, or -1 if there is none.
    ``idx`` is the file's own index where it has one (``index`` in the official layout, ``idx`` in other files), else
    the number of the row. Raises ValueError, naming file, line and column, at a row that does not fit the task.
    """
    task = get_task(task_name)
    number = 0
    for path in map(Path, files):
        official = path.suffix == ".tsv"
        columns = task.tsv_columns if official else task.columns
        label_column = task.tsv_label if official else task.label_column
        index_column = "index" if official else "idx"
        for where, row in tsv_rows(path, task) if official else read_rows(path):
            label = _label(task, row, label_column, needs_label, where)
            if label is None:
                continue
            texts = {ours: text_value(row, theirs, where) for ours, theirs in zip(task.columns, columns, strict=True)}
            index = _index(row[index_column], index_column, where) if index_column in row else number
            yield {**texts, "label": label, "idx": index}
            number += 1


def tsv_rows(path: Path, task: GLUETask) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of an official file as (where, columns): tabs separate, and quotes are ordinary characters.

    Raises ValueError at a line with another number of fields than the header, except for short lines of tasks whose
    official files are known to have some: those are left out with a warning.
    """
    lines = read_lines(path)
    without_header = task.tsv_header and path.stem != "test"
    header = list(task.tsv_header) if without_header else next(lines, (0, ""))[1].split("\t")
    for number, line in lines:
        where = f"{path}, line {number}"
        fields = line.split("\t")
        if len(fields) < len(header) and task.skip_short_rows:
            warnings.warn(f"{where}: {len(fields)} of {len(header)} fields; left out", stacklevel=2)
        elif len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} fields; expected {len(header)} ({', '.join(header)})")
        else:
            yield where, dict(zip(header, fields, strict=True))


def _label(task: GLUETask, row: dict[str, Any], column: str, needed: bool, where: str) -> int | float | None:
    """The row's label, ``UNLABELLED``, or None if rows with this label are left out."""
    if row.get(column) is None:
        if needed:
            raise ValueError(f"{where}: no column {column!r}; found {', '.join(map(repr, row))}")
        return UNLABELLED
    value = row[column]
    if not needed and str(value) in ("", str(UNLABELLED)):
        return UNLABELLED
    if value in task.ignored_labels:
        return None
    return _number(task, value, column, where) if task.is_regression else _class(task, value, column, where)


def _class(task: GLUETask, value: Any, column: str, where: str) -> int:
    if value in task.labels:
        return task.labels.index(value)
    if str(value) in map(str, range(task.num_labels)):
        return int(value)
    raise ValueError(
        f"{where}: column {column!r} holds {value!r}; expected one of {', '.join(task.labels)}, "
        f"or an index from 0 to {task.num_labels - 1}"
    )


def _number(task: GLUETask, value: Any, column: str, where: str) -> float:
    low, high = task.label_range
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{where}: column {column!r} holds {value!r}; expected a number from {low} to {high}")
    return number


def _index(value: Any, column: str, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: column {column!r} holds {value!r}; expected a whole number") from None
