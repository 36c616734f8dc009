"""A layer's inference forward as a CUDA graph: no host synchronisation, no launch that depends on the data."""

import pytest
import torch

from lightning_sea.attention import SEAAttention
from lightning_sea.config import SEAConfig
from sea_kernels.second_look import triton_launches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HEADS, GROUPS, HEAD_DIM = 4, 2, 64
BIDIRECTIONAL = {"predictor_length": 128}
TWO_LOOKS = {"k": 64, "first_look_ratio": 8, "second_look_width": 4}


def random_inputs(seq_len, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(2, seq_len, heads, HEAD_DIM, device="cuda", generator=generator).bfloat16().transpose(1, 2)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize(
    ("changes", "causal"),
    [({}, True), ({"average_context": "mean"}, True), ({"query_stride": 4}, True), (BIDIRECTIONAL, False)],
)
@pytest.mark.parametrize("seq_len", [63, 1111])
def test_replay_on_new_inputs_gives_what_a_call_gives(changes, causal, seq_len):
    check_replay(new_layer(changes, causal), seq_len)


@pytest.mark.parametrize("changes", [{}, TWO_LOOKS, {**TWO_LOOKS, "query_stride": 4}])
def test_heads_with_budgets_of_their_own(changes, monkeypatch):
    monkeypatch.setattr(triton_launches, "FEW_PROGRAMS", 1)  # classes of heads although the input is small
    layer = new_layer(changes, causal=True)
    layer.budgets.assign(torch.tensor([4.0, 0.125, 0.5, 1.0]))
    check_replay(layer, 1111)


def new_layer(changes, causal):
    torch.manual_seed(0)
    sizes = {"num_heads": HEADS, "num_kv_heads": GROUPS, "head_dim": HEAD_DIM}
    return SEAAttention(SEAConfig(**changes), **sizes, causal=causal).cuda().bfloat16().eval()


@torch.inference_mode()
def check_replay(layer, seq_len):
    def forward(query, key, value):
        return layer(query, key, value, scaling=HEAD_DIM**-0.5, with_scores=False)[0]

    first, second = random_inputs(seq_len, 1), random_inputs(seq_len, 2)
    expected = forward(*second)  # also compiles
    inputs = [x.clone() for x in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(*inputs)
    for target, source in zip(inputs, second, strict=True):
        target.copy_(source)
    graph.replay()
    assert torch.equal(output, expected)
    assert not torch.equal(output, forward(*first))
