"""Classification and regression of sentences and sentence pairs: GLUE's nine tasks and the embedded topics."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Accuracy, F1Score, MatthewsCorrCoef, Metric, PearsonCorrCoef, SpearmanCorrCoef
from transformers import AutoModelForSequenceClassification

from ..data.glue_tasks import GLUETask, get_task
from .base import Batch, DistillationModule


class GLUEModule(DistillationModule):
    """Trains and evaluates a classifier (or, for STS-B, a regressor) with the task's official metrics.

    Batches hold ``input_ids``, ``attention_mask``, ``labels`` and, where the model has them, ``token_type_ids``; to
    predict, ``index`` in place of ``labels``. Logs ``val/{metric}`` and ``test/{metric}`` with the metrics of
    ``data/glue_tasks.py``; a second data set (MNLI mismatched) adds ``_mismatched`` to the names.

    Args:
        task: one of ``data.glue_tasks.TASKS``.
        prediction_dir: where ``predict`` writes the files that GLUE's server takes; null takes ``predictions`` below
            the trainer's root directory.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(self, model: str, task: str, prediction_dir: str | None = None, **kwargs: Any) -> None:
        self.task = get_task(task)
        super().__init__(model=model, **kwargs)
        self.prediction_dir = prediction_dir
        self.save_hyperparameters({"task": task, "prediction_dir": prediction_dir})
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{split}": nn.ModuleDict({name: build_metric(name, self.task) for name in self.task.metrics})
                for stage, splits in (("val", self.task.validation_splits), ("test", self.task.test_splits))
                for split in range(len(splits))
            }
        )
        self._predictions: list[dict[int, Any]] = []

    def model_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_labels": self.task.num_labels}
        if self.task.labels:
            options["id2label"] = dict(enumerate(self.task.labels))
            options["label2id"] = {label: index for index, label in enumerate(self.task.labels)}
        return options

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.task.is_regression:
            return F.mse_loss(logits.float().squeeze(-1), batch["labels"].float())
        return F.cross_entropy(logits.float(), batch["labels"])

    def evaluate(self, logits: Tensor, batch: Batch, stage: str, dataloader_idx: int) -> None:
        suffix = "_mismatched" if dataloader_idx else ""
        for name, metric in self.metrics[f"{stage}_{dataloader_idx}"].items():
            metric.update(self._decide(logits), batch["labels"])
            self.log(
                f"{stage}/{name}{suffix}",
                metric,
                on_step=False,
                on_epoch=True,
                prog_bar=True,
                add_dataloader_idx=False,
            )

    def _decide(self, logits: Tensor) -> Tensor:
        return logits.float().squeeze(-1) if self.task.is_regression else logits.argmax(-1)

    # Submission files

    def on_predict_start(self) -> None:
        self._predictions = [{} for _ in self.task.predict_splits]

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Returns ``idx`` and ``prediction`` ``[N]``: a class index, or a number for a regression."""
        decided = self._decide(self(batch))
        self._predictions[dataloader_idx].update(zip(batch["idx"].tolist(), decided.tolist(), strict=True))
        return {"idx": batch["idx"], "prediction": decided}

    def on_predict_end(self) -> None:
        parts = [self._predictions]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._predictions)
        if not self.trainer.is_global_zero:
            return
        directory = Path(self.prediction_dir or Path(self.trainer.default_root_dir) / "predictions")
        directory.mkdir(parents=True, exist_ok=True)
        for split, file_name in enumerate(self.task.submission_files):
            merged = {index: value for part in parts for index, value in part[split].items()}
            (directory / file_name).write_text(submission(merged, self.task), encoding="utf-8")


def build_metric(name: str, task: GLUETask) -> Metric:
    """The torchmetrics metric of one of the names in ``GLUETask.metrics``.

    Raises:
        ValueError: for another name.
    """
    if name == "pearson":
        return PearsonCorrCoef()
    if name == "spearman":
        return SpearmanCorrCoef()
    if name == "f1":
        return F1Score(task="binary")  # of class 1, as GLUE has it
    if name == "accuracy":
        return Accuracy(task="multiclass", num_classes=task.num_labels, average="micro")
    if name == "matthews":
        return MatthewsCorrCoef(task="multiclass", num_classes=task.num_labels)
    raise ValueError(f"metric is {name!r}, expected accuracy, f1, matthews, pearson or spearman")


def submission(predictions: dict[int, Any], task: GLUETask) -> str:
    """The text of a submission file: a header, then index and prediction of every row in order.

    Args:
        predictions: class index, or number, by row index.
        task: says whether labels are written by name, and the range of a regression.
    """
    lines = ["index\tprediction"]
    for index in sorted(predictions):
        value = predictions[index]
        if task.is_regression:
            low, high = task.label_range
            text = f"{min(max(value, low), high):.3f}"
        else:
            text = task.labels[value] if task.submission_names else str(value)
        lines.append(f"{index}\t{text}")
    return "\n".join(lines) + "\n"
