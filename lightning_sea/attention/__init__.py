"""SEA attention; ``sea.py`` holds the method in one file, its parts lie beside it. ``baselines`` are other methods."""

from .baselines import CosformerAttention, PerformerAttention, WindowAttention
from .baselines.base import BaselineAttention
from .estimate import Estimate
from .sea import SEAAttention

METHODS: dict[str, type[SEAAttention | BaselineAttention]] = {
    "sea": SEAAttention,
    "performer": PerformerAttention,
    "cosformer": CosformerAttention,
    "window": WindowAttention,
}

__all__ = ["METHODS", "BaselineAttention", "Estimate", "SEAAttention"]
