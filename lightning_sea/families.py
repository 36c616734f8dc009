"""Model families that can be converted: where each keeps its self-attention. A new one is one entry and one test."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# model_type -> class name of the module that calls the attention interface for self-attention
FAMILIES = {
    "bert": "BertSelfAttention",
    "roberta": "RobertaSelfAttention",
    "opt": "OPTAttention",
    "gpt2": "GPT2Attention",
    "gpt_neox": "GPTNeoXAttention",
    "llama": "LlamaAttention",
    "qwen2": "Qwen2Attention",
}


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention module of a model and its sizes."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool


def attention_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """The model's self-attention modules, first layer first.

    Raises:
        ValueError: if the family is unknown or the model uses a kind of attention that SEA cannot stand in for.
    """
    return [_site(module, model.config) for module in attention_modules(model)]


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of ``attention_sites``, without a look at their sizes; raises the same."""
    if model.config.model_type not in FAMILIES:
        raise ValueError(
            f"model is a {type(model).__name__} of model_type {model.config.model_type!r}, expected one of "
            f"{tuple(FAMILIES)}; CONTRIBUTING.md says how to add a family"
        )
    _refuse_other_attention(model)
    wanted = FAMILIES[model.config.model_type]
    return [module for module in model.modules() if type(module).__name__ == wanted]


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model's position embeddings allow; None if its configuration names no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        # RoBERTa counts positions from pad_token_id + 1.
        positions -= config.pad_token_id + 1
    return positions


def _site(module: nn.Module, config) -> AttentionSite:
    num_heads = config.num_attention_heads
    return AttentionSite(
        module,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        causal=module.is_causal,
    )


def _refuse_other_attention(model: PreTrainedModel) -> None:
    config = model.config
    refusals = {
        "cross-attention": getattr(config, "add_cross_attention", False) or config.is_encoder_decoder,
        "a sliding window": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "soft-capped attention scores": getattr(config, "attn_logit_softcapping", None) is not None,
        "reordered, upcast attention": getattr(config, "reorder_and_upcast_attn", False),
    }
    found = [what for what, used in refusals.items() if used]
    if found:
        raise ValueError(
            f"model is a {type(model).__name__} with {' and '.join(found)}: SEA stands in for plain self-attention only"
        )
