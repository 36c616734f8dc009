"""Reading result files for the report: rows without repetitions, what they lack, and Markdown."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NONE = "–"  # a cell that no row fills
SHOWN = ("torch", "triton", "transformers")  # versions
MEASURED = {
    "value",
    "keys_per_row",
    "pooled_per_row",
    "kept_mass",
    "density",
    "train_seconds",
    "train_loss",
    "peak_mib",
}
ORIGIN = ("device", "commit")  # columns

TITLES = {
    "teacher": "dense, the teacher",
    "dense": "dense, trained on",
    "sea": "SEA",
    "sea_budgets": "SEA, budgets of heads",
    "sea_two_looks": "SEA, two looks",
    "sea_two_looks_budgets": "SEA, two looks, budgets of heads",
    "sea_two_looks_wide": "SEA, two looks, the first at 2048 keys",
    "sea_paper": "SEA of the paper",
    "window": "window",
    "window_512": "window",
    "performer": "Performer",
    "cosformer": "cosFormer",
}


@dataclass(frozen=True)
class Results:
    """What one script of the quality tables wrote.

    Attributes:
        name: the file's name.
        head: device, versions, commit and command of the latest run.
        rows: its rows, those that were measured twice once.
    """

    name: str
    head: dict[str, Any]
    rows: list[Row]

    def source(self) -> list[str]:
        """Paragraphs that say where the numbers of a table come from."""
        versions = ", ".join(f"{name} {version}" for name, version in self.head["versions"].items() if name in SHOWN)
        link = f"[`{self.name}`](../benchmarks/results/{self.name})"
        return [
            f"From {link}, last written on {self.head['device']} ({versions}) at {shown_commit(self.head)} by",
            f"    {self.head['command']}",
            *self.origins(),
        ]

    def origins(self) -> list[str]:
        """A paragraph that says which runs come from which device and commit, if they differ."""
        runs: dict[str, list[str]] = {}
        for row in self.rows:
            if all(name in row for name in ORIGIN):
                names = runs.setdefault(f"{row['device']} at {shown_commit(row)}", [])
                names += [row["run"]] if row["run"] not in names else []
        if len(runs) < 2:
            return []
        return ["Its runs: " + "; ".join(f"{', '.join(names)} on {place}" for place, names in runs.items()) + "."]

    def source_again(self, section: int) -> str:
        """The same for a further table of the file."""
        return f"From [`{self.name}`](../benchmarks/results/{self.name}) and the command of table {section}."

    def parallel(self) -> int:
        """How many runs shared the device."""
        words = self.head["command"].split()
        return int(words[words.index("--parallel") + 1]) if "--parallel" in words else 1


def read(path: Path) -> Results | None:
    """The results in a file; None if there is no such file.

    Rows count as the same measurement if they agree in everything but what was measured; the first one stays.
    """
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    unique: dict[tuple, Row] = {}
    for row in content.pop("rows"):
        unique.setdefault(tuple(sorted((name, str(row[name])) for name in row.keys() - MEASURED - set(ORIGIN))), row)
    return Results(path.name, content, list(unique.values()))


def shown_commit(source: dict[str, Any]) -> str:
    """The commit of a file's head or of a row, short."""
    commit, *changed = source["commit"].split("+")
    return f"`{commit[:10]}`" + (" with changes" if changed else "")


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have all these values; a row that lacks a column has None in it."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def pick(rows: Iterable[Row], column: str, **wanted: Any) -> float | None:
    """The value of ``column`` in the one row that has these values; None if there is no such row or value.

    Raises:
        ValueError: if several rows do.
    """
    found = select(rows, **wanted)
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {wanted}, expected at most one")
    return found[0].get(column) if found else None


def values(rows: Iterable[Row], column: str) -> list[Any]:
    """The different values of a column, ascending."""
    return sorted({row[column] for row in rows if row.get(column) is not None})


def number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def quotient(value: float | None, base: float | None, digits: int = 3) -> str:
    return NONE if value is None or not base else f"{value / base:.{digits}f}"


def with_ratio(value: float | None, base: float | None, digits: int = 2) -> str:
    """``value (value / base)``."""
    return NONE if value is None else f"{value:.{digits}f} ({quotient(value, base)})"


def spread(found: list[float], digits: int) -> str:
    """Mean ± sample standard deviation; the mean alone of one value."""
    if not found:
        return NONE
    mean = f"{statistics.mean(found):.{digits}f}"
    return f"{mean} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else mean


def mean(found: Iterable[float | None]) -> float | None:
    """The mean of those that are numbers; None if none is."""
    numbers = [value for value in found if value is not None]
    return statistics.mean(numbers) if numbers else None


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def missing(names: Iterable[str], what: str) -> list[str]:
    """A paragraph that names what has not been measured; no paragraph if nothing is missing."""
    names = list(names)
    return [f"**Missing** ({what}): {', '.join(names)}."] if names else []
