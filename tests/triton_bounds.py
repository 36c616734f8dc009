"""Bounds checks for Triton's interpreter: every address that a kernel loads from or stores to lies in an argument.

On a GPU such an access is an error that shows up somewhere later, or a wrong number; the interpreter lets it pass.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy
import torch
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A kernel touched memory outside of its arguments."""


@contextmanager
def checked_bounds():
    """Let kernels that the interpreter runs inside this context raise ``OutOfBounds``."""
    ranges: list[tuple[int, int]] = []
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    prepare = interpreter.GridExecutor._init_args_hst

    def remember(self, args, kwargs):
        prepared = prepare(self, args, kwargs)
        ranges[:] = [_memory(arg) for arg in (*prepared[0], *prepared[1].values()) if isinstance(arg, torch.Tensor)]
        return prepared

    def check(pointers, mask):
        if ranges:
            _check(pointers, mask, ranges)

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder = interpreter.InterpreterBuilder
    with (
        patch.object(interpreter.GridExecutor, "_init_args_hst", remember),
        patch.object(builder, "create_masked_load", checked_load),
        patch.object(builder, "create_masked_store", checked_store),
    ):
        yield


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _check(pointers, mask, ranges) -> None:
    where = numpy.asarray(pointers.data).astype(numpy.int64)[numpy.asarray(mask.data).astype(bool)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = numpy.zeros(where.shape, bool)
    for begin, end in ranges:
        inside |= (where >= begin) & (where + size <= end)
    if not inside.all():
        distance = min(abs(int(where[~inside][0]) - edge) for pair in ranges for edge in pair)
        raise OutOfBounds(f"{(~inside).sum()} of {inside.size} addresses, the first {distance} bytes off an argument")
