"""Other attention of linear cost behind the same ``convert``, to compare SEA with: one method per file."""

from .cosformer import CosformerAttention
from .performer import PerformerAttention
from .window import WindowAttention

__all__ = ["CosformerAttention", "PerformerAttention", "WindowAttention"]
