"""Data modules: labelled sentences (GLUE and the embedded topics) and running text."""

from lightning_sea.data.glue import GLUEDataModule
from lightning_sea.data.glue_tasks import TASKS, GLUETask, get_task
from lightning_sea.data.text import TextDataModule
from lightning_sea.data.tokenizers import check_positions, load_tokenizer

__all__ = [
    "TASKS",
    "GLUEDataModule",
    "GLUETask",
    "TextDataModule",
    "check_positions",
    "get_task",
    "load_tokenizer",
]
