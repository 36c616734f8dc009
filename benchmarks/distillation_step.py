"""Time and memory of a distillation step: one attention layer, and a whole language model. Needs a GPU.

    python benchmarks/distillation_step.py --model models/SmolLM2-135M --text data/quality/validation.tokens

The gradients of all operations are checked first (``distillation_checks.py``). Then, causal, batch 1, in bf16:

- ``layer``: forward and backward of one attention layer with the losses of its estimate, its attention and its context;
  the teacher's queries, keys, values, context and log-sum-exps are given, as its own attention leaves them in training.
  Forms and inputs as in ``attention_forward.py``: those of a language model on text, or without ``--model`` synthetic
  ones, whose neighbouring rows agree much less.
- ``llama-125m``: training steps of ``CausalLMModule``, the optimiser's included, with all of its losses under autocast.
  Weights and tokens are random, so that neighbouring rows agree little: the worst case for sparse attention.

Methods: ``sea``; ``sea_dense``, the same with the losses of attention maps over T x T maps (``dense_distillation.py``);
``sdpa``, no distillation at all: dense attention forward and backward, or a step of plain training with it. Of a layer
also single operations, forward and backward. ``peak_mib`` is what a step allocates beside its inputs (for the model:
beside weights, gradients and optimiser). Time and memory are null where memory runs out.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import dense_distillation
import torch
from attention_forward import FORMS
from distillation_checks import gradient_checks
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import ROOT, median_ms, report_head, smooth, write_report
from recorded import Recorded
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import sea_kernels as ops
from lightning_sea import distillation
from lightning_sea.attention import SEAAttention
from lightning_sea.config import SEAConfig
from lightning_sea.distillation import DistillationConfig, layer_losses, weighted_sum
from lightning_sea.flash import attend_with_log_sum
from lightning_sea.recorder import LayerRecord
from lightning_sea.tasks import CausalLMModule

Numbers = dict[str, float | None]

HEAD_DIM = 64
PLACE = {"causal": True, "scaling": HEAD_DIM**-0.5}
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
METHODS = ("sea", "sea_dense", "sdpa")
OPERATIONS = ("sparse_attention", "far_field_attention", "attention_losses", "estimation_losses")
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
WARM_UP_STEPS, MEASURED_STEPS = 2, 3
PLACE_IN_REPORT = ("model", "heads", "seq_len", "form", "gradient_checkpointing")  # of rows that belong together
LARGEST_ERROR_RATIO = 2.0


class UntilMemoryEnds:
    """Takes measurements; once memory has run out for a method, it has no numbers: longer inputs need more."""

    def __init__(self) -> None:
        self.ended: set[str] = set()

    def __call__(self, method: str, measurement: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if method not in self.ended:
            try:
                return measurement()
            except torch.OutOfMemoryError:
                self.ended.add(method)
        torch.cuda.empty_cache()  # out of the handler, whose error holds on to tensors
        return {"ms": None, "peak_mib": None}


# One layer


def layer_inputs(
    heads: int, seq_len: int, form: str, recorded: Recorded | None = None
) -> tuple[SEAAttention, LayerRecord, list[Tensor]]:
    """A fresh layer, the teacher's record, and the student's query, key and value, which are not far from it.

    Synthetic ones, or those ``recorded``.
    """
    config = SEAConfig(**FORMS[form])
    layer = SEAAttention(config, num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM, causal=True).cuda()
    query, key, value = recorded.inputs(seq_len) if recorded else [smooth(heads, seq_len, HEAD_DIM) for _ in range(3)]
    with torch.no_grad():
        context, log_sum = attend_with_log_sum(query, key, value, **PLACE)
    teacher = LayerRecord(query, key, value, context.transpose(1, 2), PLACE["scaling"], None, True, None, log_sum)
    return layer, teacher, [(x + 0.1 * x.std() * torch.randn_like(x)).requires_grad_() for x in (query, key, value)]


def losses_of(method: str) -> AbstractContextManager:
    """Context in which ``layer_losses`` are those of ``method``."""
    if method == "sea":
        return nullcontext()
    dense = {name: getattr(dense_distillation, name) for name in ("estimation_rows", "attention_rows")}
    return mock.patch.multiple(distillation, **dense)


def layer_step(layer: SEAAttention, teacher: LayerRecord, inputs: list[Tensor], method: str) -> tuple[Tensor, ...]:
    """Gradients of the losses of one layer for query, key, value and the layer's parameters."""
    config = DistillationConfig()
    context, estimate = layer(*inputs, scaling=teacher.scaling)
    student = LayerRecord(*inputs, context, teacher.scaling, None, True, estimate)
    with losses_of(method):
        loss = weighted_sum(layer_losses([(teacher, student)], config), config)
        return torch.autograd.grad(loss, [*inputs, *layer.parameters()])


def operation_steps(
    layer: SEAAttention, teacher: LayerRecord, inputs: list[Tensor]
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of single operations."""
    with torch.no_grad():
        estimate = layer.estimate(*inputs, scaling=teacher.scaling)
    student = LayerRecord(*inputs, None, teacher.scaling, None, True, estimate)
    centre, scores = (tensor.detach().requires_grad_() for tensor in (layer.centre, estimate.scores))
    grad, config = torch.randn_like(inputs[0]), DistillationConfig()

    def sparse() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.sparse_attention(*inputs, estimate.mask, **PLACE), inputs, grad)

    def far_field() -> tuple[Tensor, ...]:
        masks = estimate.mask, estimate.coarse
        context = ops.far_field_attention(*inputs, *masks, centre=centre, **PLACE)
        return torch.autograd.grad(context, [*inputs, centre], grad)

    def attention() -> tuple[Tensor, ...]:
        loss = weighted_sum(distillation.attention_losses(teacher, student), config)
        return torch.autograd.grad(loss, inputs[:2])

    def estimation() -> tuple[Tensor, ...]:
        own = distillation.estimation_losses(teacher, replace(estimate, scores=scores))
        return torch.autograd.grad(weighted_sum(own, config), [scores])

    return dict(zip(OPERATIONS, (sparse, far_field, attention, estimation), strict=True))


def sdpa_step(inputs: list[Tensor], grad: Tensor, backend: SDPBackend) -> tuple[Tensor, ...]:
    """Dense attention, forward and backward."""
    with sdpa_kernel(backend):
        context = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return torch.autograd.grad(context, inputs, grad)


def measured(step: Callable[[], Any]) -> Numbers:
    """Median time of a step and the most memory that it holds beside what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms = median_ms(step, budget_ms=100, repeats=10)
    return {"ms": round(ms, 3), "peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}


def layer_rows(
    heads: int, seq_len: int, form: str, methods: list[str], recorded: Recorded | None, attempt: UntilMemoryEnds
) -> Iterator[dict[str, Any]]:
    """All rows of one number of heads and one length."""
    layer, teacher, inputs = layer_inputs(heads, seq_len, form, recorded)
    grad = torch.randn_like(inputs[0])
    runs = {name: measured(lambda b=backend: sdpa_step(inputs, grad, b)) for name, backend in DENSE.items()}
    fastest = min(runs, key=lambda name: runs[name]["ms"])
    operations = operation_steps(layer, teacher, inputs)
    for method in methods:
        if method == "sdpa":
            numbers = {**runs[fastest], "backend": fastest}
        else:
            step = operations.get(method, lambda m=method: layer_step(layer, teacher, inputs, m))
            numbers = attempt(method, lambda step=step: measured(step))
        ratio = None if numbers["ms"] is None else round(runs[fastest]["ms"] / numbers["ms"], 3)
        row = {"method": method, "model": "layer", "heads": heads, "seq_len": seq_len, **numbers, "sdpa_ratio": ratio}
        yield row | {"inputs": "recorded" if recorded else "synthetic"}


# A whole model


class StepMeter(Callback):
    """Time and memory of every training step, measured on an idle device."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.peak_mib: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before, self._begin = torch.cuda.memory_allocated(), time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.cuda.synchronize()
        self.ms.append(1000 * (time.perf_counter() - self._begin))
        self.peak_mib.append((torch.cuda.max_memory_allocated() - self._before) / 2**20)

    def numbers(self, warm_up: int) -> Numbers:
        """Without the first ``warm_up`` steps, in which kernels compile and the optimiser's state appears."""
        ms, peak_mib = self.ms[warm_up:], self.peak_mib[warm_up:]
        return {"ms": round(statistics.median(ms), 3), "peak_mib": round(max(peak_mib), 1)}


def save_model(directory: str, **changes: Any) -> None:
    """A random Llama of 124 million parameters, or with ``changes`` of another size."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**MODEL, **changes})).save_pretrained(directory)


def training_module(directory: str, method: str, form: str, *, gradient_checkpointing: bool = False) -> CausalLMModule:
    """What trains with ``method`` from the model in ``directory``."""
    attention = {"attention": "dense"} if method == "sdpa" else {"attention": "sea", "sea": SEAConfig(**FORMS[form])}
    module = CausalLMModule(directory, **attention)
    if gradient_checkpointing:
        module.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module


def training_steps(module: CausalLMModule, method: str, seq_len: int) -> Numbers:
    """Train for a few steps on random tokens."""
    steps = WARM_UP_STEPS + MEASURED_STEPS
    tokens = torch.randint(module.student.config.vocab_size, (steps, seq_len))
    items = [{"input_ids": row, "labels": row} for row in tokens]
    meter = StepMeter()
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with losses_of("sea" if method == "sdpa" else method):
        trainer.fit(module, DataLoader(items, batch_size=1))
    return meter.numbers(WARM_UP_STEPS)


def model_rows(
    lengths: list[int], form: str, methods: list[str], *, gradient_checkpointing: bool = False
) -> Iterator[dict[str, Any]]:
    """All rows of the model, those of one length one after another: they are compared, and the host may get busy."""
    attempt = UntilMemoryEnds()
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory)
        for seq_len, method in itertools.product(lengths, methods):
            make = partial(training_module, directory, method, form, gradient_checkpointing=gradient_checkpointing)
            numbers = attempt(method, lambda make=make, name=method, n=seq_len: training_steps(make(), name, n))
            row = {"method": method, "model": "llama-125m", "heads": MODEL["num_attention_heads"]}
            yield {**row, "gradient_checkpointing": gradient_checkpointing, "seq_len": seq_len, **numbers}


# Report


def table(rows: list[dict[str, Any]]) -> str:
    """One line per model, number of heads and length; one column of time and memory per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places = list(dict.fromkeys((row["model"], row["heads"], row["seq_len"]) for row in rows))
    numbers = {(row["method"], row["model"], row["heads"], row["seq_len"]): row for row in rows}
    lines = [["model", "heads", "tokens", *(f"{method} (ms, MiB)" for method in methods)]]
    for place in places:
        found = (numbers.get((method, *place)) for method in methods)
        lines.append([*map(str, place), *map(_cell, found)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "out of memory" if row["ms"] is None else f"{row['ms']:.2f} {row['peak_mib']:8.0f}"


def checked_gradients(form: str) -> dict[str, dict]:
    """Stops the run if a gradient is wrong."""
    layer, teacher, inputs = layer_inputs(4, 1000, form)
    checks = gradient_checks(layer, teacher, inputs)
    for name, check in checks.items():
        if not check["error_ratio"] <= LARGEST_ERROR_RATIO or not check["repeats"]:
            raise SystemExit(f"{name}: {check}, expected at most {LARGEST_ERROR_RATIO} and repeated bits")
    first, second = (layer_step(layer, teacher, inputs, "sea") for _ in range(2))
    checks["layer"] = {"repeats": all(torch.equal(*pair) for pair in zip(first, second, strict=True))}
    return checks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/distillation_step.json", help="other rows in it stay"
    )
    parser.add_argument("--form", choices=FORMS, default="default", help="of the SEA layers")
    parser.add_argument("--heads", type=int, nargs="*", default=[32, 12], help="of the layer; none skips the layer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 * 2**i for i in range(7)], help="of the layer")
    parser.add_argument("--model", help="transformers directory of a causal language model with heads of 64")
    parser.add_argument("--text", type=Path, help="text for the model, of as many tokens as the longest input")
    parser.add_argument("--operations", nargs="*", choices=OPERATIONS, default=OPERATIONS[:2])
    parser.add_argument("--model-lengths", type=int, nargs="*", default=[2048 * 2**i for i in range(5)])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the model")
    options = parser.parse_args(arguments)
    if options.model and not options.text:
        parser.error("--model needs --text")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    torch.manual_seed(0)
    report = {**report_head(), "gradient_checks": checked_gradients(options.form), "rows": []}
    print(json.dumps(report), flush=True)

    def add(rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            report["rows"].append(row | {"form": options.form})
            print(json.dumps(report["rows"][-1]), flush=True)
            write_report(report, options.output, PLACE_IN_REPORT)

    for heads in options.heads:
        attempt, methods = UntilMemoryEnds(), [*options.methods, *options.operations]
        recorded = Recorded(options.model, options.text, heads) if options.model else None
        for seq_len in options.lengths:
            add(layer_rows(heads, seq_len, options.form, methods, recorded, attempt))
        del recorded
    if options.model_lengths:
        checkpointing = options.gradient_checkpointing
        add(model_rows(options.model_lengths, options.form, options.methods, gradient_checkpointing=checkpointing))
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
