"""What a SEA layer estimated: scores over bins, the mask that they select, and the gates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sea_kernels.bins import bin_sizes
from sea_kernels.masks import BinMask, RunMask
from sea_kernels.spans import row_spans


@dataclass(frozen=True)
class Estimate:
    """Estimated attention of one layer; nothing in it grows with T x S.

    Attributes:
        scores: float ``[N, H, T, K]``, compressed scores Y (SEA, section 3.1), differentiable; None where nobody asked.
        mask: which keys every row keeps.
        prob_scale: ``[N, H, T]`` in (0, 1), s_prob, scales the sparse attention; None with a far field.
        mix_scale: ``[N, H, T]`` in (0, 1), s_mix, share of the sparse attention in the output; None without a mean to
            mix it with.
        layout: how the K columns stretch to keys.
        shift: edge jitter of this batch, in 1/256 of a key.
        num_keys: S; the rows are the last T of the S positions.
        causal: whether a row sees only keys up to its own position.
        attention_mask: ``[N, S]``, nonzero at real keys, or None.
        coarse: what the first look kept, where a second one followed.
        centre: ``[H, D]``, around which the far field pools keys; None without one.
    """

    scores: Tensor | None
    mask: BinMask | RunMask
    prob_scale: Tensor | None
    mix_scale: Tensor | None
    layout: str
    shift: int
    num_keys: int
    causal: bool
    attention_mask: Tensor | None = None
    coarse: BinMask | None = None
    centre: Tensor | None = None

    @property
    def length(self) -> Tensor:
        """Keys that each row may see: int64 ``[N, T]``. Built when asked for: most layers are never asked."""
        rows = self.mask.bits if isinstance(self.mask, BinMask) else self.mask.starts
        place = {"causal": self.causal, "attention_mask": self.attention_mask, "device": rows.device}
        return row_spans(rows.shape[0], rows.shape[2], self.num_keys, **place).length

    def probabilities(self) -> Tensor:
        """The estimated compressed attention over K: float32 ``[N, H, T, K]``, see ``log_probabilities``."""
        return log_probabilities(self.scores, self.length, self.layout).exp()


def log_probabilities(scores: Tensor, length: Tensor, layout: str) -> Tensor:
    """Scores normalised over each row's bins, which makes rows and heads comparable (SEA, section 3.2).

    Relative bins are normalised as in the paper, by a softmax over all K. Aligned bins count by their keys: a row's
    last bin may be incomplete, and bins beyond it hold nothing.

    Args:
        scores: ``[N, H, T, K]``.
        length: int64 ``[N, T]``, keys that each row may see.
        layout: "relative" or "aligned".

    Returns:
        float32 ``[N, H, T, K]``; -inf at bins without a key (aligned). Padding rows are not meaningful.
    """
    scores = scores.float()
    if layout == "relative":
        return scores.log_softmax(-1)
    size = bin_sizes(length.clamp_min(1), scores.shape[-1], layout)[:, None].float()
    return torch.where(size > 0, scores + size.log(), -torch.inf).log_softmax(-1)
