"""What causal linear attention carries from one part of a sequence to the next."""

from typing import NamedTuple

from torch import Tensor


class LinearState(NamedTuple):
    """Running sums over the keys read so far; its size does not depend on their number.

    Attributes:
        key_value: float32 (float64 for float64 inputs) ``[N, G, M, E]``, sum over keys of phi(key) value^T.
        key_sum: same dtype, ``[N, G, M]``, sum over keys of phi(key).
    """

    key_value: Tensor
    key_sum: Tensor
