"""A good start for the far field: every head's centre at the mean of its queries, from a few batches, no gradients."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sea_kernels.spans import row_spans

from .families import attention_sites
from .recorder import AttentionRecorder, LayerRecord

FIRST_ROWS = 64  # causal rows that attend to little but themselves: their queries are not typical


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Set the centre of every converted layer with a far field to the mean of ``scaling * query`` of its heads.

    The queries are those of the model with dense attention in all layers, over all real tokens of ``batches``. Of
    causal items longer than 64 tokens the first 64 are left out.

    Args:
        model: a converted model with ``average_context="far"``.
        batches: arguments of the model's forward, on its device. A few thousand tokens are enough.

    Raises:
        ValueError: if no layer has a far field or ``batches`` is empty.
    """
    modules = [site.module for site in attention_sites(model)]
    with_centre = [index for index, module in enumerate(modules) if hasattr(getattr(module, "sea", None), "centre")]
    if not with_centre:
        raise ValueError("model has no layer with a far field: convert it with average_context='far'")
    sums = {index: torch.zeros_like(modules[index].sea.centre, dtype=torch.float64) for index in with_centre}
    rows = 0
    training = model.training
    model.eval()
    with _dense_attention(modules), AttentionRecorder(model) as recorder:
        for batch in batches:
            recorder.clear()
            model(**batch)
            typical = _typical_rows(recorder.records[0])
            rows += int(typical.sum())
            for index in with_centre:
                record = recorder.records[index]
                query = record.query.double().masked_fill(~typical[:, None, :, None], 0)
                sums[index] += record.scaling * query.sum((0, 2))
    model.train(training)
    if not rows:
        raise ValueError("batches hold no token, expected at least one")
    for index, total in sums.items():
        modules[index].sea.centre.copy_(total / rows)


@contextmanager
def _dense_attention(modules: list[nn.Module]) -> Iterator[None]:
    """Take the SEA layers out of the attention modules for a while."""
    layers = {module: module.sea for module in modules if hasattr(module, "sea")}
    for module in layers:
        del module.sea
    try:
        yield
    finally:
        for module, layer in layers.items():
            module.sea = layer


def _typical_rows(record: LayerRecord) -> Tensor:
    """bool ``[N, T]``: real tokens, without the first ones of long causal items."""
    batch, _, num_queries, _ = record.query.shape
    spans = row_spans(
        batch,
        num_queries,
        record.key.shape[2],
        causal=record.causal,
        attention_mask=record.attention_mask,
        device=record.query.device,
    )
    real = spans.length > 0
    if not record.causal:
        return real
    long = spans.length.amax(-1, keepdim=True) > FIRST_ROWS
    return real & ~(long & (spans.position < FIRST_ROWS))
