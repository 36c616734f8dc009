"""Budgets that differ between heads: keys go where they matter, as many on average as before."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sea_kernels import count_keys

from .attention import SEAAttention
from .calibration import all_in_eval_mode, dense_attention
from .families import attention_sites
from .recorder import AttentionRecorder, LayerRecord

SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of k, for a head's rows


@torch.no_grad()
def calibrate_budgets(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Share the keys among all heads of all layers by what they do for the heads' contexts. Beyond the paper.

    The model runs with dense attention. Beside it, every SEA layer attends to the same queries, keys and values with k
    times each of ``SHARES``. From the squared errors of each head's context, relative to the size of the layer's
    context, shares are chosen that make their sum small while rows keep no more keys on average than with equal shares.
    (Before a second look, its candidates: the keys of the first.) So heads that look at a few places keep fewer keys,
    heads with flat attention more; ``set_k`` scales all.

    Args:
        model: a converted model that selects by pooled keys, as the default does; a far field is calibrated first.
        batches: arguments of the base model's forward, on its device: text of the kind and the length that the model
            will see; ten thousand tokens are enough.

    Raises:
        ValueError: if no layer selects by pooled keys or ``batches`` is empty.
    """
    modules = [site.module for site in attention_sites(model)]
    layers = {index: m.sea for index, m in enumerate(modules) if hasattr(getattr(m, "sea", None), "budgets")}
    if not layers:
        raise ValueError(
            "model has no layer whose heads could have budgets of their own: convert it with method='sea', aligned "
            "bins, decoder='none' and grouping='query'"
        )
    measured: dict[int, Tensor] = {}
    seen = 0

    def measure(record: LayerRecord) -> None:
        nonlocal seen
        index, seen = seen % len(modules), seen + 1  # records come layer after layer
        if index in layers:
            measured[index] = measured.get(index, 0.0) + errors_and_keys(layers[index], record)

    with all_in_eval_mode(model), dense_attention(modules), AttentionRecorder(model, measure):
        for batch in batches:
            model.base_model(**batch)  # no logits needed
    if not measured:
        raise ValueError("batches is empty, expected at least one")
    errors, keys = torch.stack([measured[index] for index in layers], 1).cpu()
    for layer, share in zip(layers.values(), allocate(errors, keys), strict=True):
        layer.budgets.assign(share)


def errors_and_keys(layer: SEAAttention, record: LayerRecord) -> Tensor:
    """What each head's rows lose and keep with each of ``SHARES``: float64 ``[2, H, len(SHARES)]``.

    First the squared error of a head's context over the square of the contexts of all heads, then the keys that its
    rows keep, summed: those of the first look, which is what shares divide. (A second look leaves k of any.)
    """
    place = {"scaling": record.scaling, "attention_mask": record.attention_mask}
    counted = {"num_keys": record.key.shape[2], "causal": record.causal, "attention_mask": record.attention_mask}
    dense, before, errors, keys = record.context.double(), layer.budgets.share.clone(), [], []
    for share in SHARES:
        layer.budgets.assign(torch.full_like(before, share))
        context, estimate = layer(record.query, record.key, record.value, with_scores=False, **place)
        errors.append((context.double() - dense).square().sum((0, 1, 3)) / dense.square().sum())
        first_look = estimate.mask if estimate.coarse is None else estimate.coarse
        keys.append(count_keys(first_look, **counted).sum((0, 2)).double())
    layer.budgets.assign(before)
    return torch.stack([torch.stack(errors, -1), torch.stack(keys, -1)])


def allocate(errors: Tensor, keys: Tensor) -> Tensor:
    """Shares of all heads that make the sum of their errors small, with no more keys than equal shares: ``[L, H]``.

    Every head begins with the least of ``SHARES``; then the step that gains most for its keys is taken, again and
    again. For convex errors that is the best there is, up to the last steps, which have to fit.

    Args:
        errors: ``[L, H, len(SHARES)]``.
        keys: of the same shape, not falling along the shares.
    """
    shape = errors.shape[:2]
    errors, keys = (values.double().flatten(0, 1) for values in (errors, keys))
    rows, chosen = torch.arange(len(errors)), torch.zeros(len(errors), dtype=torch.long)
    left = float(keys[:, SHARES.index(1.0)].sum() - keys[:, 0].sum())
    while True:
        more = keys - keys[rows, chosen][:, None]
        gain = (errors[rows, chosen][:, None] - errors) / more
        gain[(more <= 0) | (more > left)] = 0
        best = int(gain.argmax())
        if gain.flatten()[best] <= 0:
            return torch.tensor(SHARES)[chosen].view(shape)
        head, index = divmod(best, len(SHARES))
        left -= float(more[head, index])
        chosen[head] = index
