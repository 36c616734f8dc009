"""The first stage layer by layer: what one layer needs is gone before the next one begins."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .. import adapt
from ..distillation import DistillationConfig, estimation_losses, mean_over_layers, weighted_sum
from ..recorder import LayerRecord


class LayerwiseLosses:
    """Losses of the estimators of ``student`` on the records of its teacher's layers, one after the other.

    Call it with every layer's record while the teacher runs. A loss is differentiated at once, so that neither the
    teacher's queries, keys and values nor the estimator's graph outlive the layer.

    Attributes:
        pairs: the teacher's and the student's record of every layer, if they are to be kept.

    Args:
        student: the converted model.
        config: weights of the losses.
        scale: scalar that a gradient scaler will multiply the loss by, 1 without one.
        keep_records: whether to fill ``pairs``.
    """

    def __init__(
        self, student: PreTrainedModel, config: DistillationConfig, scale: Tensor, *, keep_records: bool
    ) -> None:
        self._layers = dict(zip(student.sea_conversion.layers, adapt.sea_layers(student), strict=True))
        self._config, self._scale, self._keep_records = config, scale / len(self._layers), keep_records
        self._index = 0
        self._losses: list[dict[str, Tensor]] = []
        self._totals: list[Tensor] = []
        self.pairs: list[tuple[LayerRecord, LayerRecord]] = []

    def __call__(self, record: LayerRecord) -> None:
        layer, estimate = self._layers.get(self._index), None
        self._index += 1
        if layer is not None:
            with torch.enable_grad():  # the teacher runs without
                estimate = layer.estimate(
                    record.query, record.key, record.value, scaling=record.scaling, attention_mask=record.attention_mask
                )
                losses = estimation_losses(record, estimate)
                total = weighted_sum(losses, self._config)
                self._totals.append(with_gradients_alone(total, layer.parameters(), self._scale))
            self._losses.append({name: loss.detach() for name, loss in losses.items()})
        if self._keep_records:
            self.pairs.append((record, dataclasses.replace(record, estimate=estimate)))

    def result(self) -> tuple[dict[str, Tensor], Tensor]:
        """Every loss that has a weight, without gradients, and the loss to minimise; means over the layers."""
        losses = mean_over_layers(self._losses)
        losses = {name: loss for name, loss in losses.items() if getattr(self._config, name)}
        return losses, torch.stack(self._totals).mean()


def with_gradients_alone(loss: Tensor, parameters: Iterable[nn.Parameter], scale: Tensor) -> Tensor:
    """The same loss, its graph replaced by the gradients of ``parameters``, which are computed here.

    Args:
        loss: a scalar.
        parameters: those that get gradients; nothing else that the loss depends on does.
        scale: scalar by which gradients are larger on their way, as half precision may need it. It shall be near the
            gradient that this loss receives later, but does not change the result.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    grads = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    used = [parameter for parameter, grad in zip(parameters, grads, strict=True) if grad is not None]
    return _KnownGradients.apply(loss.detach(), [grad for grad in grads if grad is not None], scale, *used)


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients for ``parameters`` are ``grads / scale``."""

    @staticmethod
    def forward(ctx, loss: Tensor, grads: Sequence[Tensor], scale: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.grads, ctx.scale = grads, scale
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_output / ctx.scale
        return (None, None, None, *(factor * grad for grad in ctx.grads))
