"""Queries, keys and values of a pretrained language model on text, for benchmarks whose time depends on the masks."""

from pathlib import Path

import measure  # noqa: F401 (makes the checkout importable)
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sea.recorder import AttentionRecorder

BLOCK = 8192  # tokens that the model sees at once; longer inputs are several such blocks, one after the other


class Recorded:
    """What some layers' heads hand to attention, positions rotated in.

    Args:
        model: directory of a causal language model of transformers.
        text: a text file.
        heads: query heads, taken evenly from the layers in the order of layer and head.
    """

    def __init__(self, model: str, text: Path, heads: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]).cuda()
        config = self.model.config
        total = config.num_hidden_layers * config.num_attention_heads
        self.heads = [divmod(index * total // heads, config.num_attention_heads) for index in range(heads)]

    @torch.no_grad()
    def inputs(self, seq_len: int) -> list[Tensor]:
        """Query, key and value: bf16 ``[1, H, T, D]`` in the memory order [1, T, H, D] of projections.

        Keys and values of grouped heads are repeated. Blocks follow one another as if they were one text: late rows see
        the keys of other articles, as they do in long inputs.

        Raises:
            ValueError: if the text is shorter than ``seq_len`` tokens.
        """
        if seq_len > len(self.ids):
            raise ValueError(f"the text has {len(self.ids)} tokens, expected at least seq_len = {seq_len}")
        parts = [self._block(self.ids[first : first + BLOCK][: seq_len - first]) for first in range(0, seq_len, BLOCK)]
        return [torch.cat(tensors, 1).transpose(1, 2) for tensors in zip(*parts, strict=True)]

    def _block(self, ids: Tensor) -> list[Tensor]:
        """Query, key and value of one block, ``[1, T, H, D]``."""
        with AttentionRecorder(self.model) as recorder:
            self.model.base_model(ids[None], use_cache=False)
        found = []
        for name in ("query", "key", "value"):
            rows = []
            for layer, head in self.heads:
                tensor = getattr(recorder.records[layer], name)
                rows.append(tensor[:, head * tensor.shape[1] // self.model.config.num_attention_heads])
            found.append(torch.stack(rows, 2))
        return found
