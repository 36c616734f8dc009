"""Where a SEA layer's forward pass spends its time: every operation and submodule, timed while the layer runs."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import sea_kernels

OPERATIONS = (
    "weighted_scores",
    "pooled_selection",
    "select_bins",
    "second_look",
    "linear_attention",
    "sparse_attention",
    "far_field_attention",
    "mix_average",
)


def stages_ms(layer: nn.Module, forward: Callable[[], Any], repeats: int = 7) -> dict[str, float]:
    """Median time on the device between the start and the end of each stage, those of equal name summed.

    Args:
        layer: whose operations and submodules are the stages.
        forward: runs the layer once, and has run before.
        repeats: forward passes.

    Returns:
        Milliseconds by name; where the device waits for Python, they contain the wait.
    """
    runs = [_stages_of_one_run(layer, forward) for _ in range(repeats)]
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def _stages_of_one_run(layer: nn.Module, forward: Callable[[], Any]) -> dict[str, float]:
    events = defaultdict(list)

    def timed(name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = function(*args, **kwargs)
            end.record()
            events[name].append((start, end))
            return result

        return run

    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(patch.object(sea_kernels, name, timed(name, getattr(sea_kernels, name))))
        for name, module in layer.named_children():
            stack.enter_context(patch.object(module, "forward", timed(name, module.forward)))
        forward()
    torch.cuda.synchronize()
    return {name: sum(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()}
