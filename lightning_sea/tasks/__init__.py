"""Lightning modules, one per kind of task."""

from .base import DistillationModule
from .causal_lm import CausalLMModule, Perplexity
from .glue import GLUEModule
from .optimization import OptimizerConfig

__all__ = ["CausalLMModule", "DistillationModule", "GLUEModule", "OptimizerConfig", "Perplexity"]
