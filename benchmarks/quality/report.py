"""Writes docs/results.md and its pictures from the result files of the quality tables.

    python benchmarks/quality/report.py

Every number comes from a file below benchmarks/results, and every run of a configuration that has no rows there is
named as missing. Run it again when a result file changes: tests/test_report.py compares the page with the files.
"""

import argparse
import textwrap
from pathlib import Path

from report_glue import glue_section
from report_lm import Runs, ablation_section, cost_section, dynamic_k_section, perplexity_section
from report_plots import draw
from report_rows import TITLES, Results, read
from tables import ROOT, load_runs

HERE = Path(__file__).parent
CONFIGURATIONS = {"lm_perplexity": "Tables 1, 3 and 5", "glue": "Table 2", "ablations": "Table 4"}
INTRODUCTION = (
    "`python benchmarks/quality/report.py` writes this page from the files in "
    "[`benchmarks/results`](../benchmarks/results); it is not edited by hand. All methods of a table start from the "
    "same weights and train on the same batches for the same number of steps. The dense model trains on, too: it, not "
    "the teacher, is what the others are compared with. SEA means this package's default configuration, with what "
    "`benchmarks/quality/*.yaml` change of it; the SEA of the paper has the estimator, selection and average context "
    "of arXiv 2310.01777. Speed is in [performance.md](performance.md), how the design was found in "
    "[research-log.md](research-log.md)."
)


def read_all(folder: Path) -> tuple[dict[str, Results | None], dict[str, Runs]]:
    """Results and runs of every configuration, by its name."""
    results = {name: read(folder / f"{name}.json") for name in CONFIGURATIONS}
    runs = {name: load_runs(HERE / f"{name}.yaml", None, []) for name in CONFIGURATIONS}
    # The configuration has the slowest run first; the page begins with the dense model.
    language = runs["lm_perplexity"]
    order = [*(run for run in TITLES if run in language), *(run for run in language if run not in TITLES)]
    return results, runs | {"lm_perplexity": {run: language[run] for run in order}}


def document(results: dict[str, Results | None], runs: dict[str, Runs], pictures: list[str]) -> str:
    """The page in Markdown."""
    paragraphs = ["# Quality after distillation", INTRODUCTION]
    for name, tables in CONFIGURATIONS.items():
        if results[name] is None:
            paragraphs.append(f"**Missing**: `benchmarks/results/{name}.json`, and with it {tables.lower()}.")
    language, glue, ablations = (results[name] for name in CONFIGURATIONS)
    if language:
        paragraphs += perplexity_section(language, runs["lm_perplexity"])
        paragraphs += shown(pictures, "results_length.png", "Perplexity by length")
    if glue:
        paragraphs += glue_section(glue, runs["glue"])
        paragraphs += shown(pictures, "results_glue.png", "Scores by task")
    if language:
        paragraphs += dynamic_k_section(language, runs["lm_perplexity"])
        paragraphs += shown(pictures, "results_keys.png", "Perplexity by keys per row")
    if ablations:
        paragraphs += ablation_section(ablations, runs["ablations"], base="sea")
    if language:
        paragraphs += cost_section(language, runs["lm_perplexity"])
    return "\n\n".join(map(wrapped, paragraphs)) + "\n"


def wrapped(paragraph: str) -> str:
    """Prose in lines of at most 120 columns; tables, code, headings and pictures as they are."""
    if paragraph.startswith(("|", "    ", "#", "!")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def shown(pictures: list[str], name: str, caption: str) -> list[str]:
    return [f"![{caption}]({name})"] if name in pictures else []


def write(source: Path, target: Path) -> None:
    """Write ``results.md`` and the pictures into the folder ``target``."""
    results, runs = read_all(source)
    target.mkdir(parents=True, exist_ok=True)
    pictures = draw(results, runs, target)
    (target / "results.md").write_text(document(results, runs, pictures), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    write(options.results, options.docs)
