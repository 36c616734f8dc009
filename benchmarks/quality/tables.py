"""What the scripts of the quality tables share: runs from a YAML file, each in its own process, into one JSON file.

A configuration has ``defaults`` and ``runs``; a run is the defaults with its own values merged in, mapping by mapping.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lightning_sea.environment import commit, device_name, versions  # noqa: E402

Row = dict[str, Any]


def load_runs(path: Path, only: list[str] | None, overrides: list[str]) -> dict[str, dict]:
    """Name to settings of the runs of a configuration, in its order.

    Args:
        path: the YAML file.
        only: names of runs, or None for all.
        overrides: ``key.of.defaults=value``, which every run takes over, except below what a run has set to null.

    Raises:
        ValueError: for a name that is not among the runs.
    """
    config = OmegaConf.load(path)
    names = list(config.runs)
    unknown = [name for name in only or [] if name not in names]
    if unknown:
        raise ValueError(f"--only names {unknown}, expected some of {names}")
    changes = OmegaConf.from_dotlist(overrides)
    return {name: _settings(config, name, changes) for name in names if only is None or name in only}


def _settings(config: DictConfig, name: str, changes: DictConfig) -> dict:
    settings = OmegaConf.merge(config.defaults, config.runs[name] or {})
    off = {key for key in settings if settings[key] is None and OmegaConf.is_dict(changes.get(key))}
    kept = OmegaConf.masked_copy(changes, [key for key in changes if key not in off])
    return OmegaConf.to_container(OmegaConf.merge(settings, kept), resolve=True)


def parser(description: str, config: str) -> argparse.ArgumentParser:
    """Arguments that every table has."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", type=Path, default=Path(__file__).with_name(config))
    arguments.add_argument("--output", type=Path, required=True, help="the JSON file; rows of other runs in it stay")
    arguments.add_argument("--only", nargs="+", help="names of runs, default all")
    arguments.add_argument("--parallel", type=int, default=1, help="runs at a time on the one device")
    arguments.add_argument("--set", nargs="*", default=[], help="key=value for all runs, such as steps=10")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)  # the run that this process does
    return arguments


def main(options: argparse.Namespace, run: Callable[[str, dict, argparse.Namespace], Iterator[Row]]) -> None:
    """Do the runs that ``options`` ask for; ``run`` gives the rows of one, each as soon as it is measured."""
    runs = load_runs(options.config, options.only, options.set)
    if options.worker:
        torch.set_num_threads(max(1, torch.get_num_threads() // options.parallel))  # workers would slow one another
        rows: list[Row] = []
        origin = {"device": device_name(), "commit": commit()}  # of this run: a file may hold runs of several calls
        for row in run(options.worker, runs[options.worker], options):
            rows.append({"run": options.worker, **row, **origin})
            print(rows[-1], flush=True)
            write_results(_part(options.output, options.worker), rows)  # a run that is cut short leaves what it has
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    merge_parts(options.output)  # what an earlier call left that was cut short
    failed = _run_processes(list(runs), options)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _run_processes(waiting: list[str], options: argparse.Namespace) -> list[str]:
    """Start every run in a process of its own, ``options.parallel`` at a time; names of those that failed."""
    running: dict[str, subprocess.Popen] = {}
    failed, begin = [], time.perf_counter()
    while waiting or running:
        while waiting and len(running) < options.parallel:
            name = waiting.pop(0)
            log = _part(options.output, name).with_suffix(".log").open("w")
            running[name] = subprocess.Popen(
                [sys.executable, *sys.argv, "--worker", name], stdout=log, stderr=subprocess.STDOUT
            )
        time.sleep(0.2)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            merge_parts(options.output, name)
            print(f"{time.perf_counter() - begin:6.0f} s  {name}: {'done' if code == 0 else 'FAILED'}", flush=True)
            if code:
                failed.append(name)
                print(_part(options.output, name).with_suffix(".log").read_text()[-2000:], flush=True)
    return failed


def _part(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}.{name}.part.json")


def merge_parts(output: Path, name: str = "*") -> None:
    """Put the rows of one run, or of all that left a part, into ``output``, in place of older ones of that variant."""
    parts = sorted(output.parent.glob(_part(output, name).name))
    if not parts:
        return
    rows = [row for part in parts for row in json.loads(part.read_text())["rows"]]
    new = {(row["run"], row.get("variant")) for row in rows}
    old = json.loads(output.read_text())["rows"] if output.is_file() else []
    write_results(output, [row for row in old if (row["run"], row.get("variant")) not in new] + rows)
    for part in parts:
        part.unlink()


def write_results(path: Path, rows: list[Row]) -> None:
    """A result file of this process: where the rows come from, and the rows."""
    head = {
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    write_report(path, head | {"rows": rows})


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a result file anew, its rows one a line: whole or not at all, whenever the process ends."""
    head = {name: value for name, value in report.items() if name != "rows"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in report["rows"])
    new = path.with_suffix(".new")
    new.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    new.replace(path)
