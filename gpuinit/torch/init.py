"""The names and arguments of `torch.nn.init`, for weights that are the same on every device and any ranks.

    from gpuinit.torch import init  # instead of: from torch.nn import init

What draws takes seed= and name= too; they, the tensors and the errors are those of
`gpuinit.torch.he_normal_`. Without a seed, 64 bits are drawn from `generator`, on any device, or from torch's
default CPU generator, which `torch.manual_seed` governs; a DTensor needs a seed. The distributions and the
fans are torch's (axis 1 in, axis 0 out, times the axes after them). Its numbers are not, and a uniform
distribution has both its ends, not the lower one alone. What draws nothing is torch's own. What draws and is
not here is an AttributeError.
"""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from inspect import isfunction
from typing import Any, SupportsIndex

import torch
from torch.nn.init import calculate_gain, constant_, dirac_, eye_, ones_, zeros_

from gpuinit.devices import find_stack_level
from gpuinit.distributions import Normal, Uniform, parse_normal, parse_number, parse_uniform
from gpuinit.fans import fans
from gpuinit.tensors import outside_graphs
from gpuinit.torch.fill import check, fill

__all__ = ["calculate_gain", "constant_", "dirac_", "eye_", "ones_", "zeros_"]  # torch's own
__all__ += ["kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"]
__all__ += ["xavier_normal_", "xavier_uniform_"]

UNLISTED = ("constant", "eye", "dirac", "_calculate_fan_in_and_fan_out", "_calculate_correct_fan")
MODES = ("fan_in", "fan_out")


def __getattr__(name: str) -> Any:
    if name in UNLISTED:  # they draw nothing either
        return getattr(torch.nn.init, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    if f"{name}_" in __all__:
        message += f"; use {name}_, as torch wants too"
    elif isfunction(getattr(torch.nn.init, name, None)):
        message += f"; torch.nn.init.{name} draws torch's numbers, which differ between devices"
    raise AttributeError(message)


@outside_graphs
def uniform_(
    tensor: torch.Tensor,
    a: float = 0.0,
    b: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from the uniform distribution on [a, b], a <= b. References: `torch.nn.init.uniform_`."""
    check(tensor)
    return fill(tensor, parse_uniform((a, b), names=("a", "b")), seed, name, generator)


@outside_graphs
def normal_(
    tensor: torch.Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from a normal: mean + std * z, std >= 0. References: `torch.nn.init.normal_`."""
    check(tensor)
    return fill(tensor, parse_normal(std, mean, name="std"), seed, name, generator)


@outside_graphs
def trunc_normal_(
    tensor: torch.Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from a normal distribution cut at a and b: mean + std * z in [a, b], a <= b.

    a and b are weights, not standard deviations: with std=0.02 the default ones cut nothing, and the bits are
    those of `normal_`. They may be infinite. std is that before the cut; where it is 0, which torch refuses,
    all weights are the mean, or the bound next to it. Bounds too close together or too far from the mean are
    a ValueError, as in `gpuinit.truncated_normal`. References: `torch.nn.init.trunc_normal_`.
    """
    check(tensor)
    return fill(tensor, parse_truncated(mean, std, a, b), seed, name, generator)


def parse_truncated(mean: float, std: float, a: float, b: float) -> Normal:
    """What trunc_normal_ draws."""
    width, centre = parse_number("std", std, least=0), parse_number("mean", mean)
    low, high = parse_number("a", a, finite=False), parse_number("b", b, finite=False)
    if low > high:
        raise ValueError(f"b must be at least a, got a {a!r} and b {b!r}")
    if width == 0 or low == high:
        return parse_normal(0.0, parse_number("mean, cut at a and b,", min(max(centre, low), high)))
    bounds = deviations(low, centre, width, math.inf), deviations(high, centre, width, -math.inf)
    try:
        return parse_normal(width, centre, *bounds, name="std")
    except ValueError as error:
        raise ValueError(f"a and b must suit mean and std: in standard deviations, {error}") from None


def deviations(bound: float, mean: float, std: float, inwards: float) -> float:
    """How many standard deviations from the mean, rounded so that no weight is beyond the bound."""
    if math.isinf(bound):
        return bound
    exact = (Fraction(bound) - Fraction(mean)) / Fraction(std)
    try:
        nearest = float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
    beyond = nearest < exact if inwards > 0 else nearest > exact
    return math.nextafter(nearest, inwards) if beyond else nearest


@outside_graphs
def xavier_uniform_(
    tensor: torch.Tensor,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor of 2 or more axes from [-bound, bound], bound = gain * sqrt(6 / (fan_in + fan_out)).

    gain is >= 0. References: Glorot, Bengio, AISTATS 2010; `torch.nn.init.xavier_uniform_`.
    """
    return fill(tensor, uniform_of(*xavier(tensor, gain)), seed, name, generator)


@outside_graphs
def xavier_normal_(
    tensor: torch.Tensor,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor of 2 or more axes from a normal, not cut, of std = gain * sqrt(2 / (fan_in + fan_out)).

    gain is >= 0. References: Glorot, Bengio, AISTATS 2010; `torch.nn.init.xavier_normal_`.
    """
    return fill(tensor, normal_of(*xavier(tensor, gain)), seed, name, generator)


@outside_graphs
def kaiming_uniform_(
    tensor: torch.Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor of 2 or more axes from [-bound, bound], bound = gain * sqrt(3 / fan).

    mode, "fan_in" or "fan_out", says which fan; gain is `calculate_gain(nonlinearity, a)`, where a is the
    negative slope of leaky_relu. References: He et al., ICCV 2015; `torch.nn.init.kaiming_uniform_`.
    """
    return fill(tensor, uniform_of(*kaiming(tensor, a, mode, nonlinearity)), seed, name, generator)


@outside_graphs
def kaiming_normal_(
    tensor: torch.Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor of 2 or more axes from a normal, not cut, of std = gain / sqrt(fan).

    The arguments are those of `kaiming_uniform_`. References: the same; `torch.nn.init.kaiming_normal_`.
    """
    return fill(tensor, normal_of(*kaiming(tensor, a, mode, nonlinearity)), seed, name, generator)


def xavier(tensor: torch.Tensor, gain: float) -> tuple[float, float]:
    """The standard deviation and the gain."""
    check(tensor)
    factor = parse_number("gain", gain, least=0)
    return factor * math.sqrt(2 / max(1, sum(find_fans(tensor)))), factor


def kaiming(tensor: torch.Tensor, a: float, mode: str, nonlinearity: str) -> tuple[float, float]:
    """The standard deviation and the gain."""
    check(tensor)
    slope = None if a is None else parse_number("a", a)  # torch's own default slope, 0.01
    if not isinstance(mode, str) or mode.lower() not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    try:
        gain = float(calculate_gain(nonlinearity, slope))
    except (ValueError, OverflowError):
        message = f"nonlinearity and a must suit calculate_gain, got {nonlinearity!r} and {a!r}"
        raise ValueError(message) from None
    if 0 in tensor.shape:  # of any number of axes, as in torch
        message = "Initializing zero-element tensors is a no-op"
        warnings.warn(message, stacklevel=find_stack_level())
        return 0.0, 0.0
    return gain / math.sqrt(find_fans(tensor)[MODES.index(mode.lower())]), gain


def find_fans(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.ndim < 2:
        raise ValueError(f"tensor must have 2 or more axes, for its fans, got shape {tuple(tensor.shape)}")
    return fans(tuple(tensor.shape), 1, 0, ())


def uniform_of(std: float, gain: float) -> Uniform:
    bound = math.sqrt(3) * std
    return Uniform(-bound, bound, ("gain", gain))


def normal_of(std: float, gain: float) -> Normal:
    return Normal(std, 0.0, -math.inf, math.inf, ("gain", gain))
