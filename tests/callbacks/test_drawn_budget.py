import pytest
from lightning.pytorch import Callback

from lightning_sea.callbacks import DrawnBudget

KNOBS = {"k": 6, "predictor_length": 32}


def budget(pl_module):
    return pl_module.student.sea_conversion.config.k


class Watch(Callback):
    """The k of every forward pass of a training step, and between steps; put behind the callback that it watches."""

    def __init__(self):
        self.steps, self.between = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(budget(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.between.append(budget(pl_module))


def run(distiller, loader, trainer, steps=8, **options):
    module, watch = distiller("gpt2", **KNOBS), Watch()
    trainer(DrawnBudget([3, 9, 12], **options), watch).fit(module, loader([[48]] * steps))
    assert budget(module) == 6
    assert set(watch.between) == {6}
    return watch.steps


def test_every_step_draws_and_the_configured_budget_comes_back(distiller, loader, trainer):
    steps = run(distiller, loader, trainer)
    assert set(steps) == {3, 9, 12}


def test_the_draw_depends_on_seed_and_step_alone(distiller, loader, trainer):
    first = run(distiller, loader, trainer)
    assert run(distiller, loader, trainer, steps=5) == first[:5]
    assert run(distiller, loader, trainer, seed=1) != first


def test_a_step_that_fails_gives_the_configured_budget_back(distiller, loader, trainer, monkeypatch):
    module = distiller("gpt2", **KNOBS)

    def fail(*args):
        assert budget(module) == 9
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(module, "training_step", fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        trainer(DrawnBudget([9])).fit(module, loader([[48]]))
    assert budget(module) == 6


def test_a_dense_model_is_left_alone(distiller, loader, trainer):
    trainer(DrawnBudget([9])).fit(distiller("gpt2"), loader([[48]]))


@pytest.mark.parametrize("choices", [[], [4, 0]])
def test_choices_out_of_range_are_refused(choices):
    with pytest.raises(ValueError, match=r"choices is .*, expected at least one k"):
        DrawnBudget(choices)
