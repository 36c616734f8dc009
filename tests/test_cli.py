"""The command line: training, testing a checkpoint in a fresh process, links, precedence of settings, help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import WORDS, save_bert, save_llama

from lightning_sea import cli
from lightning_sea.cli import SEACLI, checkpoint_path, main, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sea"])


def run_in_process(*arguments: str) -> SEACLI:
    return run(list(arguments))


def run_afresh(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sea", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def sentences(tmp_path) -> Path:
    """A labelled data set in the official layout of QNLI: the class follows from one word."""
    folder = tmp_path / "QNLI"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, rows in (("train", 24), ("dev", 11), ("test", 5)):
        lines = ["index\tquestion\tsentence" + ("" if split == "test" else "\tlabel")]
        for index in range(rows):
            words = [WORDS[number] for number in torch.randint(3, len(WORDS), (6,), generator=generator)]
            label = ["entailment", "not_entailment"][WORDS.index(words[0]) % 2]
            lines.append(
                f"{index}\t{' '.join(words[:2])}\t{' '.join(words[2:])}" + ("" if split == "test" else f"\t{label}")
            )
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def config(tmp_path, sentences) -> Path:
    """A configuration as a user writes it: task, tokenizer and labels are said once."""
    settings = {
        "seed_everything": 5,
        "model": {
            "class_path": "GLUEModule",
            "init_args": {
                "model": save_bert(tmp_path / "bert"),
                "sea": {"k": 4, "predictor_length": 32},
                "distillation": {"hidden": 2.0},
                "estimator_steps": 2,
                "optimizer": {"lr": 1e-3},
            },
        },
        "data": {
            "class_path": "GLUEDataModule",
            "init_args": {"task": "qnli", "source": str(sentences), "max_length": 16, "batch_size": 4},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(tmp_path), "filename": "last", "monitor": "val/accuracy"},
                }
            ],
        },
    }
    settings["data"]["init_args"]["cache_dir"] = str(tmp_path / "cache")
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(settings))
    return path


def metric(printed: str, name: str) -> float:
    """The number beside ``name`` in Lightning's table."""
    (line,) = (line for line in printed.splitlines() if name in line)
    return float(line.replace("│", " ").split()[-1])


def test_fit_then_test_and_predict_in_fresh_processes(config, tmp_path, capfd):
    cli = run_in_process("fit", "-c", str(config))
    assert cli.model.task.name == "qnli"
    assert cli.datamodule.tokenizer.get_vocab().keys() == set(WORDS)
    accuracy, checkpoint = float(cli.trainer.callback_metrics["val/accuracy"]), str(tmp_path / "last.ckpt")
    whole = run_afresh("test", "-c", str(config), "--ckpt_path", checkpoint, cwd=tmp_path)
    assert metric(whole, "test/accuracy") == pytest.approx(accuracy, abs=1e-6)

    # only the data are said again: the model's settings come from the checkpoint
    data = json.dumps(json.loads(config.read_text())["data"])
    (tmp_path / "data.yaml").write_text(data)
    out = str(tmp_path / "submission")
    cli = run_in_process(
        *("predict", "--data", str(tmp_path / "data.yaml"), "--ckpt_path", checkpoint),
        *("--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)),
        *("--model.prediction_dir", out),
    )
    assert cli.model.student.sea_conversion.config.k == 4
    assert cli.model.distillation.hidden == 2.0
    lines = Path(out, "QNLI.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", *map(str, range(5))]


def test_what_the_user_says_goes_before_the_checkpoint_and_settings_are_kept_apart(config, tmp_path):
    cli = run_in_process("fit", "-c", str(config), "--trainer.max_steps", "1")
    checkpoint = tmp_path / "some.ckpt"
    cli.trainer.save_checkpoint(checkpoint)
    cli = run_in_process("validate", "-c", str(config), "--ckpt_path", str(checkpoint), "--model.sea.k", "7")
    assert cli.model.student.sea_conversion.config.k == 7
    assert cli.model.student.sea_conversion.config.predictor_length == 32
    assert "k: 4" in (tmp_path / "fit.yaml").read_text()
    assert "k: 7" in (tmp_path / "validate.yaml").read_text()


def test_dense_by_one_option(config):
    cli = run_in_process("fit", "-c", str(config), "--model.attention", "dense", "--trainer.fast_dev_run", "true")
    assert not hasattr(cli.model.student, "sea_conversion")


def test_language_model_from_a_text_file(tmp_path):
    (tmp_path / "train.txt").write_text(" ".join(WORDS[3:] * 10))
    (tmp_path / "validation.txt").write_text(" ".join(WORDS[3:] * 3))
    cli = run_in_process(
        *("fit", "--model", "CausalLMModule", "--model.model", save_llama(tmp_path / "llama")),
        *("--model.sea.k", "4", "--model.sea.predictor_length", "32"),
        *("--data", "TextDataModule", "--data.source", str(tmp_path), "--data.seq_len", "32", "--data.batch_size", "1"),
        *("--data.cache_dir", str(tmp_path / "cache"), "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)),
        *("--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"),
    )
    assert cli.trainer.callback_metrics["val/perplexity"] > 1


def test_checkpoint_path_finds_files_only(tmp_path):
    (tmp_path / "some.ckpt").touch()
    assert checkpoint_path(["test", "--ckpt_path", str(tmp_path / "some.ckpt")]) == str(tmp_path / "some.ckpt")
    assert checkpoint_path(["test", f"--ckpt_path={tmp_path / 'some.ckpt'}", "-c", "x"]) == str(tmp_path / "some.ckpt")
    assert checkpoint_path(["test", "--ckpt_path", "best"]) is None
    assert checkpoint_path(["fit", "-c", "x"]) is None


def test_help_comes_from_the_docstrings(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["fit", "--model.help=GLUEModule"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "optimiser steps of the first stage" in text
    assert "where ``predict`` writes the files" in text
    with pytest.raises(SystemExit):
        run(["fit", "--model.help=GLUEModule", "--model.sea.help"])
    assert "keys that a query keeps on average" in " ".join(capsys.readouterr().out.split())


def test_the_console_script_exits_with_success(monkeypatch):
    """What the entry point returns is handed to ``sys.exit``: anything but None would be reported as a failure."""
    monkeypatch.setattr(cli, "run", lambda: object())
    assert main() is None
