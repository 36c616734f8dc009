"""Prefill of whole language models: SEA in every layer against the same model with fused dense attention. Needs a GPU.

    python benchmarks/prefill.py --output benchmarks/results/prefill.json

Random weights in the shapes of two Llama models, bf16, batch 1, random tokens; keys and values are kept in a cache, and
logits are computed for the last token alone. A trained model's rows agree less or more than random ones, and SEA's time
depends on how much they agree; dense attention's does not. First, on a short input of which SEA keeps every key, its
logits are checked against the dense model's.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from attention_forward import FORMS
from attention_methods import FUSED
from measure import ROOT, report_head, time_and_memory, write_report
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_sea.adapt import convert, revert
from lightning_sea.config import SEAConfig

MODELS = {  # the shapes of SmolLM2-135M and Llama-3.2-1B
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
CHECK_LENGTH = 200  # short enough that every key is kept in a bin of its own
MAX_ERROR_RATIO = 2.0


def build(name: str, longest: int) -> LlamaForCausalLM:
    config = LlamaConfig(**MODELS[name], max_position_embeddings=longest, tie_word_embeddings=True)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.cuda().eval().requires_grad_(False)


def random_tokens(model: LlamaForCausalLM, seq_len: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, seq_len), device=model.device)


def last_logits(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=True, logits_to_keep=1).logits


def error_ratio(model: LlamaForCausalLM) -> float:
    """Error of the logits with SEA that keeps everything over that of the dense model, both against float32."""
    tokens = random_tokens(model, CHECK_LENGTH)
    exact = last_logits(copy.deepcopy(model).float(), tokens)
    dense = last_logits(model, tokens).float()
    convert(model, SEAConfig(k=CHECK_LENGTH))
    sea = last_logits(model, tokens).float()
    revert(model)
    return round(float((sea - exact).norm() / (dense - exact).norm()), 3)


def rows(model: LlamaForCausalLM, seq_len: int, forms: list[str], strides: list[int]) -> list[dict]:
    """One row per method at one length."""
    tokens = random_tokens(model, seq_len)
    with sdpa_kernel([FUSED["cudnn"], FUSED["flash"]], set_priority=True):  # cuDNN where it can: it is the faster one
        found = [{"method": "sdpa", **time_and_memory(lambda: last_logits(model, tokens))}]
    for form, stride in itertools.product(forms, strides):
        config = SEAConfig(query_stride=stride, **FORMS[form])
        convert(model, config)
        row = {"method": "sea", "form": form, "k": config.k, "query_stride": stride}
        found.append(row | time_and_memory(lambda: last_logits(model, tokens)))
        revert(model)
    for row in found:
        known = found[0]["ms"] is not None and row["ms"] is not None
        row |= {"seq_len": seq_len, "sdpa_ratio": round(found[0]["ms"] / row["ms"], 3) if known else None}
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/prefill.json", help="other rows in it stay"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of SEA")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 4], help="values of query_stride")
    args = parser.parse_args()
    torch.manual_seed(0)
    report = {**report_head(), "shape": {"batch": 1, "dtype": "bfloat16", "weights": "random"}, "rows": []}
    for name in args.models:
        model = build(name, max(args.lengths))
        facts = {"model": name, "parameters": model.num_parameters(), "error_ratio": error_ratio(model)}
        if not facts["error_ratio"] <= MAX_ERROR_RATIO:  # nor NaN
            raise SystemExit(f"{facts}: SEA that keeps everything does not give the dense model's logits")
        for seq_len in args.lengths:
            for row in rows(model, seq_len, args.forms, args.strides):
                report["rows"].append(facts | row)
                print(json.dumps(report["rows"][-1]), flush=True)
            write_report(report, args.output, ("model", "seq_len"))
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
