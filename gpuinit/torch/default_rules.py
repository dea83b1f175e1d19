"""What `initialize_` fills a parameter with, by the module that owns it, unless the caller says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import nn

from gpuinit.distributions import TRUNCATED_STD
from gpuinit.torch.in_place import he_normal_, truncated_normal_, variance_scaling_

Predicate = Callable[[nn.Module, str], bool]
Initializer = Callable[..., Any]
Rule = tuple[str | Predicate, Initializer]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = nn.modules.batchnorm._NormBase  # instance norms too
NORMS = (BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def he_normal_transposed_(
    tensor: torch.Tensor, *, seed: SupportsIndex, name: str, module: Any
) -> torch.Tensor:
    """He-normal for a transposed convolution, (in, out / groups, *kernel): fan_in = in / groups * kernel."""
    return variance_scaling_(tensor, 2.0 * module.groups, seed=seed, name=name, in_axis=0, out_axis=1)


def parameter_of(types: Any, *endings: str) -> Predicate:
    """True for parameters of these modules whose own name ends so."""
    return lambda module, name: isinstance(module, types) and name.rpartition(".")[2].endswith(endings)


DEFAULT_RULES: tuple[Rule, ...] = (
    (parameter_of((nn.Linear, *CONVOLUTIONS), "weight"), he_normal_),
    (parameter_of(TRANSPOSED, "weight"), he_normal_transposed_),
    (parameter_of(nn.MultiheadAttention, "proj_weight"), he_normal_),
    (parameter_of((nn.Linear, *CONVOLUTIONS, *TRANSPOSED), "bias"), nn.init.zeros_),
    (parameter_of(nn.MultiheadAttention, "bias", "bias_k", "bias_v"), nn.init.zeros_),
    (parameter_of(NORMS, "weight"), nn.init.ones_),
    (parameter_of(NORMS, "bias"), nn.init.zeros_),
    # 0.02 is the standard deviation of the weights, after truncation.
    (parameter_of(EMBEDDINGS, "weight"), partial(truncated_normal_, stddev=0.02 / TRUNCATED_STD)),
)
