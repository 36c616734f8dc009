"""Data modules: labelled sentences (GLUE and the embedded topics) and running text."""

from .glue import GLUEDataModule
from .glue_tasks import TASKS, GLUETask, get_task
from .text import TextDataModule
from .tokenizers import check_positions, load_tokenizer

__all__ = [
    "TASKS",
    "GLUEDataModule",
    "GLUETask",
    "TextDataModule",
    "check_positions",
    "get_task",
    "load_tokenizer",
]
