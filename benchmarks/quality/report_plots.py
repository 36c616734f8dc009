"""The report's pictures: perplexity by length, perplexity by keys per row, scores by task."""

import statistics
from pathlib import Path

import matplotlib
from report_glue import scores, tasks, variants
from report_lm import Runs, after, common_length, dense_by_length, title
from report_rows import TITLES, Results, select, values

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "teacher": "#999999",
    "dense": "#000000",
    "sea": "#0072B2",
    "sea_budgets": "#003F66",
    "sea_two_looks": "#009E73",
    "sea_two_looks_budgets": "#004D38",
    "sea_two_looks_wide": "#7BC8A4",
    "sea_paper": "#56B4E9",
    "window": "#E69F00",
    "window_512": "#F0E442",
    "performer": "#D55E00",
    "cosformer": "#CC79A7",
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(results: dict[str, Results | None], runs: dict[str, Runs], folder: Path) -> list[str]:
    """Write the pictures for which there are results into ``folder``; their names."""
    jobs = []
    if results["lm_perplexity"]:
        jobs += [("results_length.png", by_length, "lm_perplexity"), ("results_keys.png", by_keys, "lm_perplexity")]
    if results["glue"]:
        jobs.append(("results_glue.png", by_task, "glue"))
    with plt.rc_context(STYLE):
        for name, plot, source in jobs:
            figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
            plot(axes, results[source], runs[source])
            figure.savefig(folder / name, dpi=144, metadata={"Software": None})
            plt.close(figure)
    return [name for name, *_ in jobs]


def by_length(axes: Axes, results: Results, runs: Runs) -> None:
    """One line per method, at the k that it trained with."""
    lines = {TITLES["teacher"]: ("teacher", select(results.rows, method="teacher"))}
    lines |= {title(run, settings): (run, after(results, run, settings)) for run, settings in runs.items()}
    for label, (run, rows) in lines.items():
        points = sorted((row["seq_len"], row["value"]) for row in rows)
        if points:
            dashes = "--" if run == "teacher" else "-"
            axes.plot(*zip(*points, strict=True), dashes, marker="o", color=COLOURS.get(run), label=label)
    lengths = values(results.rows, "seq_len")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    _finish_perplexity(axes)
    axes.set_xlabel("length, tokens")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def by_keys(axes: Axes, results: Results, runs: Runs) -> None:
    """One line per method that was tested at several k, at the length where most k were; the dense models level.

    A window keeps k keys in every row that sees so many: its rows have no count.
    """
    several = {run: rows for run in runs if len(values(rows := select(results.rows, run=run), "k")) > 1}
    if not several:
        return
    length = common_length([row for rows in several.values() for row in rows])
    for run, rows in several.items():
        for trained, dashes in ((True, "-"), (False, ":")):
            found = [row for row in select(rows, seq_len=length) if bool(row["steps"]) == trained]
            points = sorted((row.get("keys_per_row", row["k"]), row["value"]) for row in found)
            if points:
                label = TITLES.get(run, run) + ("" if trained else ", untrained")
                axes.plot(*zip(*points, strict=True), dashes, marker="o", color=COLOURS.get(run), label=label)
    for method, trained in (("dense", True), ("teacher", False)):
        level = dense_by_length(results, trained=trained).get(length)
        if level:
            axes.axhline(level, color=COLOURS[method], linestyle="-" if trained else "--", label=TITLES[method])
    ticks = values([row for rows in several.values() for row in rows], "k")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    _finish_perplexity(axes)
    axes.set_xlabel(f"exact keys per row, at {length} tokens")
    axes.legend(loc="upper right")


def _finish_perplexity(axes: Axes) -> None:
    """Logarithmic, with ticks that are plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in (5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 400, 800, 1600, 3200) if low <= tick <= high]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_ylabel("perplexity")


def by_task(axes: Axes, results: Results, runs: Runs) -> None:
    """Bars of the means, whiskers of one standard deviation."""
    titles = variants(runs)
    names = [name for name in titles if any(scores(results, name, task) for task in tasks(runs))]
    shades = plt.get_cmap("Blues")
    ours = [name for name in names if name.startswith("sea_") and name not in COLOURS]
    colours = COLOURS | {name: shades(0.35 + 0.6 * index / max(1, len(ours) - 1)) for index, name in enumerate(ours)}
    colours["sea_paper"] = "#009E73"  # beside the blues of the k
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [list(scores(results, name, task).values()) for task in tasks(runs)]
        place = [task + (index - (len(names) - 1) / 2) * width for task in range(len(found))]
        bars = [statistics.mean(part) if part else float("nan") for part in found]
        errors = [statistics.stdev(part) if len(part) > 1 else 0.0 for part in found]
        axes.bar(place, bars, width, yerr=errors, color=colours.get(name), ecolor="#444444", label=titles[name])
    axes.set_xticks(range(len(tasks(runs))), tasks(runs))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("score, per cent")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
