"""SEA attention; ``sea.py`` holds the method in one file, its parts lie beside it."""

from .estimate import Estimate
from .sea import SEAAttention

__all__ = ["Estimate", "SEAAttention"]
