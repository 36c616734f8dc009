"""Tiny random models, a word tokenizer and synthetic data for training tests."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lightning_sea.data.loading import PadCollator, ResumableLoader, ShardSampler, TrainSampler

WORDS = ["[PAD]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(29))]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large enough for attention that is far from uniform
}


def save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(directory)


def save_bert(directory: Path) -> str:
    """A BERT classifier of two classes; no dropout, so that runs can be compared."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    return str(directory)


def save_llama(directory: Path) -> str:
    """A Llama language model with one key head for two query heads."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_key_value_heads=1)).save_pretrained(directory)
    save_tokenizer(directory)
    return str(directory)


class RandomData(LightningDataModule):
    """Random tokens: with ``causal`` text of one length, without items of several lengths, classed by their first."""

    def __init__(self, *, causal: bool, size: int = 16, batch_size: int = 4, seq_len: int = 12) -> None:
        super().__init__()
        self.causal, self.batch_size = causal, batch_size
        generator = torch.Generator().manual_seed(0)
        lengths = (
            torch.full((size,), seq_len) if causal else torch.randint(4, seq_len + 1, (size,), generator=generator)
        )
        self.items = []
        for index, length in enumerate(lengths.tolist()):
            tokens = torch.randint(3, len(WORDS), (length,), generator=generator)
            labels = tokens.clone() if causal else tokens[0] % 2
            self.items.append({"input_ids": tokens, "labels": labels, "idx": torch.tensor(index)})
        self.collate = PadCollator(pad_token_id=0)

    @property
    def world(self) -> tuple[int, int]:
        return self.trainer.world_size, self.trainer.global_rank

    def train_dataloader(self) -> DataLoader:
        sampler = TrainSampler(len(self.items), *self.world)
        return ResumableLoader(self.items, self.batch_size, sampler=sampler, collate_fn=self.collate, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        sampler = ShardSampler(len(self.items), *self.world)
        return DataLoader(self.items, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)

    test_dataloader = predict_dataloader = val_dataloader
