"""Turning pretrained transformers models into SEA models and back, on instances; saving and loading them.

The baselines of ``SEAConfig.method`` go the same way: what is said of SEA here holds for them too.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .attention import METHODS, BaselineAttention, SEAAttention
from .calibration import calibrate, has_far_field
from .config import SEAConfig
from .families import attention_sites
from .interface import IMPLEMENTATION

FORMAT_VERSION = 1
SEA_FILE = "sea.json"


@dataclass
class Conversion:
    """What ``convert`` did to a model; kept on the model as ``sea_conversion``."""

    config: SEAConfig
    layers: list[int]
    implementation: str


def convert(model: PreTrainedModel, config: SEAConfig, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """Put SEA in place of the self-attention of ``model``, in place.

    The pretrained weights stay; each converted attention module gains a submodule ``sea``. A far field is calibrated
    with random tokens, which takes a few forward passes.

    Args:
        model: a transformers model of one of ``families.FAMILIES``.
        config: which method, and how it estimates, selects and mixes.
        layers: which layers, 0-based; None means all. The others keep softmax attention.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is converted already, its family is unknown, it uses cross-attention, sliding windows
            or soft-capping, or a layer does not exist.
    """
    _insert(model, config, layers)
    if has_far_field(model):
        calibrate(model)
    return model


def _insert(model: PreTrainedModel, config: SEAConfig, layers: Sequence[int] | None) -> None:
    if hasattr(model, "sea_conversion"):
        raise ValueError("model is a SEA model already: call revert(model) before converting it again")
    sites = attention_sites(model)
    chosen = list(range(len(sites))) if layers is None else sorted(set(layers))
    outside = [layer for layer in chosen if not 0 <= layer < len(sites)]
    if outside or not chosen:
        raise ValueError(f"layers is {layers}, expected numbers from 0 to {len(sites) - 1}, at least one")
    attentions = [_build(sites[layer], config) for layer in chosen]  # all checks before the first change
    for layer, attention in zip(chosen, attentions, strict=True):
        sites[layer].module.sea = attention
    model.sea_conversion = Conversion(config, chosen, model.config._attn_implementation)
    model.set_attn_implementation(IMPLEMENTATION)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``convert``: the model has its own attention again, with whatever the base weights have become.

    Raises:
        ValueError: if the model is not converted.
    """
    conversion = _conversion(model)
    for site in attention_sites(model):
        if hasattr(site.module, "sea"):
            del site.module.sea
    del model.sea_conversion
    model.set_attn_implementation(conversion.implementation)
    return model


def sea_layers(model: nn.Module) -> list[SEAAttention | BaselineAttention]:
    """What stands in for attention in a model, first layer first; empty for a model that is not converted."""
    return [module for module in model.modules() if isinstance(module, SEAAttention | BaselineAttention)]


def set_k(model: PreTrainedModel, k: int) -> None:
    """Change how many keys a query keeps on average (the paper's dynamic k); nothing is reloaded.

    Raises:
        ValueError: if ``k`` is not allowed or the model is not converted.
    """
    conversion = _conversion(model)
    conversion.config = conversion.config.replace(k=k)
    for layer in sea_layers(model):
        layer.config = conversion.config


def save_pretrained(model: PreTrainedModel, directory: str | Path) -> None:
    """Save a converted model: safetensors, the base model's config.json, and sea.json.

    Raises:
        ValueError: if the model is not converted.
    """
    conversion = _conversion(model)
    model.save_pretrained(directory, max_shard_size="1000GB")  # one file, so that load_pretrained need not merge
    record = {
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "layers": conversion.layers,
        "sea": conversion.config.to_dict(),
    }
    (Path(directory) / SEA_FILE).write_text(json.dumps(record, indent=2) + "\n")


def load_pretrained(directory: str | Path) -> PreTrainedModel:
    """Load what ``save_pretrained`` wrote, in evaluation mode.

    Keys that a later version added are ignored with a warning.

    Raises:
        FileNotFoundError: if ``directory`` holds no saved SEA model.
        ValueError: if weights are missing or left over, or the format is newer than this package can read.
    """
    directory = Path(directory)
    if not (directory / SEA_FILE).is_file():
        raise FileNotFoundError(f"{directory} holds no {SEA_FILE}: it was not written by save_pretrained")
    record = json.loads((directory / SEA_FILE).read_text())
    if record["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{directory / SEA_FILE} has format_version {record['format_version']}, expected {FORMAT_VERSION}"
        )
    unknown = sorted(set(record) - {"format_version", "model_class", "layers", "sea"})
    if unknown:
        warnings.warn(f"{directory / SEA_FILE}: ignoring unknown keys {unknown}", stacklevel=2)
    config = AutoConfig.from_pretrained(directory)
    model = getattr(transformers, record["model_class"])._from_config(config, dtype=config.dtype or torch.float32)
    _insert(model, SEAConfig.from_dict(record["sea"]), record["layers"])
    _load_weights(model, directory / "model.safetensors")
    return model.eval()


def _load_weights(model: PreTrainedModel, path: Path) -> None:
    result = model.load_state_dict(load_file(path), strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(result.missing_keys) - tied)
    if missing or result.unexpected_keys:
        raise ValueError(f"{path}: missing weights {missing}, unexpected weights {sorted(result.unexpected_keys)}")


def _build(site, config: SEAConfig) -> SEAAttention | BaselineAttention:
    attention = METHODS[config.method](
        config,
        num_heads=site.num_heads,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        causal=site.causal,
    )
    weight = next(site.module.parameters())
    return attention.to(device=weight.device, dtype=weight.dtype).train(site.module.training)


def _conversion(model: PreTrainedModel) -> Conversion:
    if not hasattr(model, "sea_conversion"):
        raise ValueError(f"model is a {type(model).__name__} that is not converted: call convert(model, config) first")
    return model.sea_conversion
