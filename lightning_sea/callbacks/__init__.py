"""Callbacks: what SEA keeps, what a run costs, pictures of attention; budgets of heads and steps, random features."""

from .attention_maps import AttentionMapLogger
from .drawn_budget import DrawnBudget
from .head_budgets import HeadBudgetCalibration
from .memory import MemoryMonitor
from .redraw import ProjectionRedraw
from .sparsity import SparsityMonitor

__all__ = [
    "AttentionMapLogger",
    "DrawnBudget",
    "HeadBudgetCalibration",
    "MemoryMonitor",
    "ProjectionRedraw",
    "SparsityMonitor",
]
