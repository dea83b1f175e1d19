"""Host memory for frameworks that take it over."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes; XLA takes memory aligned so as it is, and copies any other; TensorFlow relies on it

# From this size on NumPy asks Linux for huge pages for its own memory, which are cleared with far fewer
# interruptions (numpy/_core/src/multiarray/alloc.cpp).
HUGE_PAGES_FROM = 2**22


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in memory of its own."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def ask_for_huge_pages(address: int, size: int) -> None:
    """For new memory of another library. It is a hint, and changes nothing that is there."""
    if size < HUGE_PAGES_FROM or sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), mmap.MADV_HUGEPAGE)


@cache
def libc() -> Any:
    return ctypes.CDLL(None)
