"""Pictures of speed and memory by length: one layer's forward pass, and one layer's step of distillation."""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("quality")))

from matplotlib.axes import Axes
from report_plots import STYLE, plt

Row = dict[str, Any]
# Okabe and Ito's colours
COLOURS = {
    "dense": "#000000",
    "SEA": "#0072B2",
    "budgets": "#003F66",
    "stride 4": "#CC79A7",
    "two looks": "#009E73",
    "paper": "#56B4E9",
    "eager": "#999999",
    "window": "#E69F00",
}
STEPS = {"sea": ("SEA", "#0072B2"), "sea_dense": ("the same losses over T x T maps", "#999999")}
STEPS |= {"sdpa": ("dense attention, no distillation", "#000000"), "sparse_attention": ("sparse attention", "#D55E00")}


def draw(results: dict[str, list[Row]], forward: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Write the pictures; their names. ``forward``: what the rows of each method of ``COLOURS`` have."""
    layers = [row for row in results["attention_forward"] if row["causal"] and row["heads"] == 32]
    steps = [row for row in results["distillation_step"] if row["model"] == "layer" and row["heads"] == 32]
    jobs = {
        "speed_forward.png": (layers, {name: (name, colour, forward[name]) for name, colour in COLOURS.items()}),
        "speed_training.png": (steps, {name: (*label, {"method": name}) for name, label in STEPS.items()}),
    }
    memory = {"speed_forward.png": "extra_mib", "speed_training.png": "peak_mib"}
    with plt.rc_context(STYLE):
        for name, (rows, methods) in jobs.items():
            figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
            plot(axes[0], rows, methods, "ms", "milliseconds")
            plot(axes[1], rows, methods, memory[name], "MiB beside inputs")
            axes[0].legend(fontsize=8)
            figure.savefig(folder / name, dpi=144, metadata={"Software": None})
            plt.close(figure)
    return list(jobs)


def plot(axes: Axes, rows: list[Row], methods: dict[str, tuple[str, str, dict]], column: str, label: str) -> None:
    """One line per method over the length, both axes logarithmic."""
    for title, colour, wanted in methods.values():
        own = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        points = sorted((row["seq_len"], row[column]) for row in own if row[column])
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if column != "ms":
        axes.set_ylim(bottom=1)  # less is what the allocator rounds up
    ticks = sorted({row["seq_len"] for row in rows})
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
