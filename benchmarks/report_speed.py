"""Writes the tables of docs/performance.md and README.md, and the pictures of speed, from the result files of speed.

    python benchmarks/report_speed.py

A table stands between ``<!-- name -->`` and ``<!-- end -->``; the text around it is written by hand. Run it again when
a result file changes: tests/test_report_speed.py compares the pages with the files.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from report_speed_plots import draw

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md")
Row = dict[str, Any]

ONE_LOOK = {"method": "sea", "query_stride": 1, "k": 512}
FORWARD = {
    "dense": {"method": "sdpa"},
    "SEA": ONE_LOOK | {"head_budgets": False},
    "budgets": ONE_LOOK | {"head_budgets": True},
    "stride 4": ONE_LOOK | {"head_budgets": False, "query_stride": 4},
    "two looks": ONE_LOOK | {"head_budgets": False, "k": 64},
    "two looks, budgets": ONE_LOOK | {"head_budgets": True, "k": 64},
    "paper": {"method": "sea_paper", "query_stride": 1},
    "eager": {"method": "eager"},
    "window": {"method": "flex_window"},
}
MEMORY = ("SEA", "two looks", "eager")
STAGES = {
    "SEA": ("pooled_selection", "far_field_attention"),
    "stride 4": ("pooled_selection", "far_field_attention"),
    "two looks": ("pooled_selection", "second_look", "far_field_attention"),
}
PREFILL = {
    "dense": {"method": "sdpa"},
    "SEA": {"form": "default", "query_stride": 1},
    "stride 4": {"form": "default", "query_stride": 4},
    "two looks": {"form": "two_looks", "query_stride": 1},
}


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def first(rows: Iterable[Row], **wanted: Any) -> Row | None:
    return next(iter(select(rows, **wanted)), None)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def timed(row: Row | None, show: Callable[[Row], str]) -> str:
    """A cell: nothing where there is no row, and what ``show`` makes of one that has a time."""
    if row is None:
        return ""
    return "out of memory" if row["ms"] is None else show(row)


def with_ratio(row: Row) -> str:
    """Time, and dense attention's over it."""
    ratio = "" if row["method"] in ("sdpa", "eager", "flex_window") else f" ({number(row['sdpa_ratio'])})"
    return number(row["ms"]) + ratio


def plain(row: Row) -> str:
    return number(row["ms"])


def mib(numbers: Iterable[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in numbers)


def tokens(seq_len: int) -> str:
    return f"{seq_len // 1024}k"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["-"] * len(head), *lines))


def lengths(rows: list[Row]) -> list[int]:
    return sorted({row["seq_len"] for row in rows})


def forward_table(rows: list[Row], methods: list[str]) -> str:
    """Milliseconds of a layer by length, and the memory that it takes beside inputs and output."""

    def line(seq_len: int) -> list[str]:
        own = {name: first(rows, seq_len=seq_len, **FORWARD[name]) for name in FORWARD}
        memory = [row["extra_mib"] for row in map(own.get, MEMORY) if row and row["ms"]]
        return [tokens(seq_len), *(timed(own[name], with_ratio) for name in methods), mib(memory)]

    return table(["tokens", *methods, f"MiB: {' / '.join(MEMORY)}"], map(line, lengths(rows)))


def short_table(rows: list[Row]) -> str:
    """The same in short, for some lengths."""
    titles = {"dense": "dense", "SEA": "SEA", "stride 4": "SEA, four rows share an estimate"}
    titles |= {"budgets": "SEA, keys shared by need"}

    def line(seq_len: int) -> list[str]:
        return [tokens(seq_len), *(timed(first(rows, seq_len=seq_len, **FORWARD[n]), plain) for n in titles)]

    return table(["tokens", *titles.values()], map(line, (2048, 8192, 16384, 32768, 131072)))


def device_table(rows: list[Row]) -> str:
    """Times of SEA's layers as replayed from a CUDA graph."""
    names = ("SEA", "stride 4")

    def cell(seq_len: int, name: str) -> str:
        row, dense = (first(rows, seq_len=seq_len, **FORWARD[method]) for method in (name, "dense"))
        return f"{number(row['graph_ms'])} ({number(dense['ms'] / row['graph_ms'])})"

    lines = ([tokens(n), *(cell(n, name) for name in names)] for n in lengths(rows) if n <= 8192)
    return table(["tokens", *names], lines)


def stages_table(rows: list[Row]) -> str:
    titles = {"pooled_selection": "selection", "second_look": "second look", "far_field_attention": "far field"}
    head = [f"{name}: {titles[stage]}" for name, stages in STAGES.items() for stage in stages]

    def line(seq_len: int) -> list[str]:
        found = {name: first(rows, seq_len=seq_len, **FORWARD[name])["stages_ms"] for name in STAGES}
        return [tokens(seq_len), *(number(found[name][stage]) for name, stages in STAGES.items() for stage in stages)]

    return table(["tokens", *head], map(line, (8192, 16384, 32768, 131072)))


def prefill_table(rows: list[Row]) -> str:
    def line(place: tuple[str, int]) -> list[str]:
        own = select(rows, model=place[0], seq_len=place[1])
        memory = (first(own, **PREFILL[name])["extra_mib"] for name in ("dense", "SEA"))
        cells = [timed(first(own, **wanted), with_ratio) for wanted in PREFILL.values()]
        return [place[0], tokens(place[1]), *cells, mib(memory)]

    places = dict.fromkeys((row["model"], row["seq_len"]) for row in rows)
    return table(["model", "tokens", *PREFILL, "MiB: dense / SEA"], map(line, places))


def step_table(rows: list[Row], methods: dict[str, str]) -> str:
    """Milliseconds and MiB of training; ``methods``: name in the file to title."""

    def cell(seq_len: int, method: str) -> str:
        return timed(first(rows, seq_len=seq_len, method=method), lambda r: f"{number(r['ms'])} ({r['peak_mib']:.0f})")

    lines = ([tokens(seq_len), *(cell(seq_len, method) for method in methods)] for seq_len in lengths(rows))
    return table(["tokens", *methods.values()], lines)


def tables(results: dict[str, list[Row]]) -> dict[str, str]:
    """All tables by name."""
    forward, step = results["attention_forward"], results["distillation_step"]
    many = select(forward, causal=True, heads=32)
    losses = {"sea": "distillation", "sea_dense": "with T x T maps", "sdpa": "dense attention, no distillation"}
    alone = {"sparse_attention": "sparse attention alone", "far_field_attention": "far field alone"}
    return {
        "forward, 32 heads": forward_table(many, list(FORWARD)),
        "forward, 32 heads, some": short_table(many),
        "device": device_table(many),
        "forward, 12 heads": forward_table(
            select(forward, causal=True, heads=12), [name for name in FORWARD if name != "two looks, budgets"]
        ),
        "forward, bidirectional": forward_table(
            select(forward, causal=False), ["dense", "SEA", "two looks", "paper", "eager", "window"]
        ),
        "stages": stages_table(many),
        "prefill": prefill_table(results["prefill"]),
        "layer": step_table(select(step, model="layer", heads=32), losses | alone),
        "model": step_table(select(step, model="llama-125m", gradient_checkpointing=False), losses),
    }


def fill(page: str, found: dict[str, str]) -> str:
    """The page with new tables. Raises KeyError for the name of a table that does not exist."""

    def block(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (.+?) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def read(folder: Path) -> dict[str, list[Row]]:
    names = "attention_forward", "distillation_step", "prefill"
    return {name: json.loads((folder / f"{name}.json").read_text())["rows"] for name in names}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = read(ROOT / "benchmarks/results")
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(), tables(results)))
    draw(results, FORWARD, ROOT / "docs")


if __name__ == "__main__":
    main()
