"""Initial weights of neural networks: one seed, the same bits on NumPy and on any CUDA device."""

from gpuinit.devices import FallbackWarning
from gpuinit.initializers import (
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    lecun_normal,
    lecun_uniform,
    normal,
    truncated_normal,
    uniform,
    variance_scaling,
)

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
]
