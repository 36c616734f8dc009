"""Optimiser groups and learning-rate schedule of the two stages of training."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..adapt import sea_layers


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay. Norms, biases and other one-dimensional parameters do not decay.

    Attributes:
        lr: learning rate of the pretrained weights.
        sea_lr_factor: SEA's own parameters learn that many times faster.
        weight_decay: of matrices and convolutions.
        beta1: decay rate of AdamW's mean of gradients.
        beta2: decay rate of AdamW's mean of squared gradients.
        warmup_steps: optimiser steps over which a learning rate rises. The pretrained weights warm up when they start
            to train, that is after the estimator's own steps.
        schedule: what follows the warm-up: "linear" or "cosine" decay to 0 at the last step, or "constant".

    Raises:
        ValueError: if a value is not allowed.
    """

    lr: float = 2e-5
    sea_lr_factor: float = 10.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"

    def __post_init__(self) -> None:
        rules = {
            "lr": (self.lr > 0, "above 0"),
            "sea_lr_factor": (self.sea_lr_factor > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "beta1": (0 <= self.beta1 < 1, "at least 0 and below 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and below 1"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "schedule": (self.schedule in ("linear", "cosine", "constant"), "'linear', 'cosine' or 'constant'"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {allowed}")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Every trainable parameter once, in up to four named groups: ``base`` and ``sea``, each with and without decay."""
    own = {id(parameter) for layer in sea_layers(model) for parameter in layer.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"base": [], "base_no_decay": [], "sea": [], "sea_no_decay": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "sea" if id(parameter) in own else "base"
            groups[name if parameter.dim() > 1 else f"{name}_no_decay"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.lr * (config.sea_lr_factor if name.startswith("sea") else 1.0),
            "weight_decay": 0.0 if name.endswith("no_decay") else config.weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def schedule_factor(step: int, *, start: int, total: float, config: OptimizerConfig) -> float:
    """Share of the full learning rate at optimiser step ``step`` (0-based) of a group that trains from ``start`` on."""
    if step < start:
        return 0.0
    done = step - start
    if done < config.warmup_steps:
        return (done + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (done - config.warmup_steps) / max(1.0, total - start - config.warmup_steps))
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, estimator_steps: int, total_steps: float
) -> tuple[Optimizer, LambdaLR]:
    """AdamW over ``parameter_groups`` and its schedule, to be advanced after every optimiser step.

    Args:
        model: the student.
        config: learning rates and schedule.
        estimator_steps: steps of the first stage, in which the pretrained weights rest.
        total_steps: steps of the whole training; may be infinite with a constant schedule.

    Raises:
        ValueError: if a decaying schedule has no end.
    """
    if config.schedule != "constant" and math.isinf(total_steps):
        raise ValueError(
            f"schedule is {config.schedule!r}, which needs an end: set the trainer's max_steps or max_epochs, "
            "or use schedule='constant'"
        )
    groups = parameter_groups(model, config)
    optimizer = AdamW(groups, betas=(config.beta1, config.beta2))
    starts = [0 if group["name"].startswith("sea") else estimator_steps for group in groups]

    def factor(start: int):
        return lambda step: schedule_factor(step, start=start, total=total_steps, config=config)

    return optimizer, LambdaLR(optimizer, [factor(start) for start in starts])


def parameters_without_gradient(loss: torch.Tensor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``parameters`` that ``loss`` does not depend on, found by walking its graph."""
    reached, seen, pending = set(), set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending.extend(following for following, _ in node.next_functions)
    return [parameter for parameter in parameters if id(parameter) not in reached]
