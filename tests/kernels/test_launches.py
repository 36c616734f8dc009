"""How many kernels a layer launches in a step of distillation: at short lengths launches take most of its time."""

from collections import Counter

import pytest
import torch

import sea_kernels as ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")

MOST_LAUNCHES = 32
HEADS, ROWS, WIDTH, K = 2, 40, 16, 32
PLACE = {"causal": True, "backend": "triton"}
BINS = {"num_bins": K, "scaling": 0.25, **PLACE}


@pytest.fixture
def launches(monkeypatch) -> Counter:
    """Counts kernels by name in place of running them."""
    from triton.runtime.interpreter import GridExecutor

    counts = Counter()
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: counts.update([self.fn.__name__]))
    return counts


def test_launches_of_a_layer_in_a_step_of_distillation(launches):
    query, key, value = (torch.zeros(1, HEADS, ROWS, WIDTH, requires_grad=True) for _ in range(3))
    weights = {name: torch.ones(HEADS, requires_grad=True) for name in ("mean_weight", "bound_weight")}
    centre, log_sum = torch.zeros(HEADS, WIDTH, requires_grad=True), torch.zeros(1, HEADS, ROWS)
    teacher = query.detach(), key.detach()

    scores = ops.weighted_scores(query, key, layout="aligned", **weights, **BINS)
    mask = ops.pooled_selection(query, key, k=8, keep_first=True, keep_own=True, **weights, **BINS)
    context = ops.far_field_attention(query, key, value, mask, centre=centre, scaling=0.25, **PLACE).transpose(1, 2)
    statistics = ops.teacher_statistics(*teacher, layout="aligned", log_sum=log_sum, **BINS)
    losses = [
        *ops.estimation_loss(scores, statistics, layout="aligned", **PLACE),
        *ops.attention_loss(*teacher, query, key, teacher_scaling=0.25, scaling=0.25, teacher_log_sum=log_sum, **PLACE),
        ops.state_loss([torch.zeros_like(context)], [context], relative=True, backend="triton"),
        ops.state_loss([value.detach()], [2 * value], relative=True, backend="triton"),
    ]
    sum(loss.mean() for loss in losses).backward()
    assert sum(launches.values()) <= MOST_LAUNCHES, launches
