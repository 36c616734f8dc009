"""Training common to all tasks: teacher, losses, two stages, optimiser, checkpoints."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from .. import adapt
from ..config import SEAConfig
from ..data.tokenizers import check_positions
from ..distillation import (
    DistillationConfig,
    hidden_loss,
    layer_losses,
    logit_loss,
    only_what_losses_read,
    weighted_sum,
)
from ..interface import IMPLEMENTATION
from ..recorder import AttentionRecorder, LayerRecord
from .layerwise import LayerwiseLosses
from .loading import load_dense, load_sea, load_teacher
from .optimization import OptimizerConfig, build_optimizer, parameters_without_gradient

Batch = dict[str, Tensor]


class DistillationModule(LightningModule):
    """Distils SEA, or a baseline of linear cost, into a pretrained model, or trains the plain model in the same way.

    Training has two stages: for ``estimator_steps`` optimiser steps SEA's estimator alone learns the teacher's
    attention from the teacher's own activations, without a pass through the student; then everything trains. Losses
    that need an estimator, ``est_kl`` and ``est_mse``, are left out where there is none.

    The teacher is frozen and lives outside the module's parameters and checkpoints; it is loaded when first needed.

    Attributes:
        student: the transformers model that trains. Its gradient checkpointing works with ``use_reentrant=False``.
        keep_records: set it before a training or evaluation step to have that step fill ``layer_records``.
        layer_records: for every layer of the latest batch, the teacher's and the student's record; emptied after the
            callbacks of the step. Always empty without a teacher, and in evaluation with ``attention="dense"``.

    Args:
        model: the pretrained model: hub name, directory, "embedded:lm", "embedded:classifier", or a directory that
            ``export`` wrote.
        attention: "sea" converts the model, to SEA or the baseline that ``sea.method`` names, and distils; "dense"
            trains the plain model, which makes teachers and the baseline to compare with: on its task alone, leaving
            ``distillation`` unused, or, if ``teacher`` is given, with the same losses as the other methods.
        sea: which method, and how it estimates, selects and mixes; its defaults if null. A model exported with SEA
            brings its own settings, of which only ``k`` may be changed here.
        layers: layers to convert, from 0; null converts all.
        distillation: weights of the losses; their defaults if null.
        teacher: what ``model`` may be, for the teacher; null takes the weights of ``model`` (no teacher if dense).
        estimator_steps: optimiser steps of the first stage, which only the method "sea" has; unused if dense.
        optimizer: learning rates and schedule; their defaults if null.
        export_dir: where to export the model (with SEA or without) at the end of ``fit``; null does not.
        freeze_base: leave the pretrained weights as they are and train SEA's own parameters alone.

    Raises:
        ValueError: if arguments do not fit each other or the model.
    """

    auto_class: ClassVar[type]
    forward_options: ClassVar[dict[str, Any]] = {}
    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(
        self,
        model: str,
        attention: Literal["sea", "dense"] = "sea",
        sea: SEAConfig | None = None,
        layers: list[int] | None = None,
        distillation: DistillationConfig | None = None,
        teacher: str | None = None,
        estimator_steps: int = 0,
        optimizer: OptimizerConfig | None = None,
        export_dir: str | None = None,
        freeze_base: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ("sea", "dense"):
            raise ValueError(f"attention is {attention!r}, expected 'sea' or 'dense'")
        if estimator_steps < 0:
            raise ValueError(f"estimator_steps is {estimator_steps}, expected at least 0")
        # load_from_checkpoint hands over the plain types that are saved below
        sea = SEAConfig.from_dict(sea) if isinstance(sea, dict) else sea
        self.distillation = _from_plain(DistillationConfig, distillation)
        self.optimizer_config = _from_plain(OptimizerConfig, optimizer)
        self.attention = attention
        self.distils = attention == "sea" or teacher is not None
        self.estimator_steps = estimator_steps if attention == "sea" else 0
        if self.estimator_steps and not (self.distillation.est_kl or self.distillation.est_mse):
            raise ValueError(
                f"estimator_steps is {estimator_steps} with est_kl = est_mse = 0: the stage would learn nothing"
            )
        self.export_dir = export_dir
        loaded = self.auto_class, model, self.model_options()
        student = load_dense(*loaded) if attention == "dense" else load_sea(*loaded, sea, layers)
        self.student = student.train()  # it was loaded in evaluation mode
        self._check_losses()
        if freeze_base:
            self._freeze_base()
        self.teacher_name = teacher
        self._teacher: tuple[PreTrainedModel, ...] = ()  # in a tuple, so that it is no submodule
        self.keep_records = False
        self.layer_records: list[tuple[LayerRecord, LayerRecord]] = []
        self._seed: int | None = None
        self._idle: list[torch.nn.Parameter] = []
        # Plain types only: anything else would not load again with torch.load(weights_only=True).
        self.save_hyperparameters(
            {
                "model": model,
                "attention": attention,
                "sea": sea.to_dict() if sea else None,
                "layers": layers,
                "distillation": dataclasses.asdict(self.distillation),
                "teacher": teacher,
                "estimator_steps": estimator_steps,
                "optimizer": dataclasses.asdict(self.optimizer_config),
                "export_dir": export_dir,
                "freeze_base": freeze_base,
            }
        )

    def _check_losses(self) -> None:
        """Refuse stages and weights that would leave a student without an estimator nothing to learn from."""
        method = self.student.sea_conversion.config.method if self.attention == "sea" else "dense"
        if method == "sea" or not self.distils:
            return
        if self.estimator_steps:
            raise ValueError(
                f"estimator_steps is {self.estimator_steps} with method={method!r}, which has no estimator: set it to 0"
            )
        weights = self.distillation.to_dict()
        if not any(weights[name] for name in weights if name not in ("est_kl", "est_mse", "relative")):
            raise ValueError(
                f"distillation weighs est_kl and est_mse alone, and {method!r} attention has no estimator to learn them"
            )

    def _freeze_base(self) -> None:
        layers = adapt.sea_layers(self.student)
        own = [parameter for layer in layers for parameter in layer.parameters()]
        if not own:
            method = layers[0].config.method if layers else "dense"
            raise ValueError(f"freeze_base with {method!r} attention, which has no parameters: nothing would train")
        self.student.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)

    # What a task adds

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for ``auto_class.from_pretrained``."""
        return {}

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The task's own loss, a scalar."""
        raise NotImplementedError

    def logit_rows(self, batch: Batch) -> Tensor | None:
        """Bool ``[N, T]``: rows of the logits that the teacher's logits are compared at; None compares all."""
        return None

    def evaluate(self, logits: Tensor, batch: Batch, stage: str, dataloader_idx: int) -> None:
        """Update and log the metrics of ``stage``, "val" or "test"."""
        raise NotImplementedError

    # Models

    @property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher, on this module's device. Loaded at the first use.

        Raises:
            ValueError: if the plain model trains without one, or if the teacher's weights are not all trained.
        """
        if not self.distils:
            raise ValueError("attention is 'dense' and teacher is null: there is no teacher")
        if not self._teacher:
            self._teacher = (self._load_teacher(),)
        teacher = self._teacher[0]
        return teacher if teacher.device == self.device else teacher.to(self.device)

    def _load_teacher(self) -> PreTrainedModel:
        # bfloat16 where the student computes in it: half the memory, and no weights to cast in every step. Not float16,
        # in which the residual stream of a large model may overflow.
        mixed = self._trainer is not None and self.trainer.precision == "bf16-mixed"
        model = load_teacher(self.auto_class, self.teacher_name or self.hparams.model, self.model_options())
        model.config.pad_token_id = self.student.config.pad_token_id  # a classifying decoder finds its last token by it
        if self.distillation.compares_layers:  # every step records it: nothing is left to change then
            model.set_attn_implementation(IMPLEMENTATION)
        return model.to(torch.bfloat16) if mixed else model

    def export(self, directory: str | Path) -> None:
        """Save the student so that ``model`` (and, for a plain one, ``teacher``) can name the directory.

        A tokenizer is saved with it if the trainer's data module has one.
        """
        if self.attention == "sea":
            adapt.save_pretrained(self.student, directory)
        else:
            self.student.save_pretrained(directory)
        data = self._trainer.datamodule if self._trainer else None
        tokenizer = getattr(data, "tokenizer", None)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(directory)

    # Training

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        for argument in ("max_length", "seq_len"):
            if hasattr(data, argument):
                check_positions(getattr(data, argument), self.student.config, argument)
        if self.student.config.pad_token_id is None:
            self.student.config.pad_token_id = getattr(data, "pad_token_id", None)

    def on_fit_start(self) -> None:
        if self._seed is None:
            self._seed = torch.initial_seed()
        if self.distils:
            _ = self.teacher  # fail now rather than in the first step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Randomness (dropout, jitter) depends on the step and the rank alone, so that a resumed run repeats it.
        step = self.trainer.fit_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed((self._seed * 1_000_003 + step) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not self.distils:
            losses = {"task": self.task_loss(self._forward(self.student, batch).logits, batch)}
            loss = losses["task"]
        else:
            first_stage = self.trainer.global_step < self.estimator_steps
            losses, loss = self._estimator_losses(batch) if first_stage else self._all_losses(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        return self._with_all_parameters(loss)

    def _estimator_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """First stage: the estimators see the teacher's queries, keys and values, and learn while the teacher runs."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = torch.ones((), device=self.device)
        scale = scale if scaler is None else scaler.scale(scale)
        layers = LayerwiseLosses(self.student, self.distillation, scale, keep_records=self.keep_records)
        with torch.no_grad(), AttentionRecorder(self.teacher, layers, log_sums=True):
            self._forward(self.teacher.base_model, batch)  # no logits needed
        self.layer_records = layers.pairs
        return layers.result()

    def _all_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Second stage: student and teacher side by side."""
        config, want_hidden = self.distillation, bool(self.distillation.hidden)
        teacher_layers: list[LayerRecord] = []
        student_layers: list[LayerRecord] = []

        def keep(record: LayerRecord) -> None:
            teacher_layers.append(record if self.keep_records else only_what_losses_read(record, config))

        with torch.no_grad(), self._recording(self.teacher, keep, log_sums=config.compares_maps):
            teacher = self._forward(self.teacher, batch, output_hidden_states=want_hidden)
        with self._recording(self.student, student_layers.append):
            student = self._forward(self.student, batch, output_hidden_states=want_hidden)
        if student_layers and not student_layers[-1].context.requires_grad:
            raise ValueError(
                "the student's layers run without gradients, as with gradient checkpointing and use_reentrant=True: "
                "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        pairs = list(zip(teacher_layers, student_layers, strict=True))
        losses = layer_losses(pairs, config)
        if want_hidden:
            real = batch["attention_mask"].bool() if "attention_mask" in batch else None
            losses["hidden"] = hidden_loss(teacher.hidden_states, student.hidden_states, real, config)
        if config.logit:
            losses["logit"] = logit_loss(teacher.logits, student.logits, self.logit_rows(batch))
        if config.task:
            losses["task"] = self.task_loss(student.logits, batch)
        if self.keep_records:
            self.layer_records = pairs
        losses = {name: loss for name, loss in losses.items() if getattr(config, name)}
        return losses, weighted_sum(losses, config)

    def _recording(
        self, model: PreTrainedModel, keep: Callable[[LayerRecord], None], *, log_sums: bool = False
    ) -> AbstractContextManager:
        """Context in which ``keep`` gets the records of ``model``, if a loss or a callback wants them."""
        wanted = self.keep_records or self.distillation.compares_layers
        return AttentionRecorder(model, keep, log_sums=log_sums) if self.distils and wanted else nullcontext()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # With gradient checkpointing, layers run again here: they must find what they found in the forward pass.
        # Set modules have the flag as their own attribute; getattr would be slow for all those that have none.
        again = any(vars(module).get("gradient_checkpointing") for module in self.student.modules())
        with self._recording(self.student, lambda record: None) if again else nullcontext():
            super().backward(loss, *args, **kwargs)

    def _with_all_parameters(self, loss: Tensor) -> Tensor:
        """Tie parameters that this step does not use to the loss, when there are several processes.

        DDP waits for a gradient of every parameter. Its own remedy, find_unused_parameters, walks the graph as this
        does, but leaves zeros that Adam and weight decay act on; these are dropped before the optimiser's step.
        """
        self._idle = []
        if self.trainer.world_size == 1:
            return loss
        self._idle = parameters_without_gradient(loss, [p for p in self.student.parameters() if p.requires_grad])
        return loss + 0.0 * sum(parameter.sum() for parameter in self._idle)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self._idle:
            parameter.grad = None  # zeros would still move Adam's step count, and weight decay the parameter

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.layer_records = []

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, schedule = build_optimizer(
            self.student,
            self.optimizer_config,
            estimator_steps=self.estimator_steps,
            total_steps=self.trainer.estimated_stepping_batches,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        if self.export_dir and self.trainer.is_global_zero:
            self.export(self.export_dir)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["training_seed"] = self._seed
        checkpoint["module_class"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seed = checkpoint["training_seed"]

    # Evaluation

    def forward(self, batch: Batch) -> Tensor:
        """The student's logits for ``batch``, whose labels are not used."""
        return self._forward(self.student, batch).logits

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(self._evaluation_logits(batch), batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(self._evaluation_logits(batch), batch, "test", dataloader_idx)

    def on_validation_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.layer_records = []

    def on_test_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.layer_records = []

    def _evaluation_logits(self, batch: Batch) -> Tensor:
        if not self.keep_records or self.attention == "dense":
            return self(batch)
        with AttentionRecorder(self.student) as recorder:
            logits = self(batch)
        self.layer_records = list(zip(self._teacher_records(batch), recorder.records, strict=True))
        return logits

    def _teacher_records(self, batch: Batch) -> list[LayerRecord]:
        with torch.no_grad(), AttentionRecorder(self.teacher) as recorder:
            self._forward(self.teacher.base_model, batch)  # no logits needed
        return recorder.records

    def _forward(self, model: torch.nn.Module, batch: Batch, **options: Any) -> Any:
        inputs = {name: batch[name] for name in self.input_names if name in batch}
        return model(**inputs, **self.forward_options, **options)


def _from_plain(config_class: type, value: Any) -> Any:
    if value is None:
        return config_class()
    return config_class(**value) if isinstance(value, dict) else value
