import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sea.callbacks import SparsityMonitor
from lightning_sea.callbacks.sparsity import layer_sparsity
from lightning_sea.recorder import AttentionRecorder
from sea_kernels.masks import kept_keys
from sea_kernels.spans import row_spans

SMALL = {"k": 6, "predictor_length": 32, "first_look_ratio": 1, "average_context": "mean"}


def records(module, batch):
    found = []
    for model in (module.teacher, module.student):
        with AttentionRecorder(model) as recorder, torch.no_grad():
            model(**batch)
        found.append(recorder.records)
    return list(zip(*found, strict=True))


def dense_numbers(teacher, student):
    """The same sums from T x T maps."""
    spans = row_spans(
        student.query.shape[0],
        student.query.shape[2],
        student.key.shape[2],
        causal=student.causal,
        attention_mask=student.attention_mask,
    )
    keys = student.key.shape[2]
    key = torch.arange(keys) - spans.start[:, None]
    visible = ((key[:, None] >= 0) & (key[:, None] < spans.length[..., None]))[:, None]
    groups = teacher.query.shape[1] // teacher.key.shape[1]
    scores = teacher.scaling * teacher.query @ teacher.key.repeat_interleave(groups, 1).transpose(-1, -2)
    attention = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    keep = kept_keys(student.estimate.mask, spans, keys) & visible
    real = (spans.length > 0)[:, None].expand(-1, student.query.shape[1], -1)
    rows = real.sum()
    return {
        "keys_per_query": keep.sum() / rows,
        "density": keep.sum() / visible.expand_as(keep).sum(),
        "kept_mass": (attention * keep).sum() / rows,
        "prob_scale": student.estimate.prob_scale[real].mean(),
        "mix_scale": student.estimate.mix_scale[real].mean(),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_numbers_are_those_of_the_dense_maps(family, distiller, loader):
    module = distiller(family, **SMALL)
    (batch,) = loader([[48, 31, 7]])
    for teacher, student in records(module, batch):
        found = layer_sparsity(teacher, student).means()
        expected = dense_numbers(teacher, student)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value == pytest.approx(float(expected[name]), rel=1e-5), name


def test_a_far_field_has_no_gates_to_log(distiller, loader):
    module = distiller("llama", **{**SMALL, "average_context": "far"})
    (batch,) = loader([[48, 31]])
    for teacher, student in records(module, batch):
        found = layer_sparsity(teacher, student).means()
        assert found.keys() == {"keys_per_query", "density", "kept_mass", "pooled_per_query"}
        # Bins of one and two keys: a row's softmax holds each of its bins once, by its keys or pooled.
        length = torch.cat([torch.arange(1, 49), torch.arange(1, 32)]).float()
        bins = torch.where(length <= 32, length, ((length + 1) / 2).floor())
        assert found["pooled_per_query"] < float(bins.mean()) < found["pooled_per_query"] + found["keys_per_query"]


def test_everything_kept_is_density_one_and_all_of_the_mass(distiller, loader):
    module = distiller("gpt2", k=64, predictor_length=32)
    (batch,) = loader([[48, 20]])
    for teacher, student in records(module, batch):
        found = layer_sparsity(teacher, student).means()
        assert found["density"] == 1.0
        assert found["kept_mass"] == pytest.approx(1.0, abs=1e-6)
        assert found["keys_per_query"] == pytest.approx((48 * 49 + 20 * 21) / 2 / 68)


def test_epoch_means_are_exact_over_uneven_batches(distiller, loader, trainer):
    module = distiller("gpt2", **SMALL)
    batches = loader([[48, 48], [9]])
    run = trainer(SparsityMonitor())
    (found,) = run.test(module, batches, verbose=False)
    layers = [[layer_sparsity(*pair) for pair in records(module, batch)] for batch in batches]
    for index in range(2):
        first, second = (batch[index] for batch in layers)
        mass = (first.kept_mass + second.kept_mass) / (first.rows + second.rows)
        assert found[f"test/layer_{index:02d}/kept_mass"] == pytest.approx(mass, rel=1e-5)
    total = [total for batch in layers for total in batch]
    density = sum(t.kept for t in total) / sum(t.visible for t in total)
    assert found["test/density"] == pytest.approx(density, rel=1e-5)


def test_training_looks_at_logged_steps_only(distiller, loader, trainer, tmp_path):
    module = distiller("gpt2", **SMALL)
    run = trainer(SparsityMonitor(), logger=CSVLogger(tmp_path), log_every_n_steps=3)
    run.fit(module, loader([[48]] * 7))
    assert module.recorded_steps == [("train", 2), ("train", 5)]
    assert {"train/density", "train/layer_01/kept_mass"} <= run.logged_metrics.keys()


def test_without_a_logger_training_records_nothing(distiller, loader, trainer):
    module = distiller("gpt2", **SMALL)
    trainer(SparsityMonitor(), log_every_n_steps=1).fit(module, loader([[48]] * 2))
    assert module.recorded_steps == []


def test_eval_batches_limits_what_evaluation_looks_at(distiller, loader, trainer):
    module = distiller("gpt2", **SMALL)
    trainer(SparsityMonitor(eval_batches=2)).validate(module, loader([[48]] * 4), verbose=False)
    assert len(module.recorded_steps) == 2


def test_a_dense_student_logs_nothing(distiller, loader, trainer):
    run = trainer(SparsityMonitor())
    run.validate(distiller("gpt2"), loader([[48]]), verbose=False)
    assert not run.callback_metrics


def test_per_layer_can_be_left_out(distiller, loader, trainer):
    run = trainer(SparsityMonitor(per_layer=False))
    run.validate(distiller("gpt2", **SMALL), loader([[48]]), verbose=False)
    assert set(run.callback_metrics) == {
        f"val/{name}" for name in ("keys_per_query", "density", "kept_mass", "prob_scale", "mix_scale")
    }


def test_a_negative_number_of_batches_is_refused():
    with pytest.raises(ValueError, match="eval_batches is -1, expected at least 0"):
        SparsityMonitor(eval_batches=-1)
