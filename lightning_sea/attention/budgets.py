"""How a layer's heads share the budget of keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sea_kernels import HeadKeys


class HeadBudgets(nn.Module):
    """Shares of a layer's heads in the budget of k keys: a head's rows keep ``share * k`` keys.

    Args:
        num_heads: H.

    Attributes:
        share: ``[H]``, above 0; 1 for every head until ``assign`` changes it. Saved with the model, not trained.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.ones(num_heads))
        # What ``keys`` found for which k. Reading shares makes the host wait for the device: once, not in every step.
        self._found: dict[int, tuple[int, HeadKeys | None]] = {}

    def assign(self, share: Tensor) -> None:
        """Take over shares, ``[H]``."""
        self.share.copy_(share)
        self._found = {}

    def keys(self, k: int) -> tuple[int, HeadKeys | None]:
        """The most keys of a row, and those of every head, or None where all heads have ``k``."""
        if k not in self._found:
            keys = [max(1, int(k * share + 0.5)) for share in self.share.tolist()]
            equal = all(own == k for own in keys)
            head_k = None if equal else HeadKeys(keys, self.share.device)
            self._found[k] = max(keys), head_k
        return self._found[k]

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "HeadBudgets":
        self._found = {}  # another device
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._found = {}
