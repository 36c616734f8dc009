"""Every shipped configuration is read by the command line's own parser, alone or with the fragments it is made for."""

import functools
import sys
from pathlib import Path

import pytest
import torch

from lightning_sea.cli import SEACLI, run
from lightning_sea.config import SEAConfig
from lightning_sea.data import get_task
from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import OptimizerConfig

ROOT = Path(__file__).parent.parent / "configs"
BASELINES = sorted(ROOT.glob("baselines/*.yaml"))
FRAGMENTS = [*sorted(ROOT.glob("trainer/*.yaml")), ROOT / "glue" / "dense.yaml", *BASELINES]
COMPLETE = sorted(set(ROOT.glob("**/*.yaml")) - set(FRAGMENTS))
GROUPS = {"sea": SEAConfig, "distillation": DistillationConfig, "optimizer": OptimizerConfig}


@pytest.fixture(scope="module")
def read():
    """Reads configuration files, each put behind the one before; builds nothing."""

    class ParsingCLI(SEACLI):
        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    parser = run(["fit", "-c", str(COMPLETE[0])], cli_class=ParsingCLI).parser

    @functools.cache
    def parse(*paths: str):
        arguments = [argument for path in paths for argument in ("-c", str(ROOT / path))]
        return parser.parse_args(["fit", *arguments]).fit

    return parse


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_complete_configurations_parse_and_name_allowed_values(read, path):
    config = read(str(path.relative_to(ROOT)))
    for name, group in GROUPS.items():
        values = config.model.init_args[name]
        if values is not None:
            group(**values.as_dict())  # raises if a value is not allowed
    assert config.data.init_args.tokenizer == config.model.init_args.model
    if path.parent.name == "glue":
        task = config.data.init_args.task
        assert path.stem.removeprefix("minilm_") == task == config.model.init_args.task
        monitor = config.trainer.callbacks[0].init_args.monitor
        assert monitor in {f"val/{metric}" for metric in get_task(task).metrics}


def test_all_nine_tasks_have_a_configuration():
    names = {path.stem for path in (ROOT / "glue").glob("*.yaml")}
    assert names >= {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_fragments_go_behind_a_complete_configuration(read, path):
    alone = read("glue/mnli.yaml")
    together = read("glue/mnli.yaml", str(path.relative_to(ROOT)))
    assert together.as_dict() != alone.as_dict()
    assert together.model.init_args.task == "mnli"
    assert together.trainer.logger.init_args.name == "mnli"


@pytest.mark.parametrize("experiment", ["glue/mnli.yaml", "opt/opt_125m.yaml", "smollm2/smollm2_text.yaml"])
@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_baselines_change_the_method_and_leave_hidden_logit_and_task_losses(read, path, experiment):
    ours, theirs = read(experiment), read(experiment, str(path.relative_to(ROOT)))
    before, after = ours.model.init_args, theirs.model.init_args
    weights = dict.fromkeys(("est_kl", "est_mse", "attn_kl", "attn_mse", "context"), 0.0)
    assert after.distillation.as_dict() == before.distillation.as_dict() | weights
    assert after.optimizer == before.optimizer
    assert theirs.trainer.max_steps == ours.trainer.max_steps
    assert theirs.trainer.logger.init_args.save_dir != ours.trainer.logger.init_args.save_dir
    if path.stem == "dense":
        assert (after.attention, after.teacher) == ("dense", None)
        return
    config = SEAConfig(**after.sea.as_dict())
    assert (after.attention, after.estimator_steps, config.method) == ("sea", 0, path.stem)
    assert config.k == before.sea.k
    longest = theirs.data.init_args.get("seq_len", 0)  # of language models
    assert path.stem != "cosformer" or config.horizon >= longest
    redraws = [callback.class_path.endswith("ProjectionRedraw") for callback in theirs.trainer.callbacks]
    assert any(redraws) or path.stem != "performer"


def test_paper_configurations_are_the_papers_presets(read):
    def values(path: str, name: str):
        return GROUPS[name](**read(path).model.init_args[name].as_dict())

    assert values("glue/mnli.yaml", "sea").replace(upsampling="nearest") == SEAConfig.paper_bert()
    assert values("glue/mnli.yaml", "distillation") == DistillationConfig.paper_glue(num_heads=12)
    assert values("opt/opt_125m.yaml", "sea") == SEAConfig.paper_opt()
    assert values("opt/opt_125m.yaml", "distillation") == DistillationConfig.paper_opt()


@pytest.mark.parametrize("attention", ["sea", "dense"])
@pytest.mark.parametrize("name", ["lm", "classifier"])
def test_demo_configurations_run(name, attention, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sea"])
    monkeypatch.chdir(tmp_path)
    arguments = ["-c", str(ROOT / "demo" / f"{name}.yaml"), "--data.cache_dir", str(tmp_path)]
    arguments += ["--data.batch_size", "1", "--trainer.enable_progress_bar", "false"]
    cli = run(["fit", *arguments, "--model.attention", attention, "--trainer.fast_dev_run", "true"])
    metric = {"lm": "perplexity", "classifier": "accuracy"}[name]
    assert torch.isfinite(cli.trainer.callback_metrics[f"val/{metric}"])
