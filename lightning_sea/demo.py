"""The demo: distils SEA into a small classifier and a small language model and compares, on a CPU in five minutes.

Every row of its tables is one run of the command line with ``configs/demo/<task>.yaml``, in a process of its own:

- ``teacher`` tests the pretrained model that comes with the package,
- ``dense`` trains that model further, for as many steps and on the same batches as SEA, then tests it,
- ``SEA`` distils and tests.

Run it from a checkout: ``make demo``, or ``python -m lightning_sea.demo --help``.
"""

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .environment import commit, device_name, versions

ROWS = ("teacher", "dense", "SEA")
METRICS = {"classifier": "accuracy", "lm": "perplexity"}
COLUMNS = {  # name in the results: (heading, format)
    "metric": ("", "{:.3f}"),
    "keys_per_query": ("keys per query", "{:.1f}"),
    "pooled_per_query": ("pooled runs", "{:.1f}"),
    "density": ("density", "{:.1%}"),
    "kept_mass": ("kept teacher mass", "{:.1%}"),
    "peak_memory_mib": ("peak memory (MiB)", "{:.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def run_row(task: str, row: str, config: str, output: str, overrides: Sequence[str]) -> dict[str, float | list[str]]:
    """One row: run the command line, then test on the held-out split.

    Args:
        task: key of ``METRICS``.
        row: one of ``ROWS``.
        config: the YAML file.
        output: folder for logs, pictures and the trained model.
        overrides: further command line arguments.

    Returns:
        The row's numbers under the keys of ``COLUMNS``, as far as it has them, and the paths of its ``pictures``.
    """
    from .cli import run

    begin = time.perf_counter()
    arguments = ["-c", config, "--trainer.logger.save_dir", output, "--trainer.logger.name", f"{task}/{row.lower()}"]
    arguments += ["--model.attention", "sea" if row == "SEA" else "dense", *overrides]
    peaks = []
    if row == "teacher":
        cli = run(["test", *arguments])
    else:
        cli = run(["fit", *arguments, "--model.export_dir", f"{output}/{task}/{row.lower()}/model"])
        peaks.append(float(cli.trainer.callback_metrics["train/peak_memory_mib"]))
        cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    found = {name.removeprefix("test/"): float(value) for name, value in cli.trainer.callback_metrics.items()}
    found["metric"] = found[METRICS[task]]
    found["peak_memory_mib"] = max([found["peak_memory_mib"], *peaks])
    found["seconds"] = time.perf_counter() - begin
    numbers = {name: found[name] for name in COLUMNS if name in found}
    drawn = [path for callback in cli.trainer.callbacks for path in getattr(callback, "written", [])]
    return {**numbers, "pictures": list(dict.fromkeys(map(str, drawn)))}


def format_table(task: str, rows: dict[str, dict]) -> str:
    """A plain text table, one line per row; "-" where a row has no such number."""
    headings = [task, *(heading or METRICS[task] for heading, _ in COLUMNS.values())]
    lines = [headings]
    for row, numbers in rows.items():
        cells = (form.format(numbers[name]) if name in numbers else "-" for name, (_, form) in COLUMNS.items())
        lines.append([row, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def run_task(task: str, configs: Path, output: Path, overrides: Sequence[str]) -> dict[str, dict]:
    """All rows of one task, each in a fresh process, so that memory and random numbers start anew."""
    config = configs / f"{task}.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist: run the demo in a checkout, or pass --configs")
    context, rows = multiprocessing.get_context("spawn"), {}
    for row in ROWS:
        print(f"\n=== {task}: {row}", flush=True)
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            rows[row] = pool.submit(run_row, task, row, str(config), str(output), overrides).result()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--configs", type=Path, default=Path("configs/demo"), help="folder of the YAML files")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=1, help="one seed gives the same metrics every time")
    options, overrides = parser.parse_known_args(arguments)  # the rest goes to the command line of every run
    begin, results = time.perf_counter(), {}
    for task in options.tasks:
        results[task] = run_task(
            task, options.configs, options.output, ["--seed_everything", str(options.seed), *overrides]
        )
    command = shlex.join(["python", "-m", "lightning_sea.demo", *(sys.argv[1:] if arguments is None else arguments)])
    report = {"device": device_name(), "versions": versions(), "commit": commit(), "command": command, "tasks": results}
    (options.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    for task, rows in results.items():
        print(f"\n{format_table(task, rows)}")
        for picture in rows["SEA"]["pictures"]:
            print(f"picture      {picture}")
    print(f"\nTensorBoard  tensorboard --logdir {options.output}")
    print(f"numbers      {options.output / 'results.json'}")
    print(f"This took {time.perf_counter() - begin:.0f} seconds.")


if __name__ == "__main__":
    main()
