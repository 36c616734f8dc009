"""Callbacks: what SEA keeps, what a run costs, pictures of attention, and the redraw of random features."""

from .attention_maps import AttentionMapLogger
from .head_budgets import HeadBudgetCalibration
from .memory import MemoryMonitor
from .redraw import ProjectionRedraw
from .sparsity import SparsityMonitor

__all__ = ["AttentionMapLogger", "HeadBudgetCalibration", "MemoryMonitor", "ProjectionRedraw", "SparsityMonitor"]
