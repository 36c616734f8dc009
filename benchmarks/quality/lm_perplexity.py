"""Perplexity of a language model after distillation: teacher, the dense model continued, SEA, and other methods.

    python benchmarks/quality/prepare.py …  # once, see there
    python benchmarks/quality/lm_perplexity.py --model models/SmolLM2-135M --text data/quality \\
        --output benchmarks/results/lm_perplexity.json

Every run of ``lm_perplexity.yaml`` trains one model on the same windows of text in the same order, and tests it at
several lengths and, for SEA, at several k, without further training; rows of models that were tested at several k go to
``dynamic_k.json`` as well, beside the output. With ``--config`` other files of this folder: ``ablations.yaml`` takes
SEA's parts out one by one, ``rising_k.yaml`` asks when more keys stop helping, ``designs.yaml`` and ``trials.yaml``
chose the settings. ``--split validation`` tests on the text that settings are chosen by.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from tables import Row, main, parser, write_report
from torch.utils.data import DataLoader
from trainers import device, sparsity, trainer

from lightning_sea.adapt import set_k
from lightning_sea.budgets import calibrate_budgets
from lightning_sea.callbacks import DrawnBudget, SparsityMonitor
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


def arguments(settings: dict) -> dict:
    """Arguments of the module of a run beside the model; a run without ``sea`` is dense."""
    sea, distillation = settings.get("sea"), settings.get("distillation")
    preset = SEAConfig.paper_opt if settings.get("paper") else SEAConfig
    return {
        "attention": "sea" if sea else "dense",
        "sea": preset(**sea) if sea else None,
        "distillation": DistillationConfig(**distillation) if distillation else None,
        "estimator_steps": settings["estimator_steps"] if sea else 0,
        "optimizer": OptimizerConfig(**settings["optimizer"]),
        "freeze_base": settings["freeze_base"],
    }


class Tests:
    """Tests of one model, before and after its training: one trainer, and the batches of every length made once.

    Args:
        module: the model.
        settings: of the run.
        options: of the command line.
    """

    def __init__(self, module: CausalLMModule, settings: dict, options: argparse.Namespace) -> None:
        self.module, self.settings, self.options = module, settings, options
        self.trained_k = (settings.get("sea") or {}).get("k")
        self.monitor = SparsityMonitor(per_layer=False)
        sparse = module.attention == "sea" and module.student.sea_conversion.config.method == "sea"
        self.trainer = trainer([self.monitor] if sparse else [])
        self.batches: dict[int, DataLoader] = {}

    def run(self, parts: list[dict]) -> Iterator[Row]:
        """Rows of every pair of k and length that ``parts`` name, each once; without k, of every length."""
        done = set()
        for part in parts:
            for k, seq_len in itertools.product(self.allowed_k(part), part["seq_len"]):
                if (k, seq_len) not in done:
                    done.add((k, seq_len))
                    sparsity_batches = part.get("sparsity_batches", self.settings["sparsity_batches"])
                    yield {"k": k} | self.test(k, seq_len, sparsity_batches)
        if self.trained_k:
            set_k(self.module.student, self.trained_k)

    def allowed_k(self, part: dict) -> list[int | None]:
        """Those k of a part that the run may be tested at: one if it keeps the k that it trained with, or has none."""
        if self.trained_k is None or "k" not in part:
            return [self.trained_k]
        return [k for k in part["k"] if k == self.trained_k or self.settings["changes_k"]]

    def test(self, k: int | None, seq_len: int, sparsity_batches: int) -> Row:
        """Perplexity at one length, and what SEA keeps, measured on the first batches."""
        if k:
            set_k(self.module.student, k)
        if seq_len not in self.batches:
            data = text(self.settings, self.options, seq_len, max(1, TOKENS_PER_BATCH // seq_len))
            data.setup("test")
            self.batches[seq_len] = data.test_dataloader()
        self.monitor.eval_batches = sparsity_batches
        (found,) = self.trainer.test(self.module, self.batches[seq_len], verbose=False)
        return {
            "seq_len": seq_len,
            "metric": "perplexity",
            "value": round(found["test/perplexity"], 4),
            **sparsity(found),
        }


def share_keys(module: CausalLMModule, settings: dict, options: argparse.Namespace) -> None:
    """Give heads budgets of their own, from batches of the training text; what the callback does when a fit starts."""
    data = text(settings, options, settings["train_len"], settings["batch_size"])
    data.setup("fit")
    student = module.student.to(device())
    batches = itertools.islice(data.train_dataloader(), settings["head_budgets"])
    with torch.autocast(student.device.type, torch.bfloat16, enabled=torch.cuda.is_available()):
        calibrate_budgets(student, ({"input_ids": batch["input_ids"].to(student.device)} for batch in batches))


def train(module: CausalLMModule, settings: dict, options: argparse.Namespace) -> Row:
    """Train the model; what that cost."""
    data = text(settings, options, settings["train_len"], settings["batch_size"])
    data.setup("fit")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    drawn = [DrawnBudget(settings["train_k"], settings["seed"])] if settings.get("train_k") else []
    fit = trainer(drawn, max_steps=settings["steps"])
    begin = time.perf_counter()
    fit.fit(module, data)
    cost = {"train_seconds": round(time.perf_counter() - begin, 1)}
    if "train/task" in fit.callback_metrics:
        cost["train_loss"] = round(float(fit.callback_metrics["train/task"]), 4)
    if torch.cuda.is_available():
        cost["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return cost


def run(name: str, settings: dict, options: argparse.Namespace) -> Iterator[Row]:
    """Train one model and test it, before (what conversion alone gives) and after."""
    torch.set_float32_matmul_precision("high")
    seed_everything(settings["seed"])
    module, sea = CausalLMModule(options.model, **arguments(settings)), settings.get("sea")
    method = settings.get("label") or (sea.get("method", "sea") if sea else "dense")
    common = {"task": "lm", "model": "SmolLM2-135M", "method": method, "variant": settings.get("variant", "")}
    common |= {"predictor_length": module.student.sea_conversion.config.predictor_length if sea else None}
    common |= {"seed": settings["seed"], "train_len": settings["train_len"], "split": options.split}
    if settings["head_budgets"]:
        share_keys(module, settings, options)
    tests = Tests(module, settings, options)
    untrained = common | {"steps": 0} | ({} if sea else {"method": "teacher"})
    yield from (untrained | row for row in tests.run(settings["untrained_tests"]))
    if settings["steps"]:
        trained = common | {"steps": settings["steps"]} | train(module, settings, options)
        yield from (trained | row for row in tests.run(settings["tests"]))


def write_dynamic_k(output: Path) -> None:
    """Table 3 by itself: rows after training of every run that ``output`` has at several k, under the same head."""
    report = json.loads(output.read_text())
    trained = [row for row in report["rows"] if row["steps"]]
    tested = {run: {row["k"] for row in trained if row["run"] == run} for run in {row["run"] for row in trained}}
    rows = [row for row in trained if len(tested[row["run"]]) > 1]
    if rows:
        write_report(output.with_name("dynamic_k.json"), report | {"rows": rows})


if __name__ == "__main__":
    command = parser(__doc__, "lm_perplexity.yaml")
    command.add_argument("--model", required=True, help="transformers directory of SmolLM2-135M")
    command.add_argument("--text", type=Path, required=True, help="folder that prepare.py wrote")
    command.add_argument("--split", choices=("validation", "test"), default="test")
    options = command.parse_args()
    main(options, run)
    if not options.worker and options.config.stem == "lm_perplexity":
        write_dynamic_k(options.output)
