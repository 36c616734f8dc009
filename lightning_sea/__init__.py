"""SEA attention on Lightning: distil linear-cost sparse attention into pretrained transformers."""

__version__ = "0.1.0"
