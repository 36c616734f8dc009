"""How many bins blocks of neighbouring rows keep together: what kernels that share keys between rows have to read.

    python benchmarks/mask_overlap.py --model models/SmolLM2-135M --text data/quality/validation.tokens

Bins that SEA's search selects for the rows of the second half of one input, by single rows and as unions of blocks of
rows, on queries and keys of some layers of a language model and on synthetic ones as in other benchmarks. On a CPU.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from measure import ROOT, smooth
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sea.environment import commit, device_name, versions
from lightning_sea.recorder import AttentionRecorder
from sea_kernels import pooled_selection
from sea_kernels.masks import unpack_bits

BLOCKS = (16, 64, 128)  # rows
NUM_BINS = 256


@torch.no_grad()
def recorded(model: str, text: Path, seq_len: int, step: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Query, key and scaling of every ``step``-th layer on the first tokens of the text."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False, return_tensors="pt")["input_ids"][:, :seq_len]
    with AttentionRecorder(network) as recorder:
        network.base_model(ids, use_cache=False)
    layers = list(enumerate(recorder.records))[::step]
    return {f"layer {index}": (record.query, record.key, record.scaling) for index, record in layers}


def overlap(query: Tensor, key: Tensor, scaling: float, k: int) -> dict[str, float]:
    """Mean number of bins that rows, and blocks of rows, keep in the second half of the input."""
    weight = torch.full((query.shape[1],), 0.5)
    weights = {"mean_weight": weight, "bound_weight": weight}
    mask = pooled_selection(query, key, k=k, num_bins=NUM_BINS, causal=True, scaling=scaling, **weights)
    kept = unpack_bits(mask.bits[:, :, query.shape[2] // 2 :], NUM_BINS)
    found = {"bins_per_row": kept.sum(-1)}
    found |= {f"bins_per_{rows}_rows": kept.unflatten(2, (-1, rows)).any(3).sum(-1) for rows in BLOCKS}
    return {name: round(float(count.float().mean()), 2) for name, count in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="transformers directory of a causal language model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--layer-step", type=int, default=3)
    parser.add_argument("--k", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/mask_overlap.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    inputs = recorded(args.model, args.text, args.seq_len, args.layer_step)
    synthetic = [smooth(4, args.seq_len, device="cpu").float() for _ in range(2)]
    inputs["synthetic"] = (*synthetic, synthetic[0].shape[-1] ** -0.5)
    rows = []
    for k in args.k:
        for name, (query, key, scaling) in inputs.items():
            rows.append({"inputs": name, "seq_len": args.seq_len, "k": k, "predictor_length": NUM_BINS})
            rows[-1] |= overlap(query, key, scaling, k)
            print(json.dumps(rows[-1]), flush=True)
    head = {"device": device_name(), "versions": versions(), "commit": commit()}
    head["command"] = shlex.join(["python", *sys.argv])
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    args.output.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
