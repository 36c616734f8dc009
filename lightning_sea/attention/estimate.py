"""What a SEA layer estimated: scores over bins, the mask that they select, and the two gates."""

from dataclasses import dataclass

from torch import Tensor

from sea_kernels.masks import BinMask, RunMask


@dataclass(frozen=True)
class Estimate:
    """Estimated attention of one layer; nothing in it grows with T x S.

    Attributes:
        scores: float ``[N, H, T, K]``, compressed scores Y (SEA, section 3.1), differentiable.
        mask: which keys every row keeps.
        prob_scale: ``[N, H, T]`` in (0, 1), s_prob, scales the sparse attention.
        mix_scale: ``[N, H, T]`` in (0, 1), s_mix, share of the sparse attention in the output; None without an
            average context.
        layout: how the K columns stretch to keys.
        shift: edge jitter of this batch, in 1/256 of a key.
    """

    scores: Tensor
    mask: BinMask | RunMask
    prob_scale: Tensor
    mix_scale: Tensor | None
    layout: str
    shift: int

    def probabilities(self) -> Tensor:
        """The estimated compressed attention, softmax of the scores over K: float32 ``[N, H, T, K]``."""
        return self.scores.float().softmax(-1)
