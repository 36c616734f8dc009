"""The two stages, the dense mode, checkpoints, resuming, precision and records, on tiny random models."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from tiny import RandomData

from lightning_sea import adapt
from lightning_sea.config import SEAConfig
from lightning_sea.distillation import DistillationConfig
from lightning_sea.tasks import CausalLMModule, GLUEModule, OptimizerConfig

NAMES = ("est_kl", "est_mse", "attn_kl", "attn_mse", "context", "hidden", "logit", "task")
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, schedule="constant")


def build(kind: str, directory: str, **arguments):
    torch.manual_seed(0)  # SEA's own parameters start at random
    arguments = {"optimizer": OPTIMIZER, **arguments}
    if kind == "lm":
        return CausalLMModule(model=directory, **arguments)
    return GLUEModule(model=directory, task="sst2", **arguments)


def fit(module, data, steps: int, tmp_path, **options) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "limit_val_batches": 0,
    }
    trainer = Trainer(**{**defaults, **options})
    seed_everything(3)
    trainer.fit(module, data)
    return trainer


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(params=["lm", "classifier"])
def task(request, bert_dir, llama_dir) -> tuple[str, str, RandomData]:
    causal = request.param == "lm"
    return request.param, llama_dir if causal else bert_dir, RandomData(causal=causal)


class Losses(Callback):
    """Keeps what the module logs in every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_first_stage_moves_sea_alone_and_second_stage_everything(task, sea, tmp_path):
    kind, directory, data = task
    module = build(kind, directory, sea=sea, estimator_steps=3)
    start = weights(module)
    fit(module, data, 3, tmp_path)
    middle = weights(module)
    moved = changed(start, middle)
    assert moved
    assert all(".sea." in name for name in moved)
    assert not any("gates" in name for name in moved)  # the estimate's loss does not depend on the gates

    module = build(kind, directory, sea=sea, estimator_steps=3)
    module.load_state_dict(start)
    fit(module, data, 5, tmp_path)
    moved = changed(start, weights(module))
    trained = {name for name, parameter in module.named_parameters()}
    # rows of embeddings may see no token, but every parameter as a whole must have moved
    assert trained - moved == set()


@pytest.mark.parametrize("estimator_steps", [0, 2])
def test_a_frozen_base_stays_and_all_of_sea_trains(task, sea, tmp_path, estimator_steps):
    kind, directory, data = task
    module = build(kind, directory, sea=sea, estimator_steps=estimator_steps, freeze_base=True)
    start = weights(module)
    trainer = fit(module, data, 4, tmp_path)
    own = {name for name, _ in module.named_parameters() if ".sea." in name}
    assert changed(start, weights(module)) == own
    assert {group["name"] for group in trainer.optimizers[0].param_groups} <= {"sea", "sea_no_decay"}
    assert all(parameter.grad is None for name, parameter in module.named_parameters() if name not in own)


def test_estimator_and_whole_student_learn(task, sea, tmp_path):
    kind, directory, data = task
    for estimator_steps, key in ((20, "train/est_kl"), (0, "train/loss")):
        losses = Losses()
        # no pooled keys and no far field: with a bin for every key either gives the teacher's attention from the start
        paper = sea.replace(pooling="none", first_look_ratio=1, average_context="mean")
        module = build(kind, directory, sea=paper, estimator_steps=estimator_steps)
        data.batch_size = len(data.items)  # the same items in every step
        fit(module, data, 20, tmp_path, callbacks=[losses])
        assert losses.steps[-1][key] < 0.8 * losses.steps[0][key]


def test_both_stages_start_from_the_same_estimation_loss(task, sea, tmp_path):
    kind, directory, data = task
    seen = []
    for estimator_steps in (1, 0):
        losses = Losses()
        # one SEA layer, the first: before any step its queries, keys and values are the teacher's in both stages
        module = build(kind, directory, sea=sea, layers=[0], estimator_steps=estimator_steps)
        fit(module, data, 1, tmp_path, callbacks=[losses])
        seen.append(losses.steps[0])
    first, second = seen
    assert set(first) == {"train/loss", "train/est_kl", "train/est_mse"}
    assert set(second) == {f"train/{name}" for name in ("loss", *NAMES)}
    assert first["train/est_kl"] == pytest.approx(second["train/est_kl"], rel=1e-5)
    assert first["train/loss"] == pytest.approx(0.1 * first["train/est_kl"] + first["train/est_mse"], rel=1e-5)


def test_dense_mode_trains_the_plain_model(task, tmp_path):
    kind, directory, data = task
    losses = Losses()
    module = build(kind, directory, attention="dense", estimator_steps=5)
    start = weights(module)
    data.batch_size = len(data.items)
    fit(module, data, 20, tmp_path, callbacks=[losses])
    assert set(losses.steps[0]) == {"train/loss", "train/task"}
    assert losses.steps[-1]["train/loss"] < losses.steps[0]["train/loss"]
    assert changed(start, weights(module)) == {name for name, _ in module.named_parameters()}
    with pytest.raises(ValueError, match="no teacher"):
        _ = module.teacher


def test_teacher_is_outside_parameters_and_checkpoint_and_stays_frozen(task, sea, tmp_path):
    kind, directory, data = task
    module = build(kind, directory, sea=sea)
    teacher = module.teacher
    assert not any(teacher is child for child in module.modules())
    assert not any("teacher" in name for name in module.state_dict())
    assert not teacher.training
    before = copy.deepcopy(teacher.state_dict())
    fit(module, data, 2, tmp_path)
    assert module.teacher is teacher
    assert not changed(before, teacher.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_killed_run_resumes_to_the_same_weights(task, sea, tmp_path):
    kind, directory, data = task

    class Killed(Exception):
        pass

    class KillAfter(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 7:
                raise Killed

    def module():
        module = build(kind, directory, sea=sea, estimator_steps=3)
        for part in module.student.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.1
        return module

    whole = module()
    fit(whole, data, 9, tmp_path)
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="killed", save_top_k=-1)
    with pytest.raises(Killed):
        fit(module(), data, 9, tmp_path, enable_checkpointing=True, callbacks=[checkpoints, KillAfter()])
    resumed = module()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=9,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    torch.manual_seed(1234)  # another process starts elsewhere
    trainer.fit(resumed, data, ckpt_path=tmp_path / "killed.ckpt")
    assert trainer.global_step == 9
    assert changed(weights(whole), weights(resumed)) == set()


@pytest.mark.parametrize("attention", ["sea", "dense"])
def test_checkpoints_rebuild_the_module_and_measure_the_same(task, sea, tmp_path, attention):
    kind, directory, data = task
    arguments = {"sea": sea, "distillation": DistillationConfig(hidden=1.0)} if attention == "sea" else {}
    module = build(kind, directory, attention=attention, **arguments)
    trainer = fit(module, data, 3, tmp_path)
    (measured,) = trainer.test(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    torch.load(tmp_path / "some.ckpt", weights_only=True)
    loaded = type(module).load_from_checkpoint(tmp_path / "some.ckpt")
    assert loaded.distillation == module.distillation
    assert loaded.optimizer_config == OPTIMIZER
    if attention == "sea":
        assert loaded.student.sea_conversion.config == sea
    assert changed(weights(module), weights(loaded)) == set()
    assert trainer.test(loaded, data, verbose=False) == [measured]


def half_precision():
    """What ``precision="16-mixed"`` sets up on a GPU; a trainer on the CPU has to be given it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=1024.0))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "16-mixed"])
def test_precision_flags_train(task, sea, tmp_path, precision):
    kind, directory, data = task
    losses = Losses()
    module = build(kind, directory, sea=sea, estimator_steps=2)
    before = weights(module)
    options = {"plugins": [half_precision()]} if precision == "16-mixed" else {"precision": precision}
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    trainer = fit(module, data, 4, tmp_path, accelerator=accelerator, callbacks=[losses], **options)
    assert trainer.precision == precision
    teacher = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    assert {parameter.dtype for parameter in module.teacher.parameters()} == {teacher}
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in losses.steps)
    assert changed(before, weights(module))


def test_records_are_there_for_callbacks_when_asked_for_and_gone_afterwards(task, sea, tmp_path):
    kind, directory, data = task

    class Watch(Callback):
        def __init__(self) -> None:
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            pl_module.keep_records = batch_idx != 1

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.seen.append(pl_module.layer_records)

    watch = Watch()
    module = build(kind, directory, sea=sea, layers=[1], estimator_steps=1)
    trainer = fit(module, data, 3, tmp_path, callbacks=[watch])
    assert [len(records) for records in watch.seen] == [2, 0, 2]
    for records in (watch.seen[0], watch.seen[2]):
        assert [student.estimate is not None for _, student in records] == [False, True]
        assert all(teacher.estimate is None for teacher, _ in records)
    assert module.layer_records == []

    batch = next(iter(data.val_dataloader()))
    module.keep_records = True
    module.trainer = trainer
    with torch.no_grad():
        module._evaluation_logits(batch)
    assert len(module.layer_records) == 2
    assert module.layer_records[1][1].estimate is not None


def test_export_and_reload_as_a_student(task, sea, tmp_path):
    kind, directory, data = task
    exported = tmp_path / "exported"
    module = build(kind, directory, sea=sea, export_dir=str(exported))
    trainer = fit(module, data, 2, tmp_path)
    (measured,) = trainer.test(module, data, verbose=False)
    loaded = build(kind, str(exported), teacher=directory)
    assert loaded.student.sea_conversion.config == sea
    assert trainer.test(loaded, data, verbose=False) == [measured]
    other = build(kind, str(exported), sea=sea.replace(k=2))
    assert adapt.sea_layers(other.student)[0].config.k == 2
    with pytest.raises(ValueError, match="'predictor_length': 64"):
        build(kind, str(exported), sea=sea.replace(predictor_length=64))
    with pytest.raises(ValueError, match="dense"):
        build(kind, str(exported), attention="dense")
    with pytest.raises(ValueError, match="SEA model"):
        _ = build(kind, str(exported)).teacher

    dense = build(kind, directory, attention="dense", export_dir=str(tmp_path / "dense"))
    fit(dense, data, 1, tmp_path)
    assert changed(weights(dense), weights(build(kind, str(tmp_path / "dense"), attention="dense"))) == set()


def test_arguments_that_cannot_work_are_named(bert_dir, llama_dir, tmp_path):
    with pytest.raises(ValueError, match="attention is 'sparse'"):
        build("lm", llama_dir, attention="sparse")
    with pytest.raises(ValueError, match="estimator_steps is -1"):
        build("lm", llama_dir, estimator_steps=-1)
    for attention, method in (("dense", "dense"), ("sea", "window")):
        with pytest.raises(ValueError, match=f"freeze_base with '{method}'"):
            build("lm", llama_dir, attention=attention, sea=SEAConfig(method="window", k=8), freeze_base=True)
    with pytest.raises(ValueError, match="est_kl = est_mse = 0"):
        build("lm", llama_dir, estimator_steps=1, distillation=DistillationConfig(est_kl=0.0, est_mse=0.0))
    with pytest.raises(ValueError, match=r"weights of the losses are \{'task': -1\}"):
        DistillationConfig(task=-1)
    module = build("lm", llama_dir, attention="dense", optimizer=OptimizerConfig())
    with pytest.raises(ValueError, match="max_steps or max_epochs"):
        fit(module, RandomData(causal=True), -1, tmp_path, max_epochs=-1)
    long = RandomData(causal=True)
    long.seq_len = 65
    with pytest.raises(ValueError, match=r"seq_len is 65.* 64 positions"):
        fit(build("lm", llama_dir, sea=SEAConfig(k=4, predictor_length=32)), long, 1, tmp_path)


def test_an_untrained_teacher_is_refused(bert_dir, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(bert_dir).save_pretrained(tmp_path / "headless")
    module = GLUEModule(model=str(tmp_path / "headless"), task="sst2")
    with pytest.raises(ValueError, match=r"no trained classifier.bias, classifier.weight"):
        fit(module, RandomData(causal=False), 1, tmp_path)
