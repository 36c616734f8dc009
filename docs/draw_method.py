"""Draws docs/method.png, the picture in the README, from the embedded language model: ``python docs/draw_method.py``.

The estimator is the training-free one, pooled keys; rows keep 12 keys of up to 96.
"""

import gzip
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_sea.adapt import convert
from lightning_sea.config import SEAConfig
from lightning_sea.data.embedded import CORPUS, resolve_model
from lightning_sea.recorder import AttentionRecorder, LayerRecord
from lightning_sea.visualization import attention_matrices

NUM_TOKENS, LAYER, HEAD = 96, 1, 2
CONFIG = SEAConfig(k=12, predictor_length=32, first_look_ratio=1)
PANELS = (
    ("dense attention", "every query, every key", "T × T"),
    ("1. estimate", "K scores per query", "T × K"),
    ("2. select", "keep the best bins", "K bits per query"),
    ("3. attend", "kept keys exactly, the rest pooled", "T × (k + K)"),
)


def record(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> LayerRecord:
    with AttentionRecorder(model) as recorder:
        model(**inputs, use_cache=False)
    return recorder.records[LAYER]


@torch.no_grad()
def matrices() -> list[torch.Tensor]:
    """What the four panels show, each with values from 0 to 1."""
    name = resolve_model("embedded:lm")
    with gzip.open(CORPUS / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        text = max((json.loads(line)["text"] for line in file), key=len)
    inputs = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")
    inputs = {key: value[:, :NUM_TOKENS] for key, value in inputs.items() if key != "token_type_ids"}
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    dense = record(model, inputs)
    sea = record(convert(model, CONFIG), inputs)
    maps = attention_matrices(dense, sea, head=HEAD)
    estimate = sea.estimate.probabilities()[0, HEAD]
    return [maps["teacher"], estimate, maps["mask"] * 0.25, maps["result"]]


def draw(path: Path) -> None:
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    shown = matrices()
    axes = figure.subplots(1, 4, gridspec_kw={"width_ratios": [matrix.shape[1] + 20 for matrix in shown]})
    for place, (title, meaning, size), matrix in zip(axes, PANELS, shown, strict=True):
        place.imshow(matrix.sqrt().numpy(), cmap="Blues", vmin=0, vmax=0.9, interpolation="nearest")
        place.set_title(f"{title}\n{meaning}", fontsize=10)
        place.set_xlabel(size)
        place.set_xticks([])
        place.set_yticks([])
    axes[0].set_ylabel("query")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).with_name("method.png"))
