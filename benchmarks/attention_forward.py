"""Time and memory of one attention layer, forward: SEA against dense attention and a sliding window. Needs a GPU.

    python benchmarks/attention_forward.py --output benchmarks/results/attention_forward.json

Everything between the host's projections is timed: q, k, v in, context out, with fresh modules (nothing is trained).
The inputs are synthetic and smooth: half of the variance of queries and keys follows a random walk that takes a step
every 32 tokens, so neighbouring rows agree in part, as in a language model; how much they agree decides how much work
rows share, so real models differ. Errors are checked first, against float64.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lightning_sea.attention import SEAAttention  # noqa: E402
from lightning_sea.config import SEAConfig  # noqa: E402
from lightning_sea.environment import commit, versions  # noqa: E402
from sea_kernels import far_field_attention, mix_average, pooled_selection, second_look, sparse_attention  # noqa: E402

HEAD_DIM = 64
WINDOW = 64  # keys of the sliding window: as many as SEA keeps
EAGER_LIMIT = 16384
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def median_ms(function: Callable, budget_ms: float = 150.0, repeats: int = 25) -> float:
    """Median time of a call on the device, after a warm-up; fewer repeats for slow functions."""
    function()
    function()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repeats):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        function()
        pair[1].record()
        pairs.append(pair)
        if len(pairs) in (3, 5):
            pair[1].synchronize()
            if sum(start.elapsed_time(end) for start, end in pairs) > budget_ms:
                break
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def extra_mib(function: Callable) -> float:
    """Peak memory of a call above what was there before and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - result.numel() * result.element_size()) / 2**20


def smooth(heads: int, seq_len: int) -> Tensor:
    """bf16 ``[1, H, T, D]`` in the memory order [1, T, H, D] of a host's projections."""
    walk = torch.randn(heads, HEAD_DIM, seq_len // 32 + 2, device="cuda")
    walk = F.interpolate(walk, size=seq_len, mode="linear").transpose(1, 2) * 1.2  # 1.2: interpolation averages
    noise = torch.randn(heads, seq_len, HEAD_DIM, device="cuda")
    rows = (0.5**0.5 * (walk + noise)).bfloat16()
    return rows.transpose(0, 1).contiguous()[None].transpose(1, 2)


def sea_layer(heads: int, stride: int, **changes) -> tuple[SEAAttention, SEAConfig]:
    config = SEAConfig(query_stride=stride, **changes)
    layer = SEAAttention(config, num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM, causal=True)
    return layer.cuda().bfloat16().eval().requires_grad_(False), config


def stages(layer: SEAAttention, config: SEAConfig, query: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    """Time of each operation of the default estimator alone."""
    place = {"causal": True, "scaling": HEAD_DIM**-0.5}
    weights = {"mean_weight": layer.mean_weight, "bound_weight": layer.bound_weight}
    looks = {"stride": config.query_stride, "keep_first": True, **weights, **place}
    first = {"k": config.k * config.first_look_ratio, "num_bins": config.predictor_length}
    second = {"k": config.k, "width": config.second_look_width, "window": config.window}
    coarse = pooled_selection(query, key, **first, **looks)
    mask = second_look(query, key, coarse, **second, **looks)
    runs = {
        "first_look": lambda: pooled_selection(query, key, **first, **looks),
        "second_look": lambda: second_look(query, key, coarse, **second, **looks),
    }
    if config.average_context == "far":
        runs["far_field_attention"] = lambda: far_field_attention(
            query, key, value, mask, coarse, centre=layer.centre, **place
        )
    else:
        gates = layer.gates(query)
        context = sparse_attention(query, key, value, mask, row_scale=gates[0], **place)
        runs["gates"] = lambda: layer.gates(query)
        runs["sparse_attention"] = lambda: sparse_attention(query, key, value, mask, row_scale=gates[0], **place)
        runs["average"] = lambda: mix_average(context, value, gates[1])
    return {name: round(median_ms(run), 4) for name, run in runs.items()}


def error_ratios(heads: int = 4, seq_len: int = 1000) -> dict[str, float]:
    """Error of the bf16 kernels over that of the same formulas in PyTorch's bf16, both against float64."""
    query, key, value = (smooth(heads, seq_len) for _ in range(3))
    layer, _ = sea_layer(heads, 1, average_context="far")
    estimate = layer.estimate(query, key, value, scaling=0.125, with_scores=False)
    place = {"causal": True, "scaling": 0.125}
    centre = 0.3 * torch.randn(heads, HEAD_DIM, device="cuda")
    eye = torch.eye(seq_len, device="cuda").expand(1, heads, -1, -1)  # attention to one-hot values: its weights
    results = {}
    for name, operation, masks, extra in (
        ("sparse_attention", sparse_attention, (estimate.mask,), {}),
        ("far_field_attention", far_field_attention, (estimate.mask, estimate.coarse), {"centre": centre}),
    ):
        exact_inputs = query.double(), key.double(), value.double()
        exact = operation(*exact_inputs, *masks, backend="reference", **extra, **place)
        ours = operation(query, key, value, *masks, backend="triton", **extra, **place)
        weights = operation(query.float(), key.float(), eye, *masks, backend="reference", **extra, **place)
        if name == "sparse_attention":  # the formula in bf16: scores, softmax and values, each rounded
            scores = ((query @ key.mT) * 0.125).masked_fill(weights == 0, float("-inf"))
            plain = scores.softmax(-1) @ value
        else:  # its weights are no softmax of q . k: round them as bf16 attention rounds its own
            plain = weights.bfloat16() @ value
        results[name] = round(float((ours.double() - exact).norm() / (plain.double() - exact).norm()), 3)
    return results


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    seq_len = query.shape[2]
    mask = torch.full((seq_len, seq_len), float("-inf"), device="cuda", dtype=query.dtype).triu(1)
    scores = query @ key.mT * HEAD_DIM**-0.5 + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def flex_window(seq_len: int) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(item, head, row, key):
        return (key <= row) & (row - key < WINDOW)

    mask = create_block_mask(near, None, None, seq_len, seq_len, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)


def dense(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def measure(function: Callable) -> dict:
    """Time and memory, or nulls where memory runs out."""
    try:
        return {"ms": round(median_ms(function), 4), "extra_mib": round(extra_mib(function), 1)}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"ms": None, "extra_mib": None}


def length_rows(heads: int, seq_len: int, methods: list[str], contexts: list[str]) -> list[dict]:
    """All rows of one number of heads and one length."""
    query, key, value = (smooth(heads, seq_len) for _ in range(3))
    common = {"causal": True, "heads": heads, "head_dim": HEAD_DIM, "seq_len": seq_len, "dtype": "bfloat16"}
    rows = []
    runs = {name: measure(lambda b=b: dense(query, key, value, b)) for name, b in DENSE.items()}
    fastest = min(runs, key=lambda name: runs[name]["ms"])
    sdpa_ms = runs[fastest]["ms"]
    rows.append({"method": "sdpa", "backend": fastest, **runs[fastest]})
    for stride, context in itertools.product((1, 4), contexts):
        layer, config = sea_layer(heads, stride, average_context=context)

        def forward(layer=layer):
            return layer(query, key, value, scaling=HEAD_DIM**-0.5, with_scores=False)[0]

        row = {"method": "sea", "k": config.k, "predictor_length": config.predictor_length, "query_stride": stride}
        row |= {"first_look_ratio": config.first_look_ratio, "average_context": context, **measure(forward)}
        rows.append(row | {"stages_ms": stages(layer, config, query, key, value)})
    if "eager" in methods and seq_len <= EAGER_LIMIT:
        rows.append({"method": "eager", **measure(lambda: eager(query, key, value))})
    if "flex_window" in methods:
        window = flex_window(seq_len)
        rows.append({"method": "flex_window", "k": WINDOW, **measure(lambda: window(query, key, value))})
    for row in rows:
        row |= common
        row["sdpa_ratio"] = None if row["ms"] is None else round(sdpa_ms / row["ms"], 3)
        print(json.dumps(row), flush=True)
    return rows


def ceilings() -> dict[str, float]:
    source = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = median_ms(lambda: matrix @ matrix)
    return {
        "copy_tb_s": round(2 * source.numel() * 2 / copy / 1e9, 3),
        "matmul_tflop_s": round(2 * 8192**3 / product / 1e9, 1),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/attention_forward.json")
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 12])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 * 2**i for i in range(8)])
    parser.add_argument("--methods", nargs="+", default=["eager", "flex_window"], help="besides sea and sdpa")
    parser.add_argument("--contexts", nargs="+", default=["mean", "far"], help="values of average_context")
    args = parser.parse_args()
    torch.manual_seed(0)
    report = {
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": commit(),
        "command": "python " + " ".join(sys.argv),
        **ceilings(),
        "error_ratios": error_ratios(),
        "rows": [],
    }
    print(report, flush=True)
    if max(report["error_ratios"].values()) > 2:
        raise SystemExit("a kernel's error is more than twice that of PyTorch's half precision")
    for heads in args.heads:
        for seq_len in args.lengths:
            report["rows"] += length_rows(heads, seq_len, args.methods, args.contexts)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
