"""Loading what a training starts from: the dense or converted student, and the teacher."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import adapt
from ..config import SEAConfig
from ..data.embedded import resolve_model

Options = dict[str, Any]  # for the class's from_pretrained


def load_dense(auto_class: type, name: str, options: Options) -> PreTrainedModel:
    """The plain model of that name, float32.

    Raises:
        ValueError: if ``name`` is an exported SEA model.
    """
    if _is_sea(name):
        raise ValueError(f"model is {name!r}, a SEA model, with attention='dense': pass the plain model")
    return _load_plain(auto_class, name, options)[0]


def load_sea(
    auto_class: type, name: str, options: Options, sea: SEAConfig | None, layers: list[int] | None
) -> PreTrainedModel:
    """The model of that name, converted now or exported by an earlier training, float32.

    Raises:
        ValueError: if an exported model was trained with other settings than ``sea`` and ``layers``; only k may differ.
    """
    if not _is_sea(name):
        return adapt.convert(_load_plain(auto_class, name, options)[0], sea or SEAConfig(), layers)
    model = adapt.load_pretrained(resolve_model(name))
    saved = model.sea_conversion
    if sea and sea.replace(k=saved.config.k) != saved.config:
        theirs, ours = saved.config.to_dict(), sea.to_dict()
        differing = {key: ours[key] for key in ours if key != "k" and ours[key] != theirs[key]}
        raise ValueError(f"sea differs from what {name!r} was trained with in {differing}: only k may change")
    if layers is not None and sorted(set(layers)) != saved.layers:
        raise ValueError(f"layers is {layers}, but {name!r} was converted in layers {saved.layers}")
    if sea:
        adapt.set_k(model, sea.k)
    return model


def load_teacher(auto_class: type, name: str, options: Options) -> PreTrainedModel:
    """The plain model of that name, float32, frozen and in evaluation mode.

    Raises:
        ValueError: if ``name`` is an exported SEA model, or if not all of its weights are trained.
    """
    if _is_sea(name):
        raise ValueError(f"teacher is {name!r}, a SEA model: pass the plain model that it was distilled from")
    model, new_weights = _load_plain(auto_class, name, options)
    if new_weights:
        raise ValueError(
            f"teacher is {name!r}, which has no trained {', '.join(new_weights)}: train it on the task first, with "
            "attention='dense' and an export_dir, and pass that directory"
        )
    return model.eval().requires_grad_(False)


def _load_plain(auto_class: type, name: str, options: Options) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights that it does not bring."""
    model, report = auto_class.from_pretrained(
        resolve_model(name),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the head of another task
        **options,
    )
    return model, sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})


def _is_sea(name: str) -> bool:
    return (Path(resolve_model(name)) / adapt.SEA_FILE).is_file()
