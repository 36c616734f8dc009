"""The page of results says what the result files say, and what they lack."""

import json
from pathlib import Path

import pytest
import report
import report_rows

ROOT = Path(__file__).parents[1]
HEAD = {
    "device": "a device",
    "versions": {"torch": "2.0", "triton": "3.0", "transformers": "5.0"},
    "commit": "0123456789abcdef+changes",
    "command": "python a_script.py --parallel 3",
}
LM = {"task": "lm", "model": "a model", "seed": 1, "train_len": 512, "split": "test", "metric": "perplexity"}
GLUE = {"model": "a model", "metric": "accuracy", "steps": 5}


def lm_row(run: str, value: float, *, k: int | None = None, seq_len: int = 256, steps: int = 5, **more) -> dict:
    method = "teacher" if run == "dense" and not steps else run
    row = LM | {"run": run, "method": method, "steps": steps, "k": k, "seq_len": seq_len, "value": value}
    return row | ({"train_seconds": 30.0, "peak_mib": 1500} if steps else {}) | more


def glue_rows(task: str, seed: int, **scores: float) -> list[dict]:
    place = GLUE | {"run": f"{task}_{seed}", "task": task, "seed": seed}
    return [
        place | {"method": name.split("_")[0], "value": value} | ({} if name == "teacher" else {"variant": name})
        for name, value in scores.items()
    ]


def page(folder: Path, **files: list[dict]) -> str:
    """The page of these rows; pictures are drawn, too."""
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(HEAD | {"rows": rows}))
    report.write(folder, folder / "docs")
    return " ".join((folder / "docs" / "results.md").read_text().split())  # lines of prose end anywhere


@pytest.fixture
def language_rows():
    return [
        lm_row("dense", 30.0, steps=0),
        lm_row("dense", 20.0, train_seconds=10.0, peak_mib=1000),
        lm_row("dense", 20.0, train_seconds=10.0, peak_mib=1000),
        lm_row("dense", 16.0, seq_len=512, train_seconds=10.0, peak_mib=1000),
        lm_row("sea", 33.0, k=512, steps=0),
        lm_row("sea", 21.0, k=512, keys_per_row=60.0, density=0.25, kept_mass=0.8),
        lm_row("sea", 24.0, k=32, keys_per_row=31.0, density=0.125, kept_mass=0.7),
        lm_row("sea", 18.0, k=512, seq_len=512, keys_per_row=62.0, pooled_per_row=200.0, density=0.2, kept_mass=0.75),
    ]


def test_perplexities_stand_beside_their_ratio_to_the_continued_dense_model(tmp_path, language_rows):
    text = page(tmp_path, lm_perplexity=language_rows)
    assert "| dense, the teacher | – | 30.00 (1.500) | – |" in text
    assert text.count("| dense, trained on | – | 20.00 (1.000) | 16.00 (1.000) |") == 1
    assert "| SEA (k = 512) | 62.0 | 21.00 (1.050) | 18.00 (1.125) |" in text
    assert "| SEA (k = 512) | – | 33.00 (1.100) | – |" in text, "untrained: against the teacher"
    assert "At 512 tokens SEA (k = 512) has perplexity 18.00: 1.125 times" in text
    assert "62.0 keys, 20.0% of those" in text
    assert "`0123456789` with changes by python a_script.py" in text


def test_runs_from_several_places_are_told_apart(tmp_path, language_rows):
    places = {"dense": ("a device", "aaaaaaaaaaaa"), "sea": ("another", "bbbbbbbbbbbb+changes")}
    rows = [row | dict(zip(("device", "commit"), places[row["run"]], strict=True)) for row in language_rows]
    text = page(tmp_path, lm_perplexity=rows)
    assert "Its runs: dense on a device at `aaaaaaaaaa`; sea on another at `bbbbbbbbbb` with changes." in text


def test_other_k_and_cost(tmp_path, language_rows):
    text = page(tmp_path, lm_perplexity=language_rows)
    assert "| 32 | 31.0 | 0.700 | – | 24.00 (1.200) | – |" in text
    assert "| **512** | 60.0 | 0.800 | 33.00 | 21.00 (1.050) | 18.00 (1.125) |" in text
    assert "| SEA (k = 512) | 5 | 62.0 | 200.0 | 0.2000 | 0.750 | 30 (3.00) | 1500 (1.50) |" in text
    assert "up to 3 runs shared the device" in text


def test_what_the_files_lack_is_named(tmp_path, language_rows):
    text = page(tmp_path, lm_perplexity=language_rows)
    assert "**Missing**: `benchmarks/results/glue.json`, and with it table 2." in text
    assert "**Missing**: `benchmarks/results/ablations.json`, and with it table 4." in text
    ours = (
        "SEA, budgets of heads (k = 512), SEA, two looks (k = 64), SEA, two looks, budgets of heads (k = 64), "
        "SEA, two looks, the first at 2048 keys (k = 64)"
    )
    others = "SEA of the paper (k = 64), window (k = 64), window (k = 512), Performer, cosFormer"
    assert f"**Missing** (no row in the file): {ours}, {others}." in text
    assert "**Missing** (no rows at several k in the file): SEA, budgets of heads, SEA, two looks" in text
    assert {path.name for path in (tmp_path / "docs").glob("*.png")} == {"results_length.png", "results_keys.png"}


def test_scores_have_mean_and_spread_over_seeds_and_are_paired_with_the_dense_model(tmp_path):
    rows = []
    for task in ("sst2", "cola", "mrpc", "rte", "imdb"):
        rows += glue_rows(task, 1, teacher=0.5, dense=0.8, sea_7=0.78)
        rows += glue_rows(task, 2, teacher=0.6, dense=0.9, sea_7=0.84)
    rows += glue_rows("sst2", 3, dense=0.7)
    rows = [row | ({"keys_per_row": 7.0, "density": 0.5} if row["method"] == "sea" else {}) for row in rows]
    text = page(tmp_path, glue=rows)
    assert "**Missing**: `benchmarks/results/lm_perplexity.json`, and with it tables 1, 3 and 5." in text
    assert "| dense, trained on | 80.0 ± 10.0 | 85.0 ± 7.1 |" in text, "sst2 has a third seed, cola has two"
    assert "| SEA (k = 7) | 81.0 ± 4.2 | 81.0 ± 4.2 | 81.0 ± 4.2 | 81.0 ± 4.2 | 81.0 ± 4.2 | -4.00 ± 2.83 |" in text
    assert "| SEA (k = 7) | 7.0 (0.500, –) | 7.0 (0.500, –) |" in text
    assert "sst2_1 without SEA (k = 13), " in text
    assert "all of cola_3" in text
    assert (tmp_path / "docs" / "results_glue.png").stat().st_size > 10_000


def test_a_task_that_is_not_measured_yet_leaves_the_others_to_compare(tmp_path):
    rows = glue_rows("rte", 1, teacher=0.5, dense=0.6, sea_7=0.58) + glue_rows(
        "cola", 1, teacher=0.5, dense=0.4, sea_7=0.39
    )
    text = page(tmp_path, glue=rows)
    assert "| SEA (k = 7) | – | 39.0 | – | 58.0 | – | -1.50 |" in text
    assert "all of sst2_1" in text


def test_ablations_are_compared_with_the_unchanged_run(tmp_path):
    rows = [lm_row("sea", 20.0, k=512, keys_per_row=60.0), lm_row("two_looks", 25.0, k=512, keys_per_row=61.0)]
    text = page(tmp_path, ablations=rows)
    assert "| SEA | 20.00 (1.000) | 60.0 | – | 30 |" in text
    assert "| 64 keys, found by two looks | 25.00 (1.250) | 61.0 | – | 30 |" in text
    assert "nothing in place of the far field" in text.split("**Missing** (no row in the file):")[1]


def test_one_place_with_two_measurements_is_an_error():
    rows = [lm_row("sea", 20.0, k=512, seed=1), lm_row("sea", 21.0, k=512, seed=2)]
    with pytest.raises(ValueError, match="2 rows have"):
        report_rows.pick(rows, "value", run="sea", seq_len=256)


def test_the_page_in_docs_is_what_the_committed_files_give():
    results, runs = report.read_all(ROOT / "benchmarks" / "results")
    pictures = [path.name for path in (ROOT / "docs").glob("results_*.png")]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == report.document(results, runs, pictures), "run python benchmarks/quality/report.py"
