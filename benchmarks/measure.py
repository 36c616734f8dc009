"""What the benchmarks that need a GPU share: time, memory, inputs, and the head of a result file.

Importing it puts the checkout on Python's path, so that scripts beside it run without the package being installed.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lightning_sea.environment import commit, versions  # noqa: E402


def median_ms(function: Callable[[], Any], budget_ms: float = 150.0, repeats: int = 25) -> float:
    """Median time of a call on the device, after a warm-up; fewer repeats for slow functions."""
    function()
    function()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repeats):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        function()
        pair[1].record()
        pairs.append(pair)
        if len(pairs) in (3, 5):
            pair[1].synchronize()
            if sum(start.elapsed_time(end) for start, end in pairs) > budget_ms:
                break
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def graph_ms(function: Callable[[], Any]) -> float:
    """Median time of a call replayed from a CUDA graph: the device alone, without Python and its launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever is compiled or allocated once must not be captured
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay)


def extra_mib(function: Callable[[], Any]) -> float:
    """Peak memory of a call above what was there before, without the result if that is a tensor."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    own = result.numel() * result.element_size() if isinstance(result, Tensor) else 0
    return (peak - own) / 2**20


def time_and_memory(function: Callable[[], Any], *, graph: bool = False) -> dict[str, float | None]:
    """``ms`` and ``extra_mib`` of a call, with ``graph`` also ``graph_ms``; None for all where memory runs out."""
    measures = {"ms": (median_ms, 4), "extra_mib": (extra_mib, 1)}
    if graph:
        measures["graph_ms"] = graph_ms, 4
    try:
        return {name: round(measure(function), digits) for name, (measure, digits) in measures.items()}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return dict.fromkeys(measures)


def smooth(heads: int, seq_len: int, head_dim: int = 64, batch: int = 1, device: str = "cuda") -> Tensor:
    """Synthetic queries, keys or values: bf16 ``[N, H, T, D]`` in the memory order [N, T, H, D] of projections.

    Half of the variance follows a random walk that takes a step every 32 tokens, so that neighbouring rows agree in
    part, as in a language model.
    """
    walk = torch.randn(batch * heads, head_dim, seq_len // 32 + 2, device=device)
    walk = F.interpolate(walk, size=seq_len, mode="linear").transpose(1, 2) * 1.2  # 1.2: interpolation averages
    noise = torch.randn(batch * heads, seq_len, head_dim, device=device)
    rows = (0.5**0.5 * (walk + noise)).bfloat16().unflatten(0, (batch, heads))
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


def ceilings() -> dict[str, float]:
    """What this device reaches: bandwidth of a copy, and rate of a large matrix product."""
    source = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = median_ms(lambda: matrix @ matrix)
    return {
        "copy_tb_s": round(2 * source.numel() * 2 / copy / 1e9, 3),
        "matmul_tflop_s": round(2 * 8192**3 / product / 1e9, 1),
    }


def report_head() -> dict[str, Any]:
    """Where and how these numbers were taken; add ``rows`` and whatever else the report says."""
    return {
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        **ceilings(),
    }


def write_report(report: dict[str, Any], path: Path, place: Sequence[str]) -> None:
    """Write the JSON anew; call it after every few rows, so that an interrupted run leaves what it has.

    Rows of an earlier run stay where this one has none of the same values in the columns ``place``, inside which rows
    are compared. So every row says its device and commit.
    """
    origin = {name: report[name] for name in ("device", "commit") if name in report}
    own = {_values(row, place) for row in report["rows"]}
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in earlier if _values(row, place) not in own] + [row | origin for row in report["rows"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


def _values(row: dict[str, Any], place: Sequence[str]) -> tuple:
    return tuple(row.get(name) for name in place)
