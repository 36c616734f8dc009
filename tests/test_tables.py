"""The quality tables: their configurations, merging of results, and both scripts on models that fit a test."""

import argparse
import dataclasses
import gzip
import json
from pathlib import Path

import glue
import lm_perplexity
import pytest
import tables
import torch
import trainers
from lightning.pytorch import Trainer
from tiny import WORDS, save_bert, save_llama
from transformers import AutoModel

from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import CausalLMModule, GLUEModule

HERE = Path(tables.__file__).parent
NAMES = ("lm_perplexity", "ablations", "rising_k", "designs", "trials", "glue")
RUNS = {name: tables.load_runs(HERE / f"{name}.yaml", None, []) for name in NAMES}
LANGUAGE = [(name, run) for name in ("lm_perplexity", "ablations", "rising_k") for run in RUNS[name]]


@pytest.mark.parametrize(("name", "run"), LANGUAGE)
def test_language_runs_construct_and_test_at_lengths_they_trained_at(name, run):
    settings = RUNS[name][run]
    arguments = lm_perplexity.arguments(settings)  # raises if a value is not allowed
    assert (arguments["attention"] == "dense") == (run == "dense")
    assert arguments["estimator_steps"] < settings["steps"]
    losses = arguments["distillation"] or DistillationConfig()
    assert not arguments["estimator_steps"] or losses.est_kl or losses.est_mse
    assert max(length for part in settings["tests"] for length in part["seq_len"]) <= settings["train_len"]
    assert settings["train_len"] % max(32, arguments["sea"].predictor_length if arguments["sea"] else 0) == 0


def compared_with(run):
    """The run that an ablation differs from in one thing."""
    if run == "two_looks_window":  # the far field has no kernels for windows, so this one goes without it
        return "two_looks_no_far_field"
    return "two_looks" if run.startswith("two_looks_") else "sea"


def test_every_ablation_changes_one_thing_of_the_run_that_it_is_compared_with():
    """Two looks themselves take fewer keys and a larger first look; a decoder comes with the losses that reach it."""
    runs = RUNS["ablations"]
    texts = [settings["variant"] for settings in runs.values()]
    assert len(set(texts)) == len(texts)
    for run in set(runs) - {"sea"}:
        ours, theirs = (lm_perplexity.arguments(runs[name]) for name in (run, compared_with(run)))
        changed = {name for name in ours if ours[name] != theirs[name]}
        if run.endswith("head_budgets"):
            assert runs[run]["head_budgets"]
            assert not changed
        else:
            assert changed
            assert not runs[run]["head_budgets"]
            allowed = {"estimator_steps", "distillation"} | ({"sea"} if run.startswith("decoder") else set())
            assert len(changed) == 1 or changed <= allowed or run == "dense"
        if "sea" in changed and run != "dense":
            pairs = zip(*(dataclasses.asdict(each["sea"]).items() for each in (ours, theirs)), strict=True)
            assert sum(our != their for our, their in pairs) == (2 if run == "two_looks" else 1)
        same = ("seed", "steps", "train_len", "batch_size", "tests", "optimizer")
        assert [runs[run][name] for name in same] == [runs["sea"][name] for name in same]


@pytest.mark.parametrize("run", RUNS["glue"])
def test_classification_runs_construct(run):
    settings = RUNS["glue"][run]
    assert run == f"{settings['task']}_{settings['seed']}"
    found = {label: glue.arguments(method or {}, settings) for label, method in settings["methods"].items()}
    assert [label for label, each in found.items() if each["attention"] == "dense"] == ["dense"]
    assert len({each["optimizer"] for each in found.values()}) == 1
    assert all(each["estimator_steps"] < settings["steps"] for each in found.values())
    assert glue.sizes(found["sea_13"]["sea"]) == {"k": 13, "predictor_length": 128}
    assert glue.sizes(found["window"]["sea"]) == {"k": 25, "predictor_length": None}
    assert glue.sizes(found["performer"]["sea"]) == glue.sizes(None) == {"k": None, "predictor_length": None}


@pytest.mark.parametrize("name", RUNS)
def test_overrides_reach_every_run_but_not_what_a_run_has_turned_off(name):
    changed = tables.load_runs(HERE / f"{name}.yaml", None, ["steps=7", "optimizer.lr=0.5", "distillation.task=0.25"])
    assert list(changed) == list(RUNS[name])
    for run, settings in changed.items():
        assert settings["steps"] == 7
        assert settings["optimizer"] == RUNS[name][run]["optimizer"] | {"lr": 0.5}
        before = RUNS[name][run]["distillation"]
        assert settings["distillation"] == (None if before is None else before | {"task": 0.25})


def test_a_run_that_is_cut_short_leaves_its_rows_to_the_next_call(tmp_path):
    output = tmp_path / "table.json"

    def run(name, settings, options):
        yield {"value": 1}
        yield {"value": 2}
        raise KeyboardInterrupt

    command = tables.parser("", "glue.yaml")
    with pytest.raises(KeyboardInterrupt):
        tables.main(command.parse_args(["--output", str(output), "--worker", "rte_1"]), run)
    assert not output.exists()
    tables.merge_parts(output)
    assert [(row["run"], row["value"]) for row in json.loads(output.read_text())["rows"]] == [
        ("rte_1", 1),
        ("rte_1", 2),
    ]


def test_a_run_that_ends_leaves_alone_what_others_have_written_so_far(tmp_path):
    output = tmp_path / "table.json"
    for run in ("a", "b"):
        tables.write_results(tmp_path / f"table.{run}.part.json", [{"run": run}])
    tables.merge_parts(output, "a")
    assert [row["run"] for row in json.loads(output.read_text())["rows"]] == ["a"]
    assert (tmp_path / "table.b.part.json").exists()


def test_runs_are_picked_by_name():
    assert list(tables.load_runs(HERE / "glue.yaml", ["rte_2", "cola_1"], [])) == ["cola_1", "rte_2"]
    with pytest.raises(ValueError, match=r"--only names \['rte_9'\]"):
        tables.load_runs(HERE / "glue.yaml", ["rte_1", "rte_9"], [])


def test_new_rows_replace_those_of_their_run_and_leave_the_others(tmp_path):
    output = tmp_path / "table.json"
    rows = [{"run": "a", "value": 1}, {"run": "b", "value": 2}, {"run": "b", "value": 3}]
    tables.write_results(output, rows)
    tables.write_results(tmp_path / "table.b.part.json", [{"run": "b", "value": 4}])
    tables.write_results(tmp_path / "table.c.part.json", [{"run": "c", "value": 5}])
    tables.merge_parts(output)
    content = json.loads(output.read_text())
    assert [(row["run"], row["value"]) for row in content["rows"]] == [("a", 1), ("b", 4), ("c", 5)]
    assert set(content) == {"device", "versions", "commit", "command", "rows"}
    assert list(tmp_path.iterdir()) == [output], "parts that were merged are gone"


@pytest.fixture
def language_settings() -> dict:
    settings = RUNS["lm_perplexity"]["sea"] | {"train_len": 64, "steps": 2, "sea": {"k": 8, "predictor_length": 32}}
    tests = [{"k": [8, 16], "seq_len": [32, 64]}, {"k": [8, 12], "seq_len": [64], "sparsity_batches": 0}]
    return settings | {"tests": tests, "untrained_tests": [{"k": [8], "seq_len": [32]}], "sparsity_batches": 1}


@pytest.fixture
def language_options(tmp_path) -> argparse.Namespace:
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": " ".join(WORDS[3:] * 10)}) + "\n")
    for split in ("validation", "test"):
        (tmp_path / f"{split}.tokens").write_text(" ".join(WORDS[3:] * 3) + "\n")
    return argparse.Namespace(model=save_llama(tmp_path / "model"), text=tmp_path, split="test")


def test_a_language_run_tests_every_pair_once_before_and_after(language_settings, language_options, monkeypatch):
    used, places, test = [], [], Trainer.test

    def watched(trainer, module, *args, **kwargs):
        found = test(trainer, module, *args, **kwargs)
        used.append(trainer)
        places.append(module.device)
        return found

    monkeypatch.setattr(Trainer, "test", watched)
    rows = list(lm_perplexity.run("sea", language_settings, language_options))
    assert set(places) == {trainers.device()}, "the model stays where it is"
    assert len(set(map(id, used))) == 1, "one trainer for all tests"
    pairs = [(row["steps"], row["k"], row["seq_len"]) for row in rows]
    assert pairs == [(0, 8, 32), (2, 8, 32), (2, 8, 64), (2, 16, 32), (2, 16, 64), (2, 12, 64)]
    assert [("kept_mass" in row) for row in rows] == [True] * 5 + [False]
    assert rows[0]["value"] != rows[1]["value"]
    assert rows[3]["keys_per_row"] > rows[1]["keys_per_row"]
    assert all({"train_seconds", "train_loss"} <= row.keys() for row in rows[1:])


@pytest.mark.parametrize(("name", "run"), LANGUAGE)
def test_language_runs_train_and_are_tested(name, run, language_options):
    settings = RUNS[name][run]
    sea = settings.get("sea") and settings["sea"] | ({"k": 32} if "k" in settings["sea"] else {})
    settings |= {"sea": sea, "train_len": 64, "steps": 2, "estimator_steps": min(1, settings["estimator_steps"])}
    settings |= {"tests": [{"seq_len": [64]}], "untrained_tests": []}
    (row,) = lm_perplexity.run(run, settings, language_options)
    assert 1 < row["value"] < 1000
    assert row["steps"] == 2


def test_a_run_that_keeps_its_k_is_tested_at_that_alone(language_settings, language_options):
    settings = language_settings | {"changes_k": False, "steps": 0, "sparsity_batches": 0}
    settings["untrained_tests"] = [{"k": [4, 8], "seq_len": [32]}, {"k": [16], "seq_len": [64]}, {"seq_len": [64]}]
    rows = list(lm_perplexity.run("sea", settings, language_options))
    assert [(row["k"], row["seq_len"]) for row in rows] == [(8, 32), (8, 64)]
    dense = settings | {"sea": None, "distillation": None}
    rows = list(lm_perplexity.run("dense", dense, language_options))
    assert [(row["method"], row["k"], row["seq_len"]) for row in rows] == [("teacher", None, 32), ("teacher", None, 64)]


def test_steps_keep_as_many_keys_as_they_draw(language_settings, language_options, monkeypatch):
    def training_step(self, batch, batch_idx):
        trained.append(self.student.sea_conversion.config.k)
        return step(self, batch, batch_idx)

    step, trained = CausalLMModule.training_step, []
    monkeypatch.setattr(CausalLMModule, "training_step", training_step)
    settings = language_settings | {
        "train_k": [4, 16, 32],
        "steps": 5,
        "tests": [{"seq_len": [32]}],
        "untrained_tests": [],
    }
    (row,) = lm_perplexity.run("sea", settings, language_options)
    assert set(trained) <= {4, 16, 32}
    assert len(set(trained)) > 1
    assert row["k"] == settings["sea"]["k"], "tests keep the k of the run"


@pytest.fixture
def classification_options(tmp_path) -> argparse.Namespace:
    """A model without a head, and SST-2 in its official layout, few rows."""
    model = save_bert(tmp_path / "model")
    AutoModel.from_pretrained(model).save_pretrained(model)
    (tmp_path / "SST-2").mkdir()
    for name, size in (("train", 24), ("dev", 8)):
        rows = [f"{' '.join(WORDS[3 + number % 9 : 20])}\t{number % 2}" for number in range(size)]
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return argparse.Namespace(model=model, glue=tmp_path, imdb=None, methods=None)


def test_methods_share_teacher_and_batches_and_seeds_do_not(classification_options, monkeypatch):
    batches, heads, exports, encoded = [], [], [], []

    def training_step(self, batch, batch_idx):
        batches.append(batch["idx"].tolist())
        return step(self, batch, batch_idx)

    def on_fit_start(self):
        heads.append(next(p for name, p in self.student.named_parameters() if "classifier" in name).detach().clone())
        return start(self)

    step, start = GLUEModule.training_step, GLUEModule.on_fit_start
    export, load = GLUEModule.export, glue.GLUEDataModule.load_split
    monkeypatch.setattr(GLUEModule, "training_step", training_step)
    monkeypatch.setattr(GLUEModule, "on_fit_start", on_fit_start)
    monkeypatch.setattr(GLUEModule, "export", lambda self, folder: exports.append(folder) or export(self, folder))
    monkeypatch.setattr(glue.GLUEDataModule, "load_split", lambda self, name: encoded.append(name) or load(self, name))
    methods = {
        "dense": None,
        "sea_4": {"method": "sea", "sea": {"k": 4}},
        "window": {"sea": {"method": "window", "k": 8}},
    }
    settings = RUNS["glue"]["sst2_1"] | {"batch_size": 8, "max_length": 16, "teacher_steps": 2, "steps": 2}
    settings |= {"methods": methods, "sea": settings["sea"] | {"predictor_length": 32}}
    rows = list(glue.run("sst2_1", settings, classification_options))
    assert [(row["method"], row.get("variant")) for row in rows] == [
        ("teacher", None),
        ("dense", "dense"),
        ("sea", "sea_4"),
        ("window", "window"),
    ]
    assert [row["k"] for row in rows[1:]] == [None, 4, 8]
    assert "kept_mass" in rows[2]
    assert batches[2:4] == batches[4:6] == batches[6:8]
    assert len(batches) == 8
    assert len(exports) == 1
    assert sorted(encoded) == ["train", "train", "validation", "validation"], "once to fill the cache, once to read it"
    for head in heads[2:]:
        assert torch.equal(head, heads[1]), "all methods start from one teacher"
    assert not torch.equal(heads[0], heads[1]), "the teacher learned"
    classification_options.methods = ["window"]
    (row,) = glue.run("sst2_1", settings, classification_options)
    assert row["variant"] == "window"
    assert batches[8:12] == batches[:2] + batches[2:4], "a method by itself has the same teacher"
    del batches[8:12], heads[4:6]
    classification_options.methods = None
    list(glue.run("sst2_2", settings | {"seed": 2, "methods": {}}, classification_options))
    assert batches[8:] != batches[:2]
    assert not torch.equal(heads[4], heads[0])


def test_rows_of_several_k_stand_in_a_file_of_their_own(tmp_path):
    rows = [
        {"run": "sea", "k": 64, "steps": 5, "value": 1.0},
        {"run": "sea", "k": 32, "steps": 5, "value": 2.0},
        {"run": "sea", "k": 32, "steps": 0, "value": 3.0},
        {"run": "window", "k": 64, "steps": 5, "value": 4.0},
    ]
    output = tmp_path / "lm_perplexity.json"
    tables.write_report(output, {"commit": "some", "rows": rows[3:]})
    lm_perplexity.write_dynamic_k(output)
    assert not (tmp_path / "dynamic_k.json").exists()
    tables.write_report(output, {"commit": "some", "rows": rows})
    lm_perplexity.write_dynamic_k(output)
    assert json.loads((tmp_path / "dynamic_k.json").read_text()) == {"commit": "some", "rows": rows[:2]}


def test_the_committed_rows_of_several_k_are_those_of_the_language_models(tmp_path):
    committed = tables.ROOT / "benchmarks" / "results"
    output = tmp_path / "lm_perplexity.json"
    output.write_text((committed / "lm_perplexity.json").read_text())
    lm_perplexity.write_dynamic_k(output)
    assert (tmp_path / "dynamic_k.json").read_text() == (committed / "dynamic_k.json").read_text()
