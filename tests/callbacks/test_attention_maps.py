import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sea.callbacks import AttentionMapLogger
from lightning_sea.recorder import AttentionRecorder
from lightning_sea.visualization import attention_maps, attention_matrices
from sea_kernels import estimation_loss, teacher_statistics

SMALL = {"k": 6, "predictor_length": 32, "first_look_ratio": 1, "average_context": "mean"}
FAR = {**SMALL, "average_context": "far", "first_look_ratio": 2, "second_look_width": 1}


def records(module, batch):
    found = []
    for model in (module.teacher, module.student):
        with AttentionRecorder(model) as recorder, torch.no_grad():
            model(**batch)
        found.append(recorder.records)
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("knobs", [SMALL, FAR])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_result_map_times_the_values_is_the_layers_output(family, knobs, distiller, loader):
    module = distiller(family, **knobs)
    (batch,) = loader([[48, 31]])
    for teacher, student in records(module, batch):
        for item, length in enumerate((48, 31)):
            maps = attention_matrices(teacher, student, head=3, item=item)
            group = 3 // (student.query.shape[1] // student.value.shape[1])
            expected = student.context[item, :length, 3]
            torch.testing.assert_close(maps["result"] @ student.value[item, group, :length], expected)
            expected = teacher.context[item, :length, 3]
            torch.testing.assert_close(maps["teacher"] @ teacher.value[item, group, :length], expected)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_rows_are_distributions_over_visible_keys(family, distiller, loader):
    module = distiller(family, **SMALL)
    (batch,) = loader([[31, 48]])
    maps = attention_matrices(*records(module, batch)[0], item=0)
    assert maps.keys() == {"teacher", "estimate", "mask", "result"}
    for name, matrix in maps.items():
        assert matrix.shape == (31, 31)
        assert (matrix >= 0).all()
        if family == "gpt2":
            assert not matrix.triu(1).any(), name
    for name in ("teacher", "estimate"):
        torch.testing.assert_close(maps[name].sum(-1), torch.ones(31))
    assert set(maps["mask"].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("bins", ["aligned", "relative"])
def test_the_estimate_is_what_the_loss_compares(family, bins, distiller, loader):
    module = distiller(family, **SMALL, bins=bins)
    (batch,) = loader([[48, 31]])
    teacher, student = records(module, batch)[1]
    place = {"causal": teacher.causal, "attention_mask": teacher.attention_mask, "layout": bins}
    statistics = teacher_statistics(teacher.query, teacher.key, num_bins=32, scaling=teacher.scaling, **place)
    divergence, _ = estimation_loss(student.estimate.scores, statistics, num_keys=48, **place)
    maps = attention_matrices(teacher, student, head=2, item=1)
    by_hand = torch.special.xlogy(maps["teacher"], maps["teacher"] / maps["estimate"].clamp_min(1e-30)).sum(-1)
    torch.testing.assert_close(by_hand, divergence[1, 2, :31], atol=1e-5, rtol=1e-4)


def test_max_tokens_cuts_the_map_without_changing_it(distiller, loader):
    module = distiller("bert", **SMALL)
    (batch,) = loader([[48]])
    pair = records(module, batch)[1]
    whole, part = attention_matrices(*pair), attention_matrices(*pair, max_tokens=10)
    for name, matrix in part.items():
        torch.testing.assert_close(matrix, whole[name][:10, :10])


def test_left_padding_is_cut_away(distiller, loader):
    module = distiller("llama", **SMALL)
    (batch,) = loader([[31]])
    right = attention_matrices(*records(module, batch)[0])
    flipped = {name: torch.roll(value, 17, dims=1) for name, value in batch.items()}
    flipped["position_ids"] = (flipped["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    left = attention_matrices(*records(module, flipped)[0])
    for name, matrix in left.items():
        torch.testing.assert_close(matrix, right[name], msg=name)


def test_a_figure_from_any_text_leaves_the_models_as_they_were(distiller, loader):
    module = distiller("gpt2", **SMALL)
    module.student.train()
    (batch,) = loader([[48]])
    before = [model.config._attn_implementation for model in (module.student, module.teacher)]
    figure = attention_maps(module.student, module.teacher, batch, layer=1, head=2)
    assert [axes.get_title() for axes in figure.axes] == ["teacher", "estimate", "mask", "result"]
    assert module.student.training
    assert not module.teacher.training
    assert [model.config._attn_implementation for model in (module.student, module.teacher)] == before


@pytest.mark.parametrize("name", ["layer", "head", "item"])
def test_an_index_that_does_not_exist_is_named(name, distiller, loader):
    module = distiller("gpt2", **SMALL)
    (batch,) = loader([[48]])
    with pytest.raises(IndexError, match=f"{name} is 9, expected 0 to"):
        attention_maps(module.student, module.teacher, batch, **{name: 9})


def test_a_dense_student_has_nothing_to_draw(distiller, loader):
    module = distiller("gpt2")
    (batch,) = loader([[48]])
    with pytest.raises(ValueError, match="dense"):
        attention_maps(module.student, module.teacher, batch)


def test_validation_writes_one_picture_per_head_to_disk_and_tensorboard(distiller, loader, trainer, tmp_path):
    callback = AttentionMapLogger(layers=(0, 1), heads=(0, 3), max_tokens=32)
    module = distiller("gpt2", **SMALL)
    run = trainer(callback, logger=TensorBoardLogger(tmp_path))
    run.fit(module, loader([[48]] * 2), loader([[48]] * 3))
    assert module.recorded_steps == [("validate", 2)]
    names = [f"layer_{layer:02d}_head_{head:02d}" for layer in (0, 1) for head in (0, 3)]
    assert [path.name for path in callback.written] == [f"{name}_step_000002.png" for name in names]
    for path in callback.written:
        assert Image.open(path).width > 600
    run.logger.experiment.flush()
    images = EventAccumulator(run.logger.log_dir).Reload().Tags()["images"]
    assert sorted(images) == [f"attention/{name}" for name in names]


def test_a_dense_student_writes_nothing(distiller, loader, trainer):
    callback = AttentionMapLogger()
    trainer(callback).validate(distiller("gpt2"), loader([[48]]), verbose=False)
    assert callback.written == []
