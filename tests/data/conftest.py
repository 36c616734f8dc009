"""A tokenizer of one id per word, and a cache of its own for every test."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[EOS]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, *(f"w{number}" for number in range(40))]


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Ids: w0 is 5, w1 is 6, …; pads 0, ends texts with 1, frames sentences in 3 and 4."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    options = {"pad_token": "[PAD]", "eos_token": "[EOS]"} | options
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_input_names=names, **options)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def bare_tokenizer_dir(tmp_path_factory) -> str:
    """Without a pad and an end-of-text token."""
    directory = tmp_path_factory.mktemp("bare_tokenizer")
    word_tokenizer(pad_token=None, eos_token=None).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    return str(tmp_path / "cache")
