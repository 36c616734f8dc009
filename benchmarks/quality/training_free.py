"""Which training-free sparse attention keeps a language model's perplexity? Compares designs of ``dense_prototype``.

    python benchmarks/quality/training_free.py --model DIR_WITH_GGUF --wikitext wiki.valid.tokens \\
        --summaries summaries.jsonl.gz --output benchmarks/results/training_free.json

The text is every tenth Wikipedia summary and the first half of WikiText-2 validation; nothing that a result table
uses. Centres of the pooled keys are mean queries over eight blocks of the other summaries. Needs transformers and gguf.
"""

import argparse
import gzip
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from dense_prototype import Design, Look, Statistics, attend
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

SEQ_LENS = {1024: (16, 8), 4096: (4, 2), 8192: (3, 1)}  # blocks of WikiText, blocks of summaries
TOKENS_PER_PASS = 8192
CALIBRATION_BLOCKS = 8
CALIBRATION_SKIP = 64  # the first rows attend to little but themselves: their queries are not typical


@dataclass
class Harness:
    """What the registered attention function does: dense if ``design`` is None; keeps statistics or mean queries."""

    design: Design | None = None
    centres: list[Tensor] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    recorded: list[Tensor] | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        if self.recorded is not None:
            self.recorded.append((query[:, :, CALIBRATION_SKIP:] * scaling).mean((0, 2)))
        if self.design is None:
            context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            limit = max(256, min(1024, 2**23 // query.shape[2]))
            centre = self.centres[module.layer_idx]
            context, statistics = attend(query, key, value, scaling, self.design, centre, limit)
            self.statistics.append(statistics)
        return context.transpose(1, 2).contiguous(), None


def designs() -> dict[str, tuple[Design, tuple[int, ...]]]:
    """Name -> design and the lengths at which it is evaluated."""
    found: dict[str, tuple[Design, tuple[int, ...]]] = {}

    def add(name, *looks, at=(1024, 4096, 8192), **options):
        found[name] = Design(looks=tuple(Look(*look) for look in looks), **options), at

    def add_two(name, at=(4096,), coarse=256, k=64, score="half", grouping="query", **options):
        add(name, (None, coarse, score, grouping), (4, k, score, grouping), at=at, **options)

    centred = {"far": "mean", "far_centre": "head"}
    add("window k=64", sliding=64)
    add("window k=128", at=(1024, 4096), sliding=128)
    for score in ("mean", "half", "var", "cap", "oracle"):
        for grouping in ("query", "causal_batch"):
            add(f"one look, {score}, {grouping}", (None, 64, score, grouping), at=(1024,))
    for grouping in ("causal_batch", "kv_group"):
        add(f"one look, half, {grouping}, far plain", (None, 64, "half", grouping), at=(1024,), far="mean")
    for window in (16, 32):
        add(f"one look, half, window {window}, far plain", (None, 64), at=(1024,), window=window, far="mean")
    add("one look, half, far plain", (None, 64), far="mean")
    for shift in (0.15, 0.3):
        add(f"one look, half, far plain, shift {shift}", (None, 64), far="mean", far_shift=shift)
    add("one look, mean, far plain", (None, 64, "mean"), far="mean")
    add("one look, mean, far variance", (None, 64, "mean"), far="var")
    add("one look, mean, far true mass", (None, 64, "mean"), far="true")
    add("one look, most recent, far plain", (None, 64, "recent"), far="mean")
    for grouping in ("query", "causal_batch"):
        add_two(f"two looks, mean, {grouping}", at=(4096, 8192), score="mean", grouping=grouping)
    for k in (32, 128):
        add(f"two looks, mean then half, k={k}", (None, 256, "mean"), (4, k))
        add(f"two looks, mean then half, k={k}, far plain", (None, 256, "mean"), (4, k), far="mean")
    add_two("two looks, oracle", at=(4096, 8192), score="oracle")
    add_two("two looks, half", at=(1024, 4096, 8192))
    add_two("two looks, half, coarse 512", coarse=512)
    add_two("two looks, half, k=128", k=128)
    for score in ("mix0.3", "mix0.75", "half+v"):
        add_two(f"two looks, {score}", score=score)
    add_two("two looks, half, centred search", centre="head", far_centre="head")
    for average, at in ((0.93, (1024, 4096)), (0.85, (4096,)), ("estimated", (4096,)), ("true", (4096,))):
        add_two(f"two looks, half, average context {average}", at=at, average=average)
    add_two("two looks, half, far plain", far="mean")
    add_two("two looks, half, far plain, values zero", far="mean", far_value="zero")
    add_two("two looks, half, far centred", at=(1024, 4096, 8192), **centred)
    add_two("two looks, half, far centred, coarse bins only", far_coarse_only=True, **centred)
    add_two("two looks, half, far centred per key/value head", far="mean", far_centre="group")
    add_two("two looks, half, far centred, half the centre", centre_scale=0.5, **centred)
    add_two("two looks, half, far centred, variance 0.25", far="var", far_centre="head", alpha=0.25)
    add_two("two looks, half, centred search, far centred", centre="head", **centred)
    add_two("two looks, half, far centred, coarse 512", coarse=512, **centred)
    for k in (32, 128):
        add_two(f"two looks, half, far centred, k={k}", k=k, **centred)
    add_two("two looks, half, far centred, K=128", num_bins=128, **centred)
    add_two("two looks, half, far centred, kv_group", grouping="kv_group", **centred)
    add_two("two looks, half, far centred, window 16", window=16, **centred)
    add_two("two looks, half, far centred, stride 4", stride=4, **centred)
    for coarse in (256, 512):
        add_two(f"K=64, coarse {coarse}", at=(8192,), num_bins=64, coarse=coarse)
    for coarse in (512, 1024):
        looks = (None, coarse), (16, 256), (4, 64)
        add(f"K=64, coarse {coarse}, then 256 by 16", *looks, at=(8192,), num_bins=64)
    return found


def load_text(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids: WikiText, held-out summaries, calibration summaries."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf)
    with gzip.open(args.summaries, "rt") as lines:
        summaries = [json.loads(line)["text"] for line in lines]
    wikitext = args.wikitext.read_text()
    held_out = [text for index, text in enumerate(summaries) if index % 10 == 9]
    others = [text for index, text in enumerate(summaries[:2000]) if index % 10 != 9]
    texts = wikitext[: len(wikitext) // 2], "\n\n".join(held_out), "\n\n".join(others)
    return tuple(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def token_losses(model, blocks: Tensor) -> Tensor:
    """Next-token losses in nats of token ids [blocks, T], flat."""
    losses = []
    for ids in blocks.split(max(1, TOKENS_PER_PASS // blocks.shape[1])):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for part, target in zip(hidden.split(4096), targets.split(4096), strict=True):
            losses.append(F.cross_entropy(model.lm_head(part), target, reduction="none"))
    return torch.cat(losses)


def measure(model, harness: Harness, design: Design, blocks: Tensor, dense: Tensor) -> dict[str, float]:
    """Perplexity ratio to the dense model with the standard error of its logarithm, and what the design keeps."""
    harness.design, harness.statistics = design, []
    difference = token_losses(model, blocks) - dense
    layers = model.config.num_hidden_layers
    sums = [torch.stack(x).double().view(-1, layers).sum(0) for x in zip(*harness.statistics, strict=True)]
    total = Statistics(*sums)
    return {
        "value": round(math.exp(difference.mean()), 4),
        "standard_error": round(float(difference.std() / len(difference) ** 0.5), 4),
        "keys_per_row": round(float(total.keys.sum() / total.rows.sum()), 1),
        "kept_mass": round(float(total.kept_mass.sum() / total.late_rows.sum()), 3),
        "context_error": round(float((total.square_error / total.square_context).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M")
    parser.add_argument("--gguf", help="name of the GGUF file in it, if its weights come as one")
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--summaries", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of designs, default all")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    harness = Harness()
    AttentionInterface.register("training_free", harness)
    options = {"dtype": torch.float32, "attn_implementation": "training_free"}
    model = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf, **options).to(device).eval()
    wikitext, held_out, others = (ids.to(device) for ids in load_text(args))
    harness.recorded = []
    token_losses(model, others[: CALIBRATION_BLOCKS * 1024].view(CALIBRATION_BLOCKS, 1024))
    harness.centres, harness.recorded = harness.recorded, None

    data, rows = {}, []
    for seq_len, counts in SEQ_LENS.items():
        pairs = zip((wikitext, held_out), counts, strict=True)
        blocks = torch.cat([text[: seq_len * count].view(count, seq_len) for text, count in pairs])
        data[seq_len] = blocks, token_losses(model, blocks)
        rows.append(row("dense", None, seq_len, "perplexity", {"value": round(math.exp(data[seq_len][1].mean()), 3)}))
    for name, (design, seq_lens) in designs().items():
        for seq_len in seq_lens:
            if args.only is None or name in args.only:
                measured = measure(model, harness, design, *data[seq_len])
                rows.append(row(name, design, seq_len, "perplexity_ratio", measured))
                print(json.dumps(rows[-1]), flush=True)
        write(args.output, rows)


def row(variant: str, design: Design | None, seq_len: int, metric: str, measured: dict[str, float]) -> dict:
    """One flat row of the result file."""
    k = None if design is None else design.sliding or design.looks[-1].keep
    method = "teacher" if design is None else "window" if design.sliding else "training_free"
    head = {"task": "lm", "model": "SmolLM2-135M", "method": method, "variant": variant, "k": k}
    head["predictor_length"] = design.num_bins if method == "training_free" else None
    return head | {"seq_len": seq_len, "steps": 0, "metric": metric} | measured


def write(path: Path, rows: list[dict]) -> None:
    names = ("torch", "transformers")
    head = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # one row a line: readable differences
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    with torch.no_grad():
        main()
