"""Optimiser groups, the schedule of both stages, and finding idle parameters."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_sea.adapt import convert
from lightning_sea.tasks.optimization import (
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
    parameters_without_gradient,
    schedule_factor,
)


@pytest.fixture
def model(llama_dir, sea):
    return convert(AutoModelForCausalLM.from_pretrained(llama_dir), sea)


def test_groups_hold_every_parameter_once_with_its_rate_and_decay(model):
    groups = {group["name"]: group for group in parameter_groups(model, OptimizerConfig(lr=1e-3, weight_decay=0.2))}
    assert set(groups) == {"base", "base_no_decay", "sea", "sea_no_decay"}
    where = {id(parameter): name for name, group in groups.items() for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters())) == len(where)
    for name, parameter in model.named_parameters():
        group = groups[where[id(parameter)]]
        assert group["lr"] == pytest.approx(1e-2 if ".sea." in name else 1e-3), name
        decays = parameter.dim() > 1
        assert group["weight_decay"] == (0.2 if decays else 0.0), name
        assert not decays or "norm" not in name.rsplit(".", 2)[-2]
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = id(model.model.embed_tokens.weight)
    assert frozen not in {id(p) for group in parameter_groups(model, OptimizerConfig()) for p in group["params"]}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.0, 1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("constant", [0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.0, 1 / 3, 2 / 3, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0]),
    ],
)
def test_schedule_rests_warms_up_and_decays(schedule, expected):
    config = OptimizerConfig(warmup_steps=2, schedule=schedule)
    factors = [schedule_factor(step, start=2, total=8, config=config) for step in range(10)]
    assert factors == pytest.approx(expected)


def test_base_rests_while_the_estimator_trains(model):
    optimizer, schedule = build_optimizer(
        model, OptimizerConfig(lr=1.0, schedule="constant"), estimator_steps=2, total_steps=math.inf
    )
    rates = []
    for _ in range(4):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert [rate["base"] for rate in rates] == [0.0, 0.0, 1.0, 1.0]
    assert [rate["sea"] for rate in rates] == [10.0] * 4
    with pytest.raises(ValueError, match="needs an end"):
        build_optimizer(model, OptimizerConfig(), estimator_steps=0, total_steps=math.inf)


def test_parameters_without_gradient_are_those_that_backward_leaves_alone():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3), "detached": nn.Linear(3, 3)})
    hidden = torch.utils.checkpoint.checkpoint(model["used"], torch.randn(2, 3), use_reentrant=False)
    loss = hidden.sum() + model["detached"](hidden).detach().sum()
    idle = parameters_without_gradient(loss, list(model.parameters()))
    loss.backward()
    assert {id(p) for p in idle} == {id(p) for p in model.parameters() if p.grad is None}
    assert len(idle) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("sea_lr_factor", -1.0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", 2.0),
        ("warmup_steps", -1),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        OptimizerConfig(**{name: value})
