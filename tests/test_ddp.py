"""Two processes (gloo, CPU) train like one process with twice the batch and measure like one.

Run as a script, this file prints what two processes and one process got; the test starts it in a fresh interpreter,
because processes can only be forked before autograd has run.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ESTIMATOR_STEPS, STEPS, ITEMS = 2, 5, 13  # an odd number of items: the last training batch is dropped


def run(kind: str, directory: str, processes: int, batch_size: int) -> dict[str, object]:
    """Weights after training over both stages, and the metric over all items."""
    from lightning.pytorch import Trainer
    from tiny import RandomData

    from lightning_sea.config import SEAConfig
    from lightning_sea.tasks import CausalLMModule, GLUEModule, OptimizerConfig

    torch.manual_seed(0)
    arguments = {
        "model": directory,
        # no pooled keys, no far field: with a bin per key either is exact, and Adam makes steps of what rounding leaves
        "sea": SEAConfig(
            k=4, predictor_length=32, decoder="conv", pooling="none", first_look_ratio=1, average_context="mean"
        ),
        "estimator_steps": ESTIMATOR_STEPS,
        "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup_steps=1, schedule="cosine"),
    }
    module = CausalLMModule(**arguments) if kind == "lm" else GLUEModule(task="sst2", **arguments)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        precision="32-true",
        max_steps=STEPS,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, RandomData(causal=kind == "lm", size=ITEMS, batch_size=batch_size))
    metric = "val/perplexity" if kind == "lm" else "val/accuracy"
    return {"metric": float(trainer.callback_metrics[metric]), "weights": module.state_dict()}


def main() -> None:
    from tiny import save_bert, save_llama

    with tempfile.TemporaryDirectory() as folder:
        saved = {"lm": save_llama(Path(folder) / "llama"), "classifier": save_bert(Path(folder) / "bert")}
        two = {kind: run(kind, directory, processes=2, batch_size=3) for kind, directory in saved.items()}
        one = {kind: run(kind, directory, processes=1, batch_size=6) for kind, directory in saved.items()}
        start = {kind: run(kind, directory, processes=1, batch_size=3) for kind, directory in saved.items()}
    result = {}
    for kind in saved:
        pairs = {name: (two[kind]["weights"][name], value) for name, value in one[kind]["weights"].items()}
        far = {name: (start[kind]["weights"][name], value) for name, value in one[kind]["weights"].items()}
        result[kind] = {
            "largest_difference": max(float((a - b).abs().max()) for a, b in pairs.values()),
            "difference_to_half_the_batch": max(float((a - b).abs().max()) for a, b in far.values()),
            "worst": sorted(((float((a - b).abs().max()), name) for name, (a, b) in pairs.items()), reverse=True)[:5],
            "metrics": [two[kind]["metric"], one[kind]["metric"]],
        }
    print("RESULT", json.dumps(result))


@pytest.fixture(scope="module")
def results() -> dict:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_two_processes_give_the_weights_of_one_with_twice_the_batch(results, kind):
    assert results[kind]["difference_to_half_the_batch"] > 1e-2
    # rounding, which Adam magnifies where a gradient is small
    assert results[kind]["largest_difference"] < 1e-4, results[kind]["worst"]


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_metrics_are_exact_for_an_odd_number_of_items(results, kind):
    two, one = results[kind]["metrics"]
    assert two == pytest.approx(one, rel=1e-6)


if __name__ == "__main__":
    main()
