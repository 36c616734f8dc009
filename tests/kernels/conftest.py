"""Fixtures of the kernel tests: numbers of the published implementation, and small random inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from triton_bounds import checked_bounds

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=not torch.cuda.is_available())
def interpreted_kernels_stay_in_bounds():
    with checked_bounds():
        yield


@pytest.fixture
def poisoned_memory():
    """New tensors hold NaN, or the largest integer, until something is written to them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["bidir_head", "causal_T20"])
def golden(request) -> dict:
    """Tensors of one golden file and what they were made with.

    Added are ``causal``, ``wanted`` (keys per query), ``num_bins``, ``grouping``, ``scaling`` and
    ``attention_mask [N, S]``.
    """
    return load_golden(request.param)


def load_golden(name: str) -> dict:
    with safe_open(GOLDEN_FOLDER / f"{name}.safetensors", "pt") as file:
        numbers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        about = file.metadata()
    # The last row of a causal triangle sees exactly the real keys, as every row of a bidirectional mask does.
    numbers["attention_mask"] = numbers["mask"][:, 0, -1] != 0
    numbers["causal"] = about["causal"] == "True"
    numbers["scaling"] = 1.0 if numbers["causal"] else int(about["D"]) ** -0.5  # causal queries come already scaled
    return numbers | {"wanted": int(about["k"]), "num_bins": int(about["K"]), "grouping": about["grouping"]}


@pytest.fixture
def random_qkv() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Function of sizes to query [N, H, T, D], key [N, G, S, D] and value [N, G, S, E] in float64, always the same."""

    def build(batch=2, heads=4, groups=2, queries=7, keys=None, width=5, value_width=3):
        generator = torch.Generator().manual_seed(0)
        keys = queries if keys is None else keys
        shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    return build


@pytest.fixture
def padding_mask() -> Callable[[int, list[tuple[int, int]]], Tensor]:
    """Function of S and of one (padding left, padding right) per item to a bool mask [N, S]."""

    def build(num_keys, sides):
        place = torch.arange(num_keys)
        return torch.stack([(place >= left) & (place < num_keys - right) for left, right in sides])

    return build
