"""Peak memory of one SEA layer's inference forward on the CPU, as the length doubles: it should grow linearly.

Every length runs in a process of its own, because a peak cannot be taken back. What is reported is the peak of the
resident memory, as Linux counts it, above what the process held just before the forward pass: inputs and weights are
not in it, the output is. The C library is told to hand freed blocks back at once, so that its holes are not counted.

    python benchmarks/memory_inference.py --output benchmarks/results/memory_inference.json
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from lightning_sea.attention import SEAAttention
from lightning_sea.config import SEAConfig
from lightning_sea.environment import commit, device_name, versions

CONFIGS = {"default": SEAConfig(), "paper_opt": SEAConfig.paper_opt()}
NUM_HEADS, HEAD_DIM = 12, 64
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@torch.inference_mode()
def measure(name: str, seq_len: int) -> dict[str, float]:
    """Peak in MiB above the start and seconds of one causal forward, batch 1, float32; meant for a fresh process."""
    torch.manual_seed(0)
    sizes = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_HEADS, "head_dim": HEAD_DIM}
    layer = SEAAttention(CONFIGS[name], **sizes, causal=True).eval()

    def forward(length: int) -> dict[str, float]:
        query, key, value = torch.randn(3, 1, NUM_HEADS, length, HEAD_DIM)
        before, begin = psutil.Process().memory_info().rss, time.perf_counter()
        layer(query, key, value, scaling=HEAD_DIM**-0.5)
        seconds, peak = time.perf_counter() - begin, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_mib": (peak - before) / 2**20, "seconds": seconds}

    forward(64)  # what PyTorch loads and keeps at a first call is no cost of the length
    return forward(seq_len)


def run(name: str, seq_lens: list[int]) -> list[dict]:
    """One row per length, each measured in its own process; ``growth`` compares with the length before."""
    rows = []
    for seq_len in seq_lens:
        command = [sys.executable, __file__, "--measure", name, str(seq_len)]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
        row = {"config": name, "seq_len": seq_len, **json.loads(result.stdout)}
        row["growth"] = row["peak_mib"] / rows[-1]["peak_mib"] if rows else None
        rows.append(row)
        print(f"{name:10} T = {seq_len:6}: {row['peak_mib']:8.0f} MiB, {row['seconds']:6.1f} s", file=sys.stderr)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--output", type=Path, help="where to write the JSON; printed without it")
    parser.add_argument("--measure", nargs=2, metavar=("CONFIG", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    report = {
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/memory_inference.py", *(arguments or sys.argv[1:])]),
        "shape": {"batch": 1, "num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "causal": True},
        "rows": [row for name in options.configs for row in run(name, options.seq_lens)],
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
