"""What a bug report or a benchmark has to say about where it ran: ``python -m lightning_sea.environment``."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from . import __version__

PACKAGES = ("torch", "triton", "lightning", "transformers", "torchmetrics", "datasets", "jsonargparse")


def versions() -> dict[str, str]:
    """Version of every package that matters here, "not installed" where it is missing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name() -> str:
    """The GPUs' names, or the processor's and the number of threads that PyTorch uses."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{_processor_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _processor_name() -> str:
    details = Path("/proc/cpuinfo")  # Linux only; there platform.processor() says no more than the architecture
    if details.is_file():
        for line in details.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that this file lies in, "+changes" after it if the work tree differs; "unknown" outside a checkout.

    Results of benchmarks are no change: those of one say nothing of what made those of the next.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Everything as plain strings, in the order in which it is printed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "lightning-sea": __version__,
        **versions(),
        "cuda": torch.version.cuda or "none",
        "device": device_name(),
        "commit": commit(),
    }


def report() -> str:
    """One ``name: value`` line each, to paste into a bug report."""
    facts = environment()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


if __name__ == "__main__":
    print(report())
