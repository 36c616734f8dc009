"""How sparse SEA is and how much of the teacher's attention its masks keep."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import sea_kernels as ops
from sea_kernels.spans import row_spans

from ..recorder import LayerRecord
from .recording import RecordingCallback, logs_this_step, stage_name


class LayerSparsity(NamedTuple):
    """Sums over the real rows of all heads of one SEA layer; divide by ``rows`` (density: by ``visible``)."""

    rows: float
    visible: float
    kept: float
    kept_mass: float
    pooled: float | None
    prob_scale: float | None
    mix_scale: float | None

    def means(self) -> dict[str, float]:
        """Metric name to value; see SparsityMonitor."""
        named = {
            "keys_per_query": self.kept / self.rows,
            "density": self.kept / self.visible,
            "kept_mass": self.kept_mass / self.rows,
        }
        optional = {"pooled_per_query": self.pooled, "prob_scale": self.prob_scale, "mix_scale": self.mix_scale}
        return named | {name: total / self.rows for name, total in optional.items() if total is not None}


@torch.no_grad()
def layer_sparsity(teacher: LayerRecord, student: LayerRecord) -> LayerSparsity:
    """Count one SEA layer's kept keys, the teacher's attention mass on them, and the pooled runs beside them.

    Args:
        teacher: record of the dense layer.
        student: record of the SEA layer on the same inputs.

    Raises:
        ValueError: if the student's layer has no estimate: if it is dense or of a method other than "sea".
    """
    estimate = student.estimate
    if estimate is None:
        raise ValueError("the student's layer has no estimate to count: it is dense or of a method other than 'sea'")
    batch, _, num_queries, _ = student.query.shape
    num_keys = student.key.shape[2]
    place = {"causal": student.causal, "attention_mask": student.attention_mask}
    spans = row_spans(batch, num_queries, num_keys, device=student.query.device, **place)
    num_heads = student.query.shape[1]
    kept_mass = ops.kept_mass(teacher.query, teacher.key, estimate.mask, scaling=teacher.scaling, **place)
    real, pooled = (spans.length > 0)[:, None], None
    if estimate.centre is not None:
        pooled = float(ops.count_pooled(estimate.mask, estimate.coarse, num_keys=num_keys, **place).sum())
    return LayerSparsity(
        rows=float(num_heads * real.sum()),
        visible=float(num_heads * spans.length.sum()),
        kept=float(ops.count_keys(estimate.mask, num_keys=num_keys, **place).sum()),
        kept_mass=float(kept_mass.double().sum()),
        pooled=pooled,
        prob_scale=_sum_real(estimate.prob_scale, real),
        mix_scale=_sum_real(estimate.mix_scale, real),
    )


def _sum_real(gate: Tensor | None, real: Tensor) -> float | None:
    return None if gate is None else float((gate.double() * real).sum())


class SparsityMonitor(RecordingCallback):
    """Logs, for every SEA layer and averaged over them, with ``{stage}`` one of train, val, test:

    - ``{stage}/keys_per_query``: keys that a query keeps, mean over real rows and heads,
    - ``{stage}/density``: kept keys over keys that rows may see,
    - ``{stage}/kept_mass``: share of the teacher's attention that falls on kept keys, mean over real rows and heads,
    - ``{stage}/pooled_per_query``: with a far field, pooled runs that a query's softmax holds beside the keys,
    - ``{stage}/prob_scale`` and ``{stage}/mix_scale``: means of the gates s_prob and s_mix, where they exist,

    and the same per layer as ``{stage}/layer_00/keys_per_query`` and so on. In training it looks at the steps that the
    trainer logs; in validation and testing at the first ``eval_batches`` batches. Time grows with T², as the teacher's
    attention does; memory does not. Layers without an estimate, dense ones and baselines, are left out.

    Args:
        eval_batches: batches looked at in each validation and test run; 0 leaves these out.
        per_layer: whether to log single layers too.
    """

    def __init__(self, eval_batches: int = 8, per_layer: bool = True) -> None:
        if eval_batches < 0:
            raise ValueError(f"eval_batches is {eval_batches}, expected at least 0")
        self.eval_batches = eval_batches
        self.per_layer = per_layer

    def wants(self, trainer: Trainer, batch_index: int) -> bool:
        if trainer.sanity_checking:
            return False
        return logs_this_step(trainer) if trainer.training else batch_index < self.eval_batches

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        stage, totals = stage_name(trainer), []
        for index, (teacher, student) in enumerate(pl_module.layer_records):
            if student.estimate is None:
                continue
            totals.append(layer_sparsity(teacher, student))
            if self.per_layer:
                self._log(trainer, pl_module, f"{stage}/layer_{index:02d}", totals[-1])
        if totals:
            self._log(trainer, pl_module, stage, _sum(totals))

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str, total: LayerSparsity) -> None:
        for name, value in total.means().items():
            # weighted by what the mean is over, so that means over batches and ranks are exact
            weight = total.visible if name == "density" else total.rows
            pl_module.log(
                f"{prefix}/{name}",
                value,
                on_step=trainer.training,
                on_epoch=not trainer.training,
                batch_size=int(weight),
                sync_dist=not trainer.training,
            )


def _sum(totals: list[LayerSparsity]) -> LayerSparsity:
    columns = zip(*totals, strict=True)
    return LayerSparsity(*(None if None in column else sum(column) for column in columns))
