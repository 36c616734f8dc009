"""The gradients of a training step, before their speed: half precision against float64, and equal bits in two runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import dense_distillation
import measure  # noqa: F401 (makes the checkout importable)
import torch
from torch import Tensor

import sea_kernels as ops
from lightning_sea import distillation
from lightning_sea.attention import SEAAttention
from lightning_sea.recorder import LayerRecord
from sea_kernels.far_field import reference as far_field_reference
from sea_kernels.sparse_attention import reference as sparse_reference

Operation = Callable[..., Tensor]


def gradient_checks(layer: SEAAttention, teacher: LayerRecord, inputs: list[Tensor]) -> dict[str, dict]:
    """Every operation of a training step: error of its gradients, and whether a second run gives the same bits.

    Args:
        layer: with a far field and a second look.
        teacher: record whose tensors have the shapes and the dtype of ``inputs``.
        inputs: the student's query, key and value, in half precision.

    Returns:
        By operation, ``error_ratio``: the error of its gradients over that of PyTorch's evaluation of the same formula
        in the inputs' precision, both against float64, of the input where it is largest; and ``repeats``.
    """
    with torch.no_grad():
        estimate = layer.estimate(*inputs, scaling=teacher.scaling)
    centre = 0.3 * torch.randn_like(layer.centre)
    scores = estimate.scores.to(inputs[0].dtype)
    place = {"causal": True, "scaling": teacher.scaling}

    def sparse(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
        return ops.sparse_attention(query, key, value, estimate.mask, backend=backend, **place)

    def far_field(query: Tensor, key: Tensor, value: Tensor, centre: Tensor, backend: str = "auto") -> Tensor:
        masks = estimate.mask, estimate.coarse
        return ops.far_field_attention(query, key, value, *masks, centre=centre, backend=backend, **place)

    def estimation(scores: Tensor, form=distillation, **options) -> Tensor:
        own = replace(estimate, scores=scores)
        return _weighted(form.estimation_losses(_cast(teacher, scores.dtype), own, **options))

    def attention(query: Tensor, key: Tensor, form=distillation, **options) -> Tensor:
        target = _cast(teacher, query.dtype)
        return _weighted(form.attention_losses(target, replace(target, query=query, key=key), **options))

    plain, dense = {"backend": "reference"}, {"form": dense_distillation, "dtype": scores.dtype}
    return {
        "sparse_attention": _check(sparse, inputs, **plain),
        "far_field_attention": _check(far_field, [*inputs, centre], **plain),
        "estimation_loss": _check(estimation, [scores], **dense),
        "attention_loss": _check(attention, inputs[:2], **dense),
    }


def gradients(operation: Operation, inputs: list[Tensor], **options) -> tuple[Tensor, ...]:
    """Gradients of the inputs, for the same random gradient of the result every time."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    result = operation(*inputs, **options)
    generator = torch.Generator(result.device).manual_seed(0)
    grad = torch.randn(result.shape, generator=generator, device=result.device)
    grad = grad.bfloat16() if result.dim() else torch.ones_like(grad)  # numbers that every precision holds
    return torch.autograd.grad(result, inputs, grad.to(result.dtype))


def _check(operation: Operation, inputs: list[Tensor], **plain) -> dict[str, float | bool]:
    """``plain``: options with which the operation runs as PyTorch would in half precision."""
    ours, again = gradients(operation, inputs), gradients(operation, inputs)
    exact = gradients(operation, [tensor.double() for tensor in inputs])
    with _references_in_half_precision():
        theirs = gradients(operation, inputs, **plain)
    ratios = [
        float((own.double() - truth).norm() / (other.double() - truth).norm())
        for own, other, truth in zip(ours, theirs, exact, strict=True)
    ]
    repeats = all(torch.equal(*pair) for pair in zip(ours, again, strict=True))
    return {"error_ratio": round(max(ratios), 3), "repeats": repeats}


@contextmanager
def _references_in_half_precision() -> Iterator[None]:
    """The PyTorch forms of attention compute in their inputs' own precision instead of float32."""
    with ExitStack() as stack:
        for module in (sparse_reference, far_field_reference):
            stack.enter_context(mock.patch.object(module, "working_dtype", lambda dtype: dtype))
        yield


def _cast(record: LayerRecord, dtype: torch.dtype) -> LayerRecord:
    return replace(record, query=record.query.to(dtype), key=record.key.to(dtype))


def _weighted(losses: dict[str, Tensor]) -> Tensor:
    return distillation.weighted_sum(losses, distillation.DistillationConfig())
