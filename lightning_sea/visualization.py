"""Pictures of attention: what the teacher does, what SEA estimates, which keys it keeps and what comes out.

The only place of the package that builds T x T maps, for one head of one item, because a picture needs them.
"""

import dataclasses
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sea_kernels as ops
from sea_kernels.bins import bin_of
from sea_kernels.masks import BinMask, kept_keys
from sea_kernels.spans import RowSpans, row_spans

from .attention.average import estimated_mean
from .attention.estimate import Estimate
from .recorder import AttentionRecorder, LayerRecord


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    layer: int = 0,
    head: int = 0,
    item: int = 0,
    max_tokens: int | None = None,
) -> Figure:
    """Run both models on ``inputs`` and draw one head's attention four times, side by side.

    Args:
        model: a converted transformers model.
        teacher: the dense model of the same shape.
        inputs: arguments of both models' forward, as a tokenizer gives them (``return_tensors="pt"``).
        layer: index of the attention layer, 0-based.
        head: index of the query head.
        item: index into the batch.
        max_tokens: draw only the item's first real tokens; None draws all.

    Returns:
        A figure; a notebook shows it, ``figure.savefig(path)`` writes it.

    Raises:
        IndexError: if layer, head or item does not exist.
        ValueError: if the layer is not a SEA layer.
    """
    records = []
    for network in (teacher, model):
        training = network.training
        network.eval()
        with AttentionRecorder(network) as recorder:
            network(**inputs)
        network.train(training)
        records.append(recorder.records)
    check_index("layer", layer, len(records[1]))
    matrices = attention_matrices(records[0][layer], records[1][layer], head=head, item=item, max_tokens=max_tokens)
    return plot_matrices(matrices, f"layer {layer}, head {head}")


@torch.no_grad()
def attention_matrices(
    teacher: LayerRecord, student: LayerRecord, *, head: int = 0, item: int = 0, max_tokens: int | None = None
) -> dict[str, Tensor]:
    """The four maps of one head of one item, padding cut away.

    Args:
        teacher: record of a dense layer.
        student: record of the SEA layer that replaced it, on the same inputs.
        head: query head.
        item: index into the batch.
        max_tokens: keep only the first rows and keys; None keeps all.

    Returns:
        Float32 ``[L, L]`` on the CPU, L real tokens, under the keys

        - "teacher": softmax attention of the teacher,
        - "estimate": the estimated attention stretched to keys and normalised over them,
        - "mask": 1 at kept keys, else 0,
        - "result": what multiplies the values in the end, gates and average context or far field included.

    Raises:
        IndexError: if head or item does not exist.
        ValueError: if the student's layer has no estimate: if it is dense or of a method other than "sea".
    """
    if student.estimate is None:
        raise ValueError("the student's layer has no estimate to draw: it is dense or of a method other than 'sea'")
    check_index("item", item, student.query.shape[0])
    check_index("head", head, student.query.shape[1])
    spans = _item_spans(student, item)
    estimate = _one_head(student.estimate, item, head)
    matrices = {
        "teacher": _dense(teacher, spans, item, head),
        "estimate": _stretched(estimate, spans, student.key.shape[2]),
        "mask": kept_keys(estimate.mask, spans, student.key.shape[2])[0, 0].float(),
        "result": _result(student, estimate, spans, item, head),
    }
    first, length = int(spans.start[0]), int(spans.length.amax())
    if max_tokens is not None:
        length = min(length, max_tokens)
    keys = slice(first, first + length)
    rows = slice(first - (student.key.shape[2] - student.query.shape[2]), None)
    return {name: matrix[rows][:length, keys].float().cpu() for name, matrix in matrices.items()}


def plot_matrices(matrices: Mapping[str, Tensor], title: str) -> Figure:
    """One row of images, queries downwards and keys to the right; darker is more.

    Attention is drawn as its square root, so that small weights are seen; a mask as it is.
    """
    figure = Figure(figsize=(3.2 * len(matrices), 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, matrix) in zip(figure.subplots(1, len(matrices)), matrices.items(), strict=True):
        axes.imshow(matrix.clamp_min(0).sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name)
        axes.set_xlabel("key")
    figure.axes[0].set_ylabel("query")
    return figure


def check_index(name: str, index: int, size: int) -> None:
    """Raise IndexError unless ``0 <= index < size``."""
    if not 0 <= index < size:
        raise IndexError(f"{name} is {index}, expected 0 to {size - 1}")


def _item_spans(record: LayerRecord, item: int) -> RowSpans:
    return row_spans(
        1,
        record.query.shape[2],
        record.key.shape[2],
        causal=record.causal,
        attention_mask=None if record.attention_mask is None else record.attention_mask[item : item + 1],
        device=record.query.device,
    )


def _one_head(estimate: Estimate, item: int, head: int) -> Estimate:
    place = (slice(item, item + 1), slice(head, head + 1))
    mask = estimate.mask
    words = "bits" if isinstance(mask, BinMask) else "starts"
    coarse, centre = estimate.coarse, estimate.centre
    return dataclasses.replace(
        estimate,
        scores=estimate.scores[place],
        mask=dataclasses.replace(mask, **{words: getattr(mask, words)[place]}),
        prob_scale=None if estimate.prob_scale is None else estimate.prob_scale[place],
        mix_scale=None if estimate.mix_scale is None else estimate.mix_scale[place],
        attention_mask=None if estimate.attention_mask is None else estimate.attention_mask[item : item + 1],
        coarse=None if coarse is None else dataclasses.replace(coarse, bits=coarse.bits[place]),
        centre=None if centre is None else centre[head : head + 1],
    )


def _query_and_key(record: LayerRecord, item: int, head: int) -> tuple[Tensor, Tensor]:
    """``[1, 1, T, D]`` and ``[1, 1, S, D]`` of one query head and the key head that it reads."""
    group = head // (record.query.shape[1] // record.key.shape[1])
    return record.query[item, head][None, None].float(), record.key[item, group][None, None].float()


def _dense(record: LayerRecord, spans: RowSpans, item: int, head: int) -> Tensor:
    query, key = _query_and_key(record, item, head)
    scores = record.scaling * query[0, 0] @ key[0, 0].T
    return _masked_softmax(scores, _visible(spans, scores.shape[-1]))


def _masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax of ``[T, S]`` over the visible keys; padding rows, which see none, give 0."""
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)


def _visible(spans: RowSpans, num_keys: int) -> Tensor:
    """bool ``[T, S]``: real keys that a real row may see."""
    key = torch.arange(num_keys, device=spans.start.device) - spans.start
    return (key >= 0) & (key < spans.length[0][:, None])


def _stretched(estimate: Estimate, spans: RowSpans, num_keys: int) -> Tensor:
    key = (torch.arange(num_keys, device=spans.start.device) - spans.start).clamp_min(0)
    num_bins = estimate.scores.shape[-1]
    index = bin_of(key, spans.length[0][:, None], num_bins, estimate.layout, estimate.shift)
    scores = estimate.scores[0, 0].float().gather(-1, index)
    return _masked_softmax(scores, _visible(spans, num_keys))


def _result(record: LayerRecord, estimate: Estimate, spans: RowSpans, item: int, head: int) -> Tensor:
    """The layer's own operations with the identity as values, which are too wide for kernels, give their weights."""
    query, key = _query_and_key(record, item, head)
    identity = torch.eye(key.shape[2], device=key.device)[None, None]
    attention_mask = None if record.attention_mask is None else record.attention_mask[item : item + 1]
    rest = {"attention_mask": attention_mask, "backend": "reference"}
    place = {"causal": record.causal, "scaling": record.scaling, **rest}
    if estimate.centre is not None:
        weights = ops.far_field_attention(
            query, key, identity, estimate.mask, estimate.coarse, centre=estimate.centre, **place
        )
        return weights[0, 0]
    weights = ops.sparse_attention(query, key, identity, estimate.mask, row_scale=estimate.prob_scale, **place)
    if estimate.mix_scale is not None and record.causal:
        weights = ops.mix_average(weights, identity, estimate.mix_scale, **rest)
    elif estimate.mix_scale is not None:
        mix = estimate.mix_scale[..., None].float()
        average = estimated_mean(identity, estimate.probabilities(), spans, estimate.layout, estimate.shift)
        weights = mix * weights + (1 - mix) * average
    return weights[0, 0]
