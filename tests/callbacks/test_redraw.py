import itertools

import pytest
import torch

from lightning_sea.adapt import sea_layers
from lightning_sea.callbacks import ProjectionRedraw

FEATURES = {"k": 6, "predictor_length": 32, "decoder": "conv", "redraw_interval": 2}


class Watch(ProjectionRedraw):
    """Keeps every step's projections, after the draw."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.seen.append([layer.features.projection.clone() for layer in sea_layers(pl_module.student)])


def run(distiller, loader, trainer, seed=0):
    watch = Watch(seed)
    trainer(watch).fit(distiller("gpt2", **FEATURES), loader([[48]] * 5))
    return watch.seen


def test_features_change_every_interval_and_only_then(distiller, loader, trainer):
    seen = run(distiller, loader, trainer)
    for layer in range(2):
        same = [torch.equal(a[layer], b[layer]) for a, b in itertools.pairwise(seen)]
        assert same == [True, False, True, False]
    assert not torch.equal(seen[2][0], seen[2][1])


def test_the_draw_depends_on_seed_and_step_alone(distiller, loader, trainer):
    first = run(distiller, loader, trainer)
    torch.rand(17)
    second, other = run(distiller, loader, trainer), run(distiller, loader, trainer, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first[4], second[4], strict=True))
    assert not torch.equal(first[4][0], other[4][0])


@pytest.mark.parametrize("knobs", [{}, {"k": 6, "predictor_length": 32, "decoder": "none"}])
def test_models_without_features_are_left_alone(knobs, distiller, loader, trainer):
    trainer(ProjectionRedraw()).fit(distiller("gpt2", **knobs), loader([[48]] * 2))


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        ProjectionRedraw(seed=-1)
