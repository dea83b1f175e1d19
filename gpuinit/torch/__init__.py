"""PyTorch: parameters filled in place, on any device and any number of ranks, with the same bits.

    he_normal_(tensor, seed=0, name="layer.weight")    one tensor, in torch's manner
    initialize_(module, seed=0)                        a whole model, every parameter its own stream
    gpuinit.torch.init                                 the names and arguments of torch.nn.init

A weight is a function of seed, name and its row-major index in the whole tensor. The layout and the device
of the tensor, and the ranks it is sharded over, do not enter: each rank makes its own shard, alone.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('gpuinit.torch needs PyTorch. To install it: pip install "gpuinit[torch]"') from error

from gpuinit.rules import Report, Row
from gpuinit.torch import init
from gpuinit.torch.default_rules import DEFAULT_RULES
from gpuinit.torch.in_place import (
    glorot_normal_,
    glorot_uniform_,
    he_normal_,
    he_uniform_,
    lecun_normal_,
    lecun_uniform_,
    normal_,
    truncated_normal_,
    uniform_,
    variance_scaling_,
)
from gpuinit.torch.model import initialize_
from gpuinit.torch.streams import streams

__all__ = [
    "DEFAULT_RULES",
    "Report",
    "Row",
    "glorot_normal_",
    "glorot_uniform_",
    "he_normal_",
    "he_uniform_",
    "init",
    "initialize_",
    "lecun_normal_",
    "lecun_uniform_",
    "normal_",
    "streams",
    "truncated_normal_",
    "uniform_",
    "variance_scaling_",
]
