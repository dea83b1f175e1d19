"""What `initialize_` fills a parameter with, by the module that owns it, unless the caller says otherwise."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from operator import attrgetter
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gpuinit.distributions import TRUNCATED_STD
from gpuinit.torch.adapters import ADAPTER_RULES, is_factor
from gpuinit.torch.fill import recorded_stds
from gpuinit.torch.in_place import he_normal_, normal_, truncated_normal_, uniform_, variance_scaling_
from gpuinit.torch.padding import EMBEDDINGS
from gpuinit.torch.shards import is_dtensor, parts

Predicate = Callable[[nn.Module, str], bool]
Initializer = Callable[..., Any]
Rule = tuple[str | Predicate, Initializer]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (RNNBase, RNNCellBase)
# Of a layer in one direction or the other, or of a cell; hr is an LSTM's projection, orig what pruning masks.
RECURRENT_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?(_orig)?")
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
BATCH_NORMS = nn.modules.batchnorm._NormBase  # instance norms too
NORMS = (BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def he_normal_transposed_(
    tensor: torch.Tensor, *, seed: SupportsIndex, name: str, module: Any
) -> torch.Tensor:
    """He-normal for a transposed convolution, (in, out / groups, *kernel): fan_in = in / groups * kernel."""
    return variance_scaling_(tensor, 2.0 * module.groups, seed=seed, name=name, in_axis=0, out_axis=1)


def recurrent_uniform_(tensor: torch.Tensor, *, seed: SupportsIndex, name: str, module: Any) -> torch.Tensor:
    """The recipe of torch.nn.LSTM and its kind, for weights and biases: in +-1 / sqrt(hidden_size)."""
    limit = 1 / math.sqrt(module.hidden_size) if module.hidden_size > 0 else 0.0
    return uniform_(tensor, limit, seed=seed, name=name)


def prelu_(tensor: torch.Tensor, *, module: Any) -> None:
    nn.init.constant_(tensor, module.init)


def parameter_of(types: Any, *names: str) -> Predicate:
    """True for parameters of these modules that are called so: a class derived from one may add others.

    What is in an adapter has rules of its own: there a layer like all others is 0.
    """
    return lambda module, name: (
        isinstance(module, types) and name.rpartition(".")[2] in names and not is_factor(name)
    )


def conv1d(own_name: str) -> Predicate:
    """The same for transformers' Conv1D, GPT-2's linear layer. Where that is not imported, nothing is one."""
    return lambda module, name: parameter_of(
        getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()), own_name
    )(module, name)


def recurrent(module: nn.Module, name: str) -> bool:
    return isinstance(module, RECURRENT) and RECURRENT_NAME.fullmatch(name.rpartition(".")[2]) is not None


# What draws the weight of a layer, as it is or normalised.
WEIGHTS: tuple[tuple[Predicate, Initializer], ...] = (
    (parameter_of((nn.Linear, *CONVOLUTIONS), "weight"), he_normal_),
    (parameter_of(TRANSPOSED, "weight"), he_normal_transposed_),
    (conv1d("weight"), partial(he_normal_, in_axis=0, out_axis=1)),
    # Every output of x1 W x2 is a sum of in1 * in2 products, its fan_in.
    (parameter_of(nn.Bilinear, "weight"), partial(he_normal_, in_axis=(1, 2), out_axis=0)),
    (parameter_of(nn.MultiheadAttention, *ATTENTION_WEIGHTS), he_normal_),
    (recurrent, recurrent_uniform_),
)


def find_weight(layer: nn.Module, weight: str) -> Initializer | None:
    return next((initializer for fits, initializer in WEIGHTS if fits(layer, weight)), None)


def direction_(tensor: torch.Tensor, *, seed: SupportsIndex, name: str, module: Any) -> Any:
    """What the weight of the layer would be if it were not normalised, from the parameter's own stream."""
    initializer: Any = find_weight(module, find_factor(module, name)[1])
    words = {"module": module} if "module" in inspect.signature(initializer).parameters else {}
    return initializer(tensor, seed=seed, name=name, **words)


def magnitude_(tensor: torch.Tensor, *, name: str, module: Any) -> None:
    """The g with which weight = g * v / |v| has the variance that it would have if it were not normalised.

    The n elements of v that share a g are alike, so each gets the variance g**2 / n: g = std * sqrt(n). No
    norm of drawn numbers is taken: it would differ between devices, and need every shard.

    References: Salimans, Kingma, "Weight normalization", NeurIPS 2016, who choose g from data.
    """
    weight = find_factor(module, name)[1]
    old = hasattr(module, f"{weight}_v")
    vectors = getattr(module, f"{weight}_v") if old else module.parametrizations[weight].original1
    blank = torch.empty(tuple(vectors.shape), dtype=vectors.dtype, device="meta")  # only its fans count
    context, stds = copy_context(), list[float]()
    context.run(recorded_stds.set, stds)
    context.run(direction_, blank, seed=0, name=name, module=module)
    nn.init.constant_(tensor, stds[-1] * math.sqrt(vectors.numel() / max(tensor.numel(), 1)))


def negative_identity_(tensor: torch.Tensor) -> None:
    """What makes the weight the base of torch's orthogonal parametrisation, whichever its map."""
    for part, starts in parts(tensor)[1]:
        part.zero_().diagonal(starts[-2] - starts[-1], -2, -1).fill_(-1)


# The parameters from which torch makes a weight: after the weight's name for a hook of torch.nn.utils, else
# below its parametrisation.
FACTORS: dict[type, dict[str, Initializer]] = {
    WeightNorm: {"_g": magnitude_, "_v": direction_},
    SpectralNorm: {"_orig": direction_},
    _WeightNorm: {"original0": magnitude_, "original1": direction_},
    _SpectralNorm: {"original": direction_},
    _Orthogonal: {"original": negative_identity_},
}


def makers(layer: Any) -> dict[str, tuple[str, Any]]:
    """The hooks and parametrisations of a layer and their weights, by how their parameters' names begin.

    Left out are those whose needs are not known: several on one weight, an orthogonal one without a base.
    """
    hooks = [hook for hook in layer._forward_pre_hooks.values() if type(hook) in FACTORS]
    lists = layer.parametrizations.items() if is_parametrized(layer) else ()
    alone = [(weight, steps[0]) for weight, steps in lists if len(steps) == 1 and type(steps[0]) in FACTORS]
    return {hook.name: (hook.name, hook) for hook in hooks} | {
        f"parametrizations.{weight}.": (weight, step)
        for weight, step in alone
        if not isinstance(step, _Orthogonal) or getattr(step, "base", None) is not None
    }


def find_factor(layer: nn.Module, name: str) -> tuple[Initializer | None, str]:
    """What fills a parameter of which a weight in WEIGHTS is made, and the name of that weight."""
    for path, (weight, maker) in makers(layer).items():
        for ending, initializer in FACTORS[type(maker)].items():
            fits = f".{name}".endswith(f".{path}{ending}") and not is_factor(name)
            if fits and find_weight(layer, weight):
                return initializer, weight
    return None, ""


def factor(initializer: Initializer) -> Predicate:
    return lambda module, name: find_factor(module, name)[0] is initializer


def author(norm: nn.Module) -> tuple[type, bool]:
    """The youngest class of a module that has a recipe or a computation of its own; whether it is torch's."""
    kin = type(norm).__mro__
    found = next(kind for kind in kin if {"forward", "reset_parameters"} & vars(kind).keys())
    return found, found.__module__.startswith("torch.nn.")


def torch_norm(own_name: str) -> Predicate:
    """True for parameters of torch's norms that are called so.

    A class derived from one that has its own `forward` may scale by 1 + weight, as Gemma's does: it is none.
    """
    return lambda module, name: (
        isinstance(module, NORMS) and name.rpartition(".")[2] == own_name and author(module)[1]
    )


def other_norm(module: nn.Module, name: str) -> bool:
    """True for parameters of other norms, known by their names, that have a `reset_parameters` to ask.

    It must be as young as `forward`: an inherited one may not know what the derived class computes.
    """
    own = dict(module.named_parameters(recurse=False))
    named = "norm" in type(module).__name__.lower() and all(vector.ndim <= 1 for vector in own.values())
    found, is_torchs = author(module)
    return (
        (named or isinstance(module, NORMS))
        and name.rpartition(".")[2] in own
        and len(own) == len(list(module.parameters()))  # or modules below might be reset too
        and "reset_parameters" in vars(found)
        and not is_torchs
    )


def reset_norm_(tensor: torch.Tensor, *, module: Any) -> None:
    """What a norm's own recipe gives this parameter; the others, which may have other rules, are kept."""
    others = [(other, other.clone()) for other in module.parameters() if other is not tensor]
    module.reset_parameters()
    for other, before in others:
        other.copy_(before)


DEFAULT_RULES: tuple[Rule, ...] = (
    *((factor(initializer), initializer) for initializer in (magnitude_, direction_, negative_identity_)),
    *ADAPTER_RULES,
    *WEIGHTS,
    (parameter_of((nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Bilinear), "bias"), nn.init.zeros_),
    (conv1d("bias"), nn.init.zeros_),
    (parameter_of(nn.MultiheadAttention, "in_proj_bias", "bias_k", "bias_v"), nn.init.zeros_),
    (parameter_of(nn.PReLU, "weight"), prelu_),
    (torch_norm("weight"), nn.init.ones_),
    (torch_norm("bias"), nn.init.zeros_),
    (other_norm, reset_norm_),
    # 0.02 is the standard deviation of the weights, after truncation.
    (parameter_of(EMBEDDINGS, "weight"), partial(truncated_normal_, stddev=0.02 / TRUNCATED_STD)),
)


def reset_buffers(module: nn.Module, prefix: str, key: int, filled: set[torch.Tensor]) -> None:
    """Give the buffers of one module that go with its filled parameters their first values.

    The running statistics of batch norms are reset. The singular vectors of a spectral norm are found anew,
    and the base of an orthogonal parametrisation drawn, from streams of their own names: with those of the
    old weight, or drawn by torch, the new weight would not depend on the seed alone. Both take sums, so that
    their bits may differ between devices. A spectral norm needs the whole weight, so shards are gathered.

    References: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018;
    Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 2007.
    """
    if isinstance(module, BATCH_NORMS):
        module.reset_running_stats()
    for path, (_, maker) in makers(module).items():
        original = attrgetter(path + next(iter(FACTORS[type(maker)])))(module)
        if original not in filled:
            continue
        if isinstance(maker, _Orthogonal):
            drawn = normal_(torch.empty_like(maker.base), 1.0, seed=key, name=f"{prefix}{path}0.base")
            q, r = torch.linalg.qr(drawn)
            maker.base.copy_(q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2))
        elif isinstance(maker, SpectralNorm):
            u, v = getattr(module, f"{path}_u"), getattr(module, f"{path}_v")
            matrix = maker.reshape_weight_to_matrix(whole(original))
            estimate_(u, v, matrix, maker.eps, key, f"{prefix}{path}_v")
        elif isinstance(maker, _SpectralNorm) and original.ndim > 1:  # the norm of a vector needs no estimate
            matrix = maker._reshape_weight_to_matrix(whole(original))
            estimate_(maker._u, maker._v, matrix, maker.eps, key, f"{prefix}{path}0._v")


def whole(tensor: Any) -> Any:
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach()


def estimate_(u: Any, v: Any, matrix: torch.Tensor, eps: float, key: int, name: str) -> None:
    """torch's power iteration, as many steps as its constructor does. It starts from v, and u follows."""
    normal_(v, 1.0, seed=key, name=name)
    u, v = parts(u)[0], parts(v)[0]  # of DTensors, which are replicated
    for _ in range(15):
        nn.functional.normalize(matrix @ v, dim=0, eps=eps, out=u)
        nn.functional.normalize(matrix.mT @ u, dim=0, eps=eps, out=v)
