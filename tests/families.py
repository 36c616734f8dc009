"""Tiny random models of every family that can be converted."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_ENCODER = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 160, "num_labels": 3}
_DECODER = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 160}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}

BUILDERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_ENCODER)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_COMMON, ffn_dim=48, max_position_embeddings=160, word_embed_proj_dim=32, dropout=0.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_COMMON, n_positions=160)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_DECODER)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
}
CAUSAL = ("opt", "gpt2", "gpt_neox", "llama", "qwen2")
BIDIRECTIONAL = ("bert", "roberta")


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family, in evaluation mode, with weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    model = BUILDERS[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6)
    return model


def token_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
