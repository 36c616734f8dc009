"""Copy the trained teachers into the package, weights in half precision: half the size, and loaded as float32.

python benchmarks/teachers/pack_models.py [--trained outputs/teachers/trained]
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from lightning_sea.data.embedded import MODELS, resolve_model


def pack(trained: Path, packed: Path) -> None:
    """Copy one model's configuration, tokenizer and weights."""
    weights = load_file(trained / "model.safetensors")
    packed.mkdir(parents=True, exist_ok=True)
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, packed / "model.safetensors", metadata={"format": "pt"})
    # The configuration, not the file, tells transformers the type to compute in.
    config = json.loads((trained / "config.json").read_text()) | {"dtype": "float32"}
    (packed / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, packed / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, default=Path("outputs/teachers/trained"))
    arguments = parser.parse_args()
    for name in MODELS:
        pack(arguments.trained / name, Path(resolve_model(f"embedded:{name}")))


if __name__ == "__main__":
    main()
