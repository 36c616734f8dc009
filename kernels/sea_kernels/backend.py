"""Which implementation of an operation runs: an explicit choice never falls back to another."""

import functools
import importlib
import importlib.util
import warnings
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "triton"]
BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def has_triton() -> bool:
    """Whether the Triton package is installed (it is not on every platform)."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_gather() -> bool:
    """Whether kernels can look up elements of a tile, which Triton 3.2 (with PyTorch 2.6) cannot."""
    return has_triton() and hasattr(importlib.import_module("triton.language"), "gather")


def fits_kernels(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these ``[..., D]`` tensors: float32 or half precision, at most 256 wide."""
    return has_kernel_dtype(*tensors) and all(tensor.shape[-1] <= 256 for tensor in tensors)


def has_kernel_dtype(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take tensors of these dtypes, whatever their shapes."""
    return all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)


def choose_backend(backend: Backend, tensor: Tensor, *, triton_exists: bool, operation: str) -> str:
    """The backend that will run: "reference" or "triton".

    "auto" takes Triton for CUDA tensors where the operation has a Triton form, and the reference otherwise: without a
    word on a CPU, with a warning on a GPU, where it is slow.

    Args:
        backend: the caller's choice.
        tensor: one of the operation's inputs, for its device.
        triton_exists: whether this operation has a Triton form for these arguments.
        operation: name for error messages.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: for "triton" where there is no Triton form or no Triton.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {BACKENDS}")
    usable = triton_exists and has_triton()
    if backend == "triton":
        if not usable:
            raise NotImplementedError(
                f"{operation}: backend='triton' was asked for, but "
                + ("Triton is not installed" if triton_exists else "this operation has no Triton form for these inputs")
            )
        return "triton"
    if backend == "auto" and tensor.is_cuda:
        if usable:
            return "triton"
        missing = "it has no Triton form for these inputs" if has_triton() else "Triton is not installed"
        warnings.warn(f"{operation} runs in PyTorch, slowly: {missing}", stacklevel=3)
    return "reference"
