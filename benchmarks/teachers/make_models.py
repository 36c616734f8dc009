"""Train the embedded models' tokenizer and write both models with random weights, for the configurations to train.

    python benchmarks/teachers/make_models.py [--train-file FILE] [--out FOLDER]

Writes FOLDER/untrained/lm and FOLDER/untrained/classifier; README.md here has the next steps. Both models share the
vocabulary: byte-level BPE, so no text is unknown. Only the classifier's tokenizer puts ``<s>`` and ``</s>`` around
sentences.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from lightning_sea.data.files import read_rows
from lightning_sea.data.glue_tasks import TOPICS

VOCABULARY = 4096
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SAME_TOKENS = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


def train_tokenizer(train_file: Path) -> Tokenizer:
    """A byte-level BPE tokenizer of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL_TOKENS.values(), "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((row["text"] for _, row in read_rows(train_file)), trainer)
    return tokenizer


def sentence_template(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """``<s> A </s>``, or ``<s> A </s> B </s>`` with token types 0 and 1."""
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    return processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special)


def classifier_config() -> PretrainedConfig:
    """A BERT of about 1.4 million parameters with one output per topic."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=512,
        pad_token_id=0,
        architectures=["BertForSequenceClassification"],
        id2label=dict(enumerate(TOPICS)),
        label2id={topic: index for index, topic in enumerate(TOPICS)},
    )


def lm_config() -> PretrainedConfig:
    """A Llama of about 1.3 million parameters: rotary positions, two heads per key head, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )


def write_model(tokenizer: Tokenizer, auto_class: type, config: PretrainedConfig, folder: Path) -> None:
    """Write the tokenizer and the model with random weights."""
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if config.model_type == "bert" else [])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.max_position_embeddings,
        model_input_names=names,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
        **SAME_TOKENS,
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(1)
    auto_class.from_config(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, default=Path("outputs/teachers/train.jsonl.gz"))
    parser.add_argument("--out", type=Path, default=Path("outputs/teachers"))
    arguments = parser.parse_args()
    folder = arguments.out / "untrained"
    tokenizer = train_tokenizer(arguments.train_file)
    write_model(tokenizer, AutoModelForCausalLM, lm_config(), folder / "lm")
    tokenizer.post_processor = sentence_template(tokenizer)
    write_model(tokenizer, AutoModelForSequenceClassification, classifier_config(), folder / "classifier")


if __name__ == "__main__":
    main()
