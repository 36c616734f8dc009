"""All Triton kernels compile for a GPU: the interpreter lets pass what the compiler does not."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
import triton_launches
from triton.runtime import JITFunction
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

import sea_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="other tests compile and run them")


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched, with those of their modules. The interpreter runs none."""
    names = set()
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *_, **__: names.add(f"{self.fn.__module__}.{self.fn.__name__}")
    )
    return names


@pytest.mark.parametrize("case", triton_launches.CASES)
def test_kernels_compile(case, launched):
    triton_launches.CASES[case]()
    command = [sys.executable, triton_launches.__file__, case]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(result.stdout.splitlines()) == launched


def test_the_cases_launch_every_kernel(launched):
    for case in triton_launches.CASES.values():
        case()
    assert launched == set(kernels())


def kernels():
    """Names of all kernels, as opposed to the functions that kernels call, with those of their modules."""
    for module in pkgutil.walk_packages(sea_kernels.__path__, "sea_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_kernel = name.endswith("_kernel") and isinstance(value, JITFunction | InterpretedFunction)
            if is_kernel and value.fn.__module__ == module.name:
                yield f"{module.name}.{name}"
