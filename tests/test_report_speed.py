"""The pages about speed say what the result files say."""

import re
from pathlib import Path

import pytest
import report_speed as report
from report_speed_plots import draw

ROOT = Path(__file__).parents[1]


def layer(method: str, ms: float | None, seq_len: int = 2048, **more) -> dict:
    ratio = None if ms is None else 6.0 / ms
    return {"method": method, "seq_len": seq_len, "ms": ms, "extra_mib": 7.6, "sdpa_ratio": ratio, **more}


def test_pages_are_those_of_the_files():
    tables = report.tables(report.read(ROOT / "benchmarks/results"))
    pages = [(ROOT / page).read_text() for page in report.PAGES]
    assert [report.fill(page, tables) for page in pages] == pages
    assert {name for page in pages for name in re.findall("<!-- (.+?) -->", page)} - {"end"} == set(tables)


def test_a_table_of_layers():
    one_look = {"query_stride": 1, "k": 512, "head_budgets": False}
    rows = [layer("sdpa", 6.0), layer("sea", 2.0, **one_look), layer("sea", 12.5, **one_look | {"k": 64})]
    rows += [layer("eager", 150.2), layer("sdpa", 6.0, 4096), layer("eager", None, 4096)]
    assert report.forward_table(rows, ["dense", "SEA", "two looks", "eager"]).splitlines() == [
        "| tokens | dense | SEA | two looks | eager | MiB: SEA / two looks / eager |",
        "| - | - | - | - | - | - |",
        "| 2k | 6.00 | 2.00 (3.00) | 12.5 (0.48) | 150 | 8 / 8 / 8 |",
        "| 4k | 6.00 |  |  | out of memory |  |",
    ]


def test_a_table_of_steps():
    rows = [{"method": "sea", "seq_len": 1024, "ms": 7.654, "peak_mib": 136.7}]
    rows.append({"method": "sea_dense", "seq_len": 1024, "ms": None, "peak_mib": None})
    assert report.step_table(rows, {"sea": "ours", "sea_dense": "maps", "sdpa": "dense"}).splitlines()[2:] == [
        "| 1k | 7.65 (137) | out of memory |  |"
    ]


def test_steps_with_gradient_checkpointing_are_not_in_the_table_of_models():
    results = report.read(ROOT / "benchmarks/results")
    steps = results["distillation_step"]
    with_it = [row for row in steps if row.get("gradient_checkpointing")]
    without = [row for row in steps if not row.get("gradient_checkpointing")]
    assert with_it
    orders = [without, with_it + without, without + with_it]
    assert len({report.tables({**results, "distillation_step": rows})["model"] for rows in orders}) == 1


def test_text_around_tables_stays():
    page = "before\n<!-- one -->\nold\nlines\n<!-- end -->\nbetween\n<!-- two -->\n<!-- end -->\nafter"
    filled = report.fill(page, {"one": "1", "two": "2"})
    assert filled == "before\n<!-- one -->\n1\n<!-- end -->\nbetween\n<!-- two -->\n2\n<!-- end -->\nafter"
    with pytest.raises(KeyError, match="two"):
        report.fill(page, {"one": "1"})


def test_pictures(tmp_path):
    names = draw(report.read(ROOT / "benchmarks/results"), report.FORWARD, tmp_path)
    page = (ROOT / "docs/performance.md").read_text()
    assert len(names) == 2
    for name in names:
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"]({name})" in page
        assert (ROOT / "docs" / name).is_file()
