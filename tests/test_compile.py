"""torch.compile of a converted model: everything around attention compiles, and nothing changes."""

import pytest
import torch
from families import tiny_model, token_ids
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_sea.adapt import convert, sea_layers
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import AttentionRecorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SEAConfig(k=8, predictor_length=32, first_look_ratio=2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler():
    """A backend that runs what it gets, gradients included, and counts the graphs."""
    return CompileCounterWithBackend("aot_eager")


def run(model, forward, **inputs):
    """Logits, and the gradients of all weights."""
    model.zero_grad()
    logits = forward(input_ids=token_ids(2, 43).to(DEVICE), use_cache=False, **inputs).logits
    logits.square().mean().backward()
    return logits.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def compile_layers(model, compiler):
    for layer in model.model.layers:
        layer.compile(backend=compiler)


@pytest.mark.parametrize("part", ["model", "layers"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_compiled_model_gives_the_same_logits_and_gradients(compiler, part, padding):
    model = convert(tiny_model("llama").to(DEVICE), CONFIG).train()
    mask = torch.ones(2, 43, dtype=torch.int64, device=DEVICE)
    mask[0, 43 - padding :] = 0
    inputs = {"attention_mask": mask} if padding or part == "model" else {}
    logits, grads = run(model, model, **inputs)
    traced = []
    for layer in sea_layers(model):
        layer.register_forward_pre_hook(lambda *_: traced.append(torch.compiler.is_compiling()))
    if part == "layers":
        compile_layers(model, compiler)
    compiled = torch.compile(model, backend=compiler) if part == "model" else model
    compiled_logits, compiled_grads = run(model, compiled, **inputs)
    assert compiler.frame_count >= 2 * len(sea_layers(model))  # before and after the attention of every layer
    assert traced == [False] * len(sea_layers(model))
    torch.testing.assert_close(compiled_logits, logits)
    assert compiled_grads.keys() == grads.keys()
    for name, grad in compiled_grads.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_layers_of_a_compiled_model_are_recorded(compiler):
    model = convert(tiny_model("llama").to(DEVICE), CONFIG)
    compile_layers(model, compiler)
    with AttentionRecorder(model) as recorder:
        logits = model(input_ids=token_ids(1, 20).to(DEVICE), use_cache=False).logits
    assert compiler.frame_count > 0
    assert [record.estimate.scores.shape for record in recorder.records] == [(1, 4, 20, 32)] * 2
    context = recorder.records[0].context
    assert torch.autograd.grad(logits.sum(), context)[0].abs().sum() > 0  # it is part of the graph


def test_what_cannot_be_compiled_is_refused(compiler):
    model = convert(tiny_model("llama").to(DEVICE), CONFIG)
    with pytest.raises(ValueError, match="compiled as a whole with its attention_mask"):
        torch.compile(model, backend=compiler)(input_ids=token_ids(1, 20).to(DEVICE), use_cache=False)
    for layer in model.model.layers:
        layer.compile(backend=compiler, fullgraph=True)
    with pytest.raises(Unsupported, match="sea_attention"):
        model(input_ids=token_ids(1, 20).to(DEVICE), use_cache=False)
