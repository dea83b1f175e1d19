"""Host memory for frameworks that take it over."""

from __future__ import annotations

import math

import numpy as np

ALIGNMENT = 64  # bytes; XLA takes memory aligned so as it is, and copies any other; TensorFlow relies on it


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in memory of its own."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
