"""What is drawn, and how wide: distributions, named recipes and bounds. The only place that knows.

    HE_NORMAL, fans -> Normal(stddev, 0, -2, 2) -> what the samplers are told, for a dtype

Nothing here knows a shape, an array or a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from gpuinit import loading, quantile
from gpuinit.quantile import Array, Numbers
from gpuinit.stream import is_scalar

# Standard deviation of the unit normal truncated at +-2: sqrt(1 - 4*phi(2) / (2*Phi(2) - 1)), where phi and
# Phi are the normal density and distribution function. tests/test_fans.py derives it. Keras and JAX divide
# by .87962566103423978, which is the same float64.
TRUNCATED_STD = 0.87962566103423976

Source = tuple[str, float]  # the argument that decides how wide, and its value: for a message


class Normal(NamedTuple):
    """mean + stddev * z, z from the unit normal between lower and upper."""

    stddev: float  # before it is cut
    mean: float
    lower: float  # in standard deviations from the mean, as is upper
    upper: float
    source: Source

    def std(self) -> float:
        """The standard deviation of the weights, in float64 and not to the last digit."""
        if self.upper - self.lower < 1e-3:  # next to uniform, where the terms below would cancel
            return self.stddev * (self.upper - self.lower) / math.sqrt(12)
        if (self.lower, self.upper) == (-2, 2):
            return self.stddev * TRUNCATED_STD
        between = float(exact().probability_within(self.upper) - exact().probability_within(self.lower))
        peaks = [math.exp(-x * x / 2) * math.sqrt(2 / math.pi) / between for x in (self.lower, self.upper)]
        mean = peaks[0] - peaks[1]
        first, last = (0 if math.isinf(x) else x * y for x, y in zip(self[2:4], peaks, strict=True))
        return self.stddev * math.sqrt(max(0, 1 + first - last - mean * mean))

    def is_constant(self) -> bool:
        """Whether all weights were asked to be one number."""
        return self.source[1] == 0 or self.lower == self.upper


class Uniform(NamedTuple):
    """Uniform in [low, high]."""

    low: float
    high: float
    source: Source

    def std(self) -> float:
        """The standard deviation of the weights."""
        return self.high / math.sqrt(12) - self.low / math.sqrt(12)

    def is_constant(self) -> bool:
        """Whether all weights were asked to be one number."""
        return self.low == self.high == self.source[1]


Draw = Normal | Uniform


def truncated_normal(scale: float, fan: float) -> Draw:
    """Cut at two standard deviations, with variance scale / fan after that."""
    return Normal(root(scale, fan) / TRUNCATED_STD, 0.0, -2.0, 2.0, ("scale", scale))


def untruncated_normal(scale: float, fan: float) -> Draw:
    """With variance scale / fan."""
    return Normal(root(scale, fan), 0.0, -math.inf, math.inf, ("scale", scale))


def uniform(scale: float, fan: float) -> Draw:
    """Round 0, with variance scale / fan."""
    limit = root(scale, fan, 3)
    return Uniform(-limit, limit, ("scale", scale))


def root(scale: float, fan: float, factor: int = 1) -> float:
    """sqrt(factor * scale / fan), scale > 0, with nothing on the way too large or too small for a float."""
    mantissa, exponent = math.frexp(scale)
    odd = exponent % 2
    return math.ldexp(math.sqrt(factor * math.ldexp(mantissa, odd) / fan), (exponent - odd) // 2)


DISTRIBUTIONS: dict[str, Callable[[float, float], Draw]] = {
    "truncated_normal": truncated_normal,
    "untruncated_normal": untruncated_normal,
    "uniform": uniform,
}
MODES = ("fan_in", "fan_out", "fan_avg", "fan_geo_avg")


class Recipe(NamedTuple):
    """Weights of variance scale / fan."""

    distribution: str
    scale: float
    mode: str

    def fan(self, fan_in: int, fan_out: int) -> float:
        """By mode; below 1 it counts as 1, as in Keras."""
        if self.mode == "fan_avg":
            return max(1, (fan_in + fan_out) / 2)
        if self.mode == "fan_geo_avg":
            return max(1, math.sqrt(fan_in * fan_out))
        return max(1, fan_in if self.mode == "fan_in" else fan_out)


HE_NORMAL = Recipe("truncated_normal", 2.0, "fan_in")
HE_UNIFORM = Recipe("uniform", 2.0, "fan_in")
GLOROT_NORMAL = Recipe("truncated_normal", 1.0, "fan_avg")
GLOROT_UNIFORM = Recipe("uniform", 1.0, "fan_avg")
LECUN_NORMAL = Recipe("truncated_normal", 1.0, "fan_in")
LECUN_UNIFORM = Recipe("uniform", 1.0, "fan_in")


@lru_cache(maxsize=256)  # tensors of one model share their fans
def draw_of(recipe: Recipe, fan_in: int, fan_out: int) -> Draw:
    """What a recipe draws for these fans."""
    return DISTRIBUTIONS[recipe.distribution](recipe.scale, recipe.fan(fan_in, fan_out))


def parse_recipe(scale: float, mode: str, distribution: str) -> Recipe:
    """That of `variance_scaling`."""
    factor = parse_number("scale", scale, least=0)
    if factor == 0:
        raise ValueError(f"scale must be a finite number > 0, got {scale!r}")
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    return Recipe(distribution, factor, mode)


def parse_normal(
    stddev: float,
    mean: float = 0.0,
    lower: float = -math.inf,
    upper: float = math.inf,
    name: str = "stddev",
) -> Normal:
    """That of `normal` and `truncated_normal`; name is what a front end calls the standard deviation."""
    # Only plain floats are remembered: others may be equal without being alike, as 1 and True, or change.
    are_plain = type(stddev) is type(mean) is type(lower) is type(upper) is float
    return (plain_normal if are_plain else find_normal)(stddev, mean, lower, upper, name)


def find_normal(stddev: float, mean: float, lower: float, upper: float, name: str) -> Normal:
    width = parse_number(name, stddev, least=0)
    bounds = parse_number("lower", lower, finite=False), parse_number("upper", upper, finite=False)
    if bounds not in ((-2, 2), (-math.inf, math.inf)):
        exact().check_bounds(*bounds)
    return Normal(width, parse_number("mean", mean), *bounds, (name, width))


plain_normal = lru_cache(maxsize=256)(find_normal)


def parse_uniform(
    ends: tuple[float, ...],
    low: float | None = None,
    high: float | None = None,
    limit: float | None = None,
    names: tuple[str, str] = ("low", "high"),
) -> Uniform:
    """That of `uniform`, whose arguments are one limit or two ends, by place or by name.

    names are what a front end calls the two ends.
    """
    are_plain = {float, type(None)}.issuperset(map(type, (*ends, low, high, limit)))
    return (plain_uniform if are_plain else find_uniform)(ends, low, high, limit, names)


def find_uniform(
    ends: tuple[float, ...],
    low: float | None,
    high: float | None,
    limit: float | None,
    names: tuple[str, str],
) -> Uniform:
    one, other = names
    words = ((one, low), (other, high), ("limit", limit))
    by_name = {word: value for word, value in words if value is not None}
    if len(ends) > 2 or (ends and by_name) or tuple(by_name) not in ((), ("limit",), names):
        given = [*map(repr, ends), *(f"{word}={value!r}" for word, value in by_name.items())]
        raise ValueError(f"uniform must be given one limit, or {one} and {other}, got {', '.join(given)}")
    numbers = ends or tuple(by_name.values()) or (0.05,)
    if len(numbers) == 1:
        width = parse_number("limit", numbers[0], least=0)
        return Uniform(-width, width, ("limit", width))
    first, last = parse_number(one, numbers[0]), parse_number(other, numbers[1])
    if first > last:
        raise ValueError(
            f"{other} must be at least {one}, got {one} {numbers[0]!r} and {other} {numbers[1]!r}"
        )
    return Uniform(first, last, (one, first) if abs(first) > abs(last) else (other, last))


plain_uniform = lru_cache(maxsize=256)(find_uniform)


def parse_number(argument: str, value: Any, least: float | None = None, finite: bool = True) -> float:
    """A real number, or a 0-d array of one, of any library."""
    wanted = f"{argument} must be a {'finite ' if finite else ''}number"
    if least is not None:
        wanted += f" >= {least}"
    if type(value) is not float:
        is_plain = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_real(value) if hasattr(value, "dtype") else is_plain):
            raise TypeError(f"{wanted}, got {value!r}")
    try:
        number = float(value) + 0.0  # one zero: what is remembered by it must not depend on its sign
    except OverflowError:
        raise ValueError(f"{wanted}, got {value!r}") from None
    except (TypeError, RuntimeError):  # an array without a value, as under jit or on meta
        raise TypeError(f"{wanted} that is known now, got {value!r}") from None
    if math.isnan(number) or (finite and math.isinf(number)) or (least is not None and number < least):
        raise ValueError(f"{wanted}, got {value!r}")
    if number == 0 and value != 0:  # a fraction, say
        raise ValueError(f"{wanted} that float64 does not round to 0, got {value!r}")
    return number


def is_real(array: Any) -> bool:
    """Whether it is a 0-d array of real numbers, of any library."""
    return is_scalar(array, "bfloat|float|int|uint")


@lru_cache(maxsize=256)
def find_sampling(draw: Draw, dtype: np.dtype) -> tuple[int, Numbers]:
    """The sampler's distribution and numbers: of float64 for float64, else of float32.

    Raises:
        ValueError: A weight could be infinite in the dtype, or all are 0 and were not asked to be. Beside a
            mean that is not 0 a spread may vanish: each weight is right to its last digit then.
    """
    kind = np.float64 if dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        distribution, numbers, furthest = sampling(draw, kind)
        ends = np.asarray(furthest).astype(dtype)
        if not np.isfinite(ends).all():
            argument, value = draw.source
            if isinstance(draw, Normal) and abs(draw.mean) > draw.stddev:
                argument, value = "mean", draw.mean
            elif isinstance(draw, Normal) and draw.lower == draw.upper and abs(draw.upper) > draw.stddev:
                argument, value = "lower", draw.lower
            raise ValueError(
                f"{argument} must leave the weights finite in {dtype.name}, got {argument} {value!r}"
            )
        if not ends.any() and not draw.is_constant():
            argument, value = draw.source
            if isinstance(draw, Normal) and max(abs(draw.lower), abs(draw.upper)) < draw.stddev:
                is_lower = abs(draw.lower) > abs(draw.upper)
                argument, value = ("lower", draw.lower) if is_lower else ("upper", draw.upper)
            least = float(np.nextafter(dtype.type(0), dtype.type(1)))
            raise ValueError(
                f"{argument} must leave weights other than 0 in {dtype.name}, whose least is {least:.2g}, "
                f"got {argument} {value!r}"
            )
    return distribution, numbers


def sampling(draw: Draw, kind: Any) -> tuple[int, Numbers, Sequence[Any] | Array]:
    """The same, and the outermost weights, or what is infinite on the way there."""
    # Where these limits are 0, a product with a negative sample would be -0.0: the sum with a mean is not.
    if isinstance(draw, Uniform):
        if draw.low == -draw.high and draw.high > 0:
            limit = kind(draw.high)
            return quantile.UNIFORM, (limit,), (limit,)
    elif draw[1:4] == (0, -2, 2) and draw.stddev > 0:
        limit = kind(draw.stddev) * kind(2)
        return quantile.TRUNCATED_NORMAL, (limit,), (limit,)
    found: tuple[int, Numbers, Array] = exact().sampling(draw, kind)
    return found


@cache
def exact() -> Any:
    with loading.brief:
        from gpuinit import exact  # here, as it imports fractions

    return exact
