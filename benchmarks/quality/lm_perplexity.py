"""Perplexity of a language model after distillation: teacher, the dense model continued, SEA, and other methods.

    python benchmarks/quality/prepare.py …  # once, see there
    python benchmarks/quality/lm_perplexity.py --model models/SmolLM2-135M --text data/quality \\
        --output benchmarks/results/lm_perplexity.json

Every run of ``lm_perplexity.yaml`` trains one model on the same windows of text in the same order, and tests it at
several lengths and, for SEA, at several k, without further training. ``--split validation`` tests on the text that
settings were chosen by, for choosing more of them.
"""

import argparse
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from tables import Row, main, parser

from lightning_sea.adapt import set_k
from lightning_sea.callbacks import SparsityMonitor
from lightning_sea.config import SEAConfig
from lightning_sea.data import TextDataModule
from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import CausalLMModule
from lightning_sea.tasks.optimization import OptimizerConfig

TOKENS_PER_BATCH = 16384  # in tests, whatever the length


def text(settings: dict, options: argparse.Namespace, seq_len: int, batch_size: int) -> TextDataModule:
    source = {"train": options.text / "train.jsonl.gz", "validation": options.text / "validation.tokens"}
    source["test"] = options.text / f"{options.split}.tokens"
    files = {split: str(path) for split, path in source.items()}
    return TextDataModule(options.model, files, seq_len=seq_len, batch_size=batch_size, seed=settings["seed"])


def build(settings: dict, options: argparse.Namespace) -> CausalLMModule:
    """The module of a run; a run without ``sea`` is dense."""
    sea, distillation = settings.get("sea"), settings.get("distillation")
    preset = SEAConfig.paper_opt if settings.get("paper") else SEAConfig
    return CausalLMModule(
        options.model,
        attention="sea" if sea else "dense",
        sea=preset(**sea) if sea else None,
        distillation=DistillationConfig(**distillation) if distillation else None,
        estimator_steps=settings["estimator_steps"] if sea else 0,
        optimizer=OptimizerConfig(**settings["optimizer"]),
    )


def trainer(settings: dict, callbacks: list, **changes) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=settings["log_every"],
        **changes,
    )


def test(module: CausalLMModule, settings: dict, options: argparse.Namespace, seq_len: int) -> Row:
    """Perplexity at one length, and what SEA keeps, measured on the first batches."""
    sparse = module.attention == "sea" and settings["sea"].get("method", "sea") == "sea"
    callbacks = [SparsityMonitor(eval_batches=settings["sparsity_batches"], per_layer=False)] if sparse else []
    data = text(settings, options, seq_len, max(1, TOKENS_PER_BATCH // seq_len))
    (found,) = trainer(settings, callbacks, enable_progress_bar=False).test(module, data, verbose=False)
    row = {"seq_len": seq_len, "metric": "perplexity", "value": round(found["test/perplexity"], 4)}
    for column, name in (("keys_per_row", "keys_per_query"), ("kept_mass", "kept_mass"), ("density", "density")):
        if f"test/{name}" in found:
            row[column] = round(found[f"test/{name}"], 4)
    return row


def test_all(module: CausalLMModule, settings: dict, options: argparse.Namespace) -> list[Row]:
    """Rows of all lengths and, for SEA and the window, of all k that the settings ask for."""
    trained = settings["sea"]["k"] if "k" in (settings.get("sea") or {}) else None
    rows = []
    for part in settings["tests"]:
        for k in (part.get("k") or [trained]) if trained else [None]:
            if trained and k != trained and not settings["changes_k"]:
                continue
            if trained:
                set_k(module.student, k)
            for seq_len in part["seq_len"]:
                rows.append({"k": k, **test(module, settings, options, seq_len)})
                print(rows[-1], flush=True)
    if trained:
        set_k(module.student, trained)
    return rows


def run(name: str, settings: dict, options: argparse.Namespace) -> list[Row]:
    """Train one model and test it, before (what conversion alone gives) and after."""
    torch.set_float32_matmul_precision("high")
    seed_everything(settings["seed"])
    module, sea = build(settings, options), settings.get("sea")
    method = settings.get("label") or (sea.get("method", "sea") if sea else "dense")
    common = {"task": "lm", "model": "SmolLM2-135M", "method": method, "variant": settings.get("variant", "")}
    common |= {"predictor_length": module.student.sea_conversion.config.predictor_length if sea else None}
    common |= {"seed": settings["seed"], "train_len": settings["train_len"], "split": options.split}
    rows = []
    if settings["test_untrained"]:
        untrained = common | {"steps": 0} | ({} if sea else {"method": "teacher"})
        rows += [untrained | row for row in test_all(module, settings, options)]
    if settings["steps"]:
        data = text(settings, options, settings["train_len"], settings["batch_size"])
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        fit = trainer(settings, [], max_steps=settings["steps"], enable_progress_bar=False)
        begin = time.perf_counter()
        fit.fit(module, data)
        cost = {"train_seconds": round(time.perf_counter() - begin, 1)}
        cost["train_loss"] = round(float(fit.callback_metrics["train/task"]), 4)
        if torch.cuda.is_available():
            cost["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        rows += [common | {"steps": settings["steps"]} | row | cost for row in test_all(module, settings, options)]
    return rows


if __name__ == "__main__":
    arguments = parser(__doc__, "lm_perplexity.yaml")
    arguments.add_argument("--model", required=True, help="transformers directory of SmolLM2-135M")
    arguments.add_argument("--text", type=Path, required=True, help="folder that prepare.py wrote")
    arguments.add_argument("--split", choices=("validation", "test"), default="test")
    main(arguments.parse_args(), run)
