"""Launches of every Triton kernel, which can be compiled for a GPU that need not be there.

    TRITON_INTERPRET=0 python tests/triton_launches.py one_look

Operations run on the CPU with kernels that are compiled where they would be launched, so that all results are garbage.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import sea_kernels as ops
from sea_kernels.masks import RunMask

HOPPER = GPUTarget("cuda", 90, 32)
MOST_SHARED_BYTES = 232448  # of a program on this GPU
HEADS, ROWS, KEYS, WIDTH, NUM_BINS = 4, 70, 150, 64, 64


@contextmanager
def compiled_kernels() -> Iterator[set[str]]:
    """Names of kernels, with those of their modules, that operations inside this context would launch."""
    backend, names, done = make_backend(HOPPER), set(), set()

    def compile_kernel(self: JITFunction, *args, grid, warmup, **options) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        options.pop("instrumentation_mode", None)
        bound, specialization, options = binder(*args, **options, debug=False)
        variant = self.__module__, self.__name__, str(specialization), str(options)
        if variant not in done:
            packed = self._pack_args(backend, {}, bound, specialization, options)
            options, signature, constants, attributes = packed
            source = triton.compiler.ASTSource(self, signature, constants, attributes)
            shared = triton.compile(source, target=HOPPER, options=options.__dict__).metadata.shared
            assert shared <= MOST_SHARED_BYTES, f"{self.__name__} takes {shared} bytes of shared memory"
            done.add(variant)
        names.add(f"{self.__module__}.{self.__name__}")

    with patch.object(JITFunction, "run", compile_kernel):
        yield names


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and mask of the real keys, of layers whose key heads are shared."""
    shapes = (1, HEADS, ROWS, WIDTH), (1, HEADS // 2, KEYS, WIDTH), (1, HEADS // 2, KEYS, WIDTH)
    attention_mask = torch.arange(KEYS)[None] >= 20
    return *(torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes), attention_mask


def weights() -> dict[str, Tensor]:
    return {name: torch.ones(HEADS, requires_grad=True) for name in ("mean_weight", "bound_weight")}


def one_look() -> None:
    """The default: aligned bins, the far field, and distillation of both."""
    query, key, value, attention_mask = inputs()
    place = {"causal": True, "attention_mask": attention_mask, "backend": "triton"}
    bins = {"num_bins": NUM_BINS, "scaling": 0.1, **place, **weights()}
    scores = ops.weighted_scores(query, key, layout="aligned", **bins)
    mask = ops.pooled_selection(query, key, k=32, **bins)
    centre = torch.zeros(HEADS, WIDTH, requires_grad=True)
    context = ops.far_field_attention(query, key, value, mask, centre=centre, scaling=0.1, **place)
    teacher = query.detach(), key.detach()
    statistics = ops.teacher_statistics(*teacher, num_bins=NUM_BINS, layout="aligned", scaling=0.1, **place)
    losses = [
        context,
        ops.sparse_attention(query, key, value, mask, scaling=0.1, **place),
        *ops.estimation_loss(scores, statistics, layout="aligned", num_keys=KEYS, **place),
        *ops.attention_loss(*teacher, query, key, teacher_scaling=0.1, scaling=0.1, **place),
        ops.state_loss([torch.zeros_like(context)], [context], relative=True, backend="triton"),
    ]
    sum(loss.float().sum() for loss in losses).backward()


def two_looks() -> None:
    """Runs inside the bins of a first look, and a window."""
    query, key, value, attention_mask = inputs()
    place = {"causal": True, "attention_mask": attention_mask, "scaling": 0.1, "backend": "triton"}
    coarse = ops.pooled_selection(query, key, k=32, num_bins=NUM_BINS, **place, **weights())
    options = {"k": 8, "width": 2, "window": 0, "keep_first": True}
    runs = ops.second_look(query, key, coarse, **options, **place, **weights())
    centre = torch.zeros(HEADS, WIDTH, requires_grad=True)
    context = ops.far_field_attention(query, key, value, runs, coarse, centre=centre, **place)
    windowed = RunMask(runs.starts, 2, window=4, stride=2)
    kept = ops.kept_mass(query, key, runs, **place)
    (context.float().sum() + ops.sparse_attention(query, key, value, windowed, **place).float().sum()).backward()
    assert kept.shape == query.shape[:3]


def paper() -> None:
    """Bins of the relative layout, a linear context, and averages in its place."""
    query, key, value, attention_mask = inputs()
    place = {"causal": True, "attention_mask": attention_mask, "backend": "triton"}
    bins = {"num_bins": NUM_BINS, "layout": "relative", "scaling": 0.1, **place}
    projection = torch.zeros(32, WIDTH)
    linear = ops.linear_attention(query, key, value, projection, **place)
    scores = ops.weighted_scores(query, key, **bins, **weights())
    mask = ops.select_bins(scores.detach(), k=32, layout="relative", grouping="query", num_keys=KEYS, **place)
    scale = torch.ones(1, HEADS, ROWS, dtype=query.dtype, requires_grad=True)
    context = ops.sparse_attention(query, key, value, mask, row_scale=scale, scaling=0.1, **place)
    mixed = ops.mix_average(context, value, scale, attention_mask=attention_mask, backend="triton")
    statistics = ops.teacher_statistics(query.detach(), key.detach(), **bins)
    divergence, _ = ops.estimation_loss(scores, statistics, layout="relative", num_keys=KEYS, **place)
    ops.kept_mass(query, key, mask, scaling=0.1, **place)
    (linear.float().sum() + mixed.float().sum() + divergence.sum()).backward()


def bidirectional() -> None:
    """The paper's form for classifiers."""
    query, key, value, attention_mask = inputs()
    query = torch.zeros(1, HEADS, KEYS, WIDTH, dtype=query.dtype, requires_grad=True)
    place = {"causal": False, "attention_mask": attention_mask, "backend": "triton"}
    bins = {"num_bins": NUM_BINS, "layout": "relative", "scaling": 0.1, **place}
    linear = ops.linear_attention(query, key, value, torch.zeros(32, WIDTH), **place)
    scores = ops.pooled_scores(query, key, **bins)
    mask = ops.select_bins(scores.detach(), k=32, layout="relative", grouping="query", num_keys=KEYS, **place)
    context = ops.sparse_attention(query, key, value, mask, scaling=0.1, **place)
    (linear.float().sum() + scores.float().sum() + context.float().sum()).backward()


CASES: dict[str, Callable[[], None]] = {case.__name__: case for case in (one_look, two_looks, paper, bidirectional)}


if __name__ == "__main__":
    with compiled_kernels() as names:
        CASES[sys.argv[1]]()
    print(*sorted(names), sep="\n")
