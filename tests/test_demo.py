"""The demo prints one table per task, draws, and gives the same metrics twice."""

import json
from pathlib import Path

import pytest

from lightning_sea.demo import COLUMNS, format_table, main, run_row

ROOT = Path(__file__).parents[1]
SHORT = [
    *("--seed_everything", "3", "--trainer.max_steps", "4", "--trainer.val_check_interval", "4"),
    *("--trainer.log_every_n_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "2"),
    *("--trainer.enable_progress_bar", "false", "--model.estimator_steps", "2", "--data.batch_size", "2"),
]


def test_the_table_has_one_line_per_row_and_dashes_for_what_is_missing():
    rows = {
        "teacher": {"metric": 20.0, "peak_memory_mib": 512.4, "seconds": 3.0},
        "SEA": {"metric": 20.5, "keys_per_query": 60.0, "pooled_per_query": 99.5, "density": 0.234, "kept_mass": 0.9},
    }
    lines = format_table("lm", rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["lm", "perplexity"]
    assert [heading in lines[0] for heading, _ in COLUMNS.values()] == [True] * len(COLUMNS)
    assert lines[2].split() == ["teacher", "20.000", "-", "-", "-", "-", "512", "3"]
    assert lines[3].split() == ["SEA", "20.500", "60.0", "99.5", "23.4%", "90.0%", "-", "-"]


@pytest.mark.parametrize("task", ["classifier", "lm"])
def test_one_seed_gives_the_same_metrics_twice(task, tmp_path):
    config = str(ROOT / "configs" / "demo" / f"{task}.yaml")
    first, second = (run_row(task, "SEA", config, str(tmp_path / name), SHORT) for name in ("a", "b"))
    for name in ("metric", "keys_per_query", "density", "kept_mass"):
        assert first[name] == second[name], name
    assert (tmp_path / "a" / task / "sea" / "model" / "sea.json").is_file()


@pytest.mark.slow
def test_the_whole_demo_prints_and_writes_what_it_says(tmp_path, capfd):
    configs, output = str(ROOT / "configs" / "demo"), str(tmp_path)
    main(["--tasks", "classifier", "--configs", configs, "--output", output, "--seed", "3", *SHORT[2:]])
    printed = capfd.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"device", "versions", "commit", "command"} < results.keys()
    results = results["tasks"]["classifier"]
    assert list(results) == ["teacher", "dense", "SEA"]
    assert format_table("classifier", results) in printed
    assert set(COLUMNS) <= results["SEA"].keys()
    assert "keys_per_query" not in results["dense"]
    assert results["SEA"]["pictures"]
    for picture in results["SEA"]["pictures"]:
        assert picture in printed
        assert Path(picture).is_file()
    assert list(tmp_path.glob("classifier/sea/events.out.tfevents.*"))


def test_outside_a_checkout_the_demo_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the demo in a checkout, or pass --configs"):
        main(["--tasks", "lm", "--configs", str(tmp_path), "--output", str(tmp_path)])
