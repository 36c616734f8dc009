"""A good start for the far field: every head's centre at the mean of its queries, from a few batches, no gradients."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sea_kernels.spans import row_spans

from .families import attention_sites, max_positions
from .recorder import AttentionRecorder, LayerRecord

FIRST_ROWS = 64  # causal rows that attend to little but themselves: their queries are not typical
RANDOM_ITEMS, RANDOM_LENGTH = 4, 1024


def has_far_field(model: PreTrainedModel) -> bool:
    """Whether a layer of a converted model has a centre to calibrate."""
    return any(_has_centre(site.module) for site in attention_sites(model))


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] | None = None) -> None:
    """Set the centre of every converted layer with a far field to the mean of ``scaling * query`` of its heads.

    The queries are those of the model with dense attention in all layers, over all real tokens of ``batches``. Of
    causal items longer than 64 tokens the first 64 are left out.

    ``convert`` does this once, with random tokens: most of a head's mean query does not depend on the text. Text of the
    kind that the model will see is a little better.

    Args:
        model: a converted model with ``average_context="far"``.
        batches: arguments of the base model's forward, on its device; a few thousand tokens are enough. None takes four
            sequences of random tokens, always the same, of up to 1024 tokens.

    Raises:
        ValueError: if no layer has a far field or ``batches`` is empty.
    """
    modules = [site.module for site in attention_sites(model)]
    with_centre = [index for index, module in enumerate(modules) if _has_centre(module)]
    if not with_centre:
        raise ValueError("model has no layer with a far field: convert it with method='sea' and average_context='far'")
    sums = {index: torch.zeros_like(modules[index].sea.centre, dtype=torch.float64) for index in with_centre}
    rows = 0
    with all_in_eval_mode(model), dense_attention(modules), AttentionRecorder(model) as recorder:
        for batch in _random_tokens(model) if batches is None else batches:
            recorder.clear()
            model.base_model(**batch)  # no logits needed
            typical = _typical_rows(recorder.records[0])
            rows += int(typical.sum())
            for index in with_centre:
                record = recorder.records[index]
                query = record.query.double().masked_fill(~typical[:, None, :, None], 0)
                sums[index] += record.scaling * query.sum((0, 2))
    if not rows:
        raise ValueError("batches hold no token, expected at least one")
    for index, total in sums.items():
        modules[index].sea.centre.copy_(total / rows)


def _has_centre(module: nn.Module) -> bool:
    return hasattr(getattr(module, "sea", None), "centre")


def _random_tokens(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """One item at a time: little memory, whatever the model's size."""
    length = min(RANDOM_LENGTH, max_positions(model.config) or RANDOM_LENGTH)
    generator = torch.Generator("cpu").manual_seed(0)  # the same tokens on every device
    for _ in range(RANDOM_ITEMS):
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator, device="cpu")
        yield {"input_ids": tokens.to(model.device)}


@contextmanager
def all_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module has its own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def dense_attention(modules: list[nn.Module]) -> Iterator[None]:
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
