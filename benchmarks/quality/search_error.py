"""How far are the contexts of training-free designs from dense attention's, layer by layer? Quick, on a CPU.

    python benchmarks/quality/search_error.py --model models/SmolLM2-135M --text data/quality \\
        --output benchmarks/results/search_error.json

One block of the text that settings are chosen by goes through the dense model; queries, keys and values of some layers
are kept. Every design of ``dense_prototype`` then attends with a sample of rows, and the relative squared error of the
context is averaged over layers. Centres of the far field are those of ``convert``, from random tokens.
"""

import argparse
import json
from pathlib import Path

import torch
from dense_prototype import Design, Look, Pools, attend_rows, times
from tables import Row, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sea.adapt import convert, revert, sea_layers
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import AttentionRecorder, LayerRecord

ROWS = 96  # of every range
RANGES = ((1024, 2048), (2048, 4096), (4096, 8192))  # each of one bin width for K = 256 and 512


def designs() -> dict[str, Design]:
    """Name to design; ``first > … > last`` are the keys that each look leaves, with the width of its runs.

    Scores are half mean, half bound unless a share of the bound is said.
    """
    far = {"far": "mean", "far_centre": "head"}
    found = {}

    def add(name: str, *looks: tuple, **options) -> None:
        found[name] = Design(looks=tuple(Look(*look) for look in looks), **{**far, **options})

    add("512 > 64 by 4", (None, 512), (4, 64))
    add("512 > 64 by 4, no far field", (None, 512), (4, 64), far=None, far_centre=None)
    for width in (1, 2, 8):
        add(f"512 > 64 by {width}", (None, 512), (width, 64))
    add("256 > 64 by 4", (None, 256), (4, 64))
    add("256 > 64 by 2", (None, 256), (2, 64))
    add("1024 > 64 by 4", (None, 1024), (4, 64))
    add("1024 > 64 by 2", (None, 1024), (2, 64))
    add("K = 512, 256 > 64 by 4", (None, 256), (4, 64), num_bins=512)
    add("K = 512, 256 > 64 by 2", (None, 256), (2, 64), num_bins=512)
    add("K = 512, 512 > 64 by 4", (None, 512), (4, 64), num_bins=512)
    add("K = 512, 512 > 64 by 2", (None, 512), (2, 64), num_bins=512)
    add("K = 512, 1024 > 64 by 2", (None, 1024), (2, 64), num_bins=512)
    add("K = 1024, 256 > 64 by 2", (None, 256), (2, 64), num_bins=1024)
    add("K = 1024, 512 > 64 by 2", (None, 512), (2, 64), num_bins=1024)
    add("1024 > 256 by 8 > 64 by 2", (None, 1024), (8, 256), (2, 64))
    add("2048 > 256 by 8 > 64 by 2", (None, 2048), (8, 256), (2, 64))
    add("2048 > 384 by 8 > 64 by 2", (None, 2048), (8, 384), (2, 64))
    for keep in (256, 512, 1024):
        add(f"{keep}", (None, keep))
    for num_bins, keep in ((512, 256), (512, 512), (1024, 128), (1024, 256), (2048, 64), (2048, 128)):
        add(f"K = {num_bins}, {keep}", (None, keep), num_bins=num_bins)
    add("512, a bound of 0.7", (None, 512, "mix0.7"))
    add("512 > 64 by 2, bounds of 0.7", (None, 512, "mix0.7"), (2, 64, "mix0.7"))
    add("512 > 128 by 2", (None, 512), (2, 128))
    add("512 > 32 by 2", (None, 512), (2, 32))
    return found


@torch.no_grad()
def record(options: argparse.Namespace) -> tuple[list[LayerRecord], list[torch.Tensor]]:
    """Records of the chosen layers of the dense model on one block of text, and their centres."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = (options.text / "validation.tokens").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    block = ids[options.skip : options.skip + RANGES[-1][1]][None]
    layers = range(options.first_layer, model.config.num_hidden_layers, options.layer_step)
    centres = [layer.centre.detach() for layer in sea_layers(convert(model, SEAConfig()))]
    revert(model)
    with AttentionRecorder(model) as recorder:
        model.base_model(block, use_cache=False)
    return [recorder.records[layer] for layer in layers], [centres[layer] for layer in layers]


@torch.no_grad()
def context_error(record: LayerRecord, centre: torch.Tensor, design: Design, rows: torch.Tensor) -> tuple:
    """Relative squared error, kept mass and keys of a sample of rows that have one bin width."""
    stop = int(rows[-1]) + 1
    width = 1
    while design.num_bins * width < stop:
        width *= 2
    query, key, value = record.query * record.scaling, record.key[:, :, :stop], record.value[:, :, :stop]
    near = Pools(key, value, None)
    far = Pools(key, value, centre) if design.far_centre else near
    scores = times(query[:, :, rows], key).masked_fill(torch.arange(stop) > rows[:, None], -1e30)
    found = attend_rows(query[:, :, rows], scores, value, query[:, :, rows], rows, width, near, far, design)[1]
    return tuple(
        float(x)
        for x in (
            found.square_error.sum() / found.square_context.sum(),
            found.kept_mass / found.late_rows,
            found.keys / found.rows,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="transformers directory of SmolLM2-135M")
    parser.add_argument("--text", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--first_layer", type=int, default=0)
    parser.add_argument("--layer_step", type=int, default=3)
    parser.add_argument("--skip", type=int, default=0, help="tokens before the block")
    parser.add_argument("--only", nargs="+", help="names of designs, default all")
    options = parser.parse_args()
    records, centres = record(options)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randperm(b - a, generator=generator)[:ROWS].sort()[0] + a for a, b in RANGES]
    table: list[Row] = []
    for name, design in designs().items():
        if options.only and name not in options.only:
            continue
        for (first, last), rows in zip(RANGES, samples, strict=True):
            errors, masses, keys = zip(
                *(context_error(x, c, design, rows) for x, c in zip(records, centres, strict=True)), strict=True
            )
            row = {"task": "search_error", "model": "SmolLM2-135M", "variant": name, "first_row": first}
            row |= {"last_row": last, "metric": "relative squared error", "value": round(sum(errors) / len(errors), 5)}
            row |= {"kept_mass": round(sum(masses) / len(masses), 4), "keys_per_row": round(sum(keys) / len(keys), 1)}
            table.append(row | {"layers": [round(error, 5) for error in errors]})
            print(json.dumps(table[-1]), flush=True)
    write_results(options.output, table)


if __name__ == "__main__":
    main()
