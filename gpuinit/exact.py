"""A distribution that is not round 0 or is cut elsewhere: its numbers for a sampler, by exact arithmetic.

All is computed in fractions and then rounded, so that it is the same on every machine. Loaded when it is
needed, as fractions take a while to import.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from gpuinit import quantile
from gpuinit.distributions import Normal, Uniform
from gpuinit.quantile import Array, Numbers

# The largest magnitude of the untruncated normal, in float32 and in float64: that of the most negative word.
# Bounds beyond it cut nothing. tests/test_normal.py takes them from the samplers.
REACH = {np.float32: 6.3379578590393066, np.float64: 9.155293772686072}

# What two bounds must leave of the normal's probability, so that every step between two words is an ordinary
# float32, and what must lie beyond the samples that are furthest out: the first segment of the tables.
LEAST_BETWEEN = Fraction(1, 2**93)
LEAST_TAIL = Fraction(1, 2**64)

# To 110 digits.
PI = (
    "3.1415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679"
    "8214808651"
)


@lru_cache(maxsize=256)
def check_bounds(lower: float, upper: float) -> None:
    """That a normal can be cut there."""
    got = f"got lower {lower!r} and upper {upper!r}"
    if lower > upper:
        raise ValueError(f"upper must be at least lower, {got}")
    if lower == upper:
        if math.isinf(lower):
            raise ValueError(f"lower and upper must not be the same infinity, {got}")
        return
    if upper <= 0:
        lower, upper = -upper, -lower
    between = probability_within(upper) - probability_within(lower)
    if lower > 0 and 1 - probability_within(upper) + between / 2**33 < LEAST_TAIL:
        raise ValueError(f"lower and upper must lie within the normal's tails of 2**-64, {got}")
    if between < LEAST_BETWEEN:
        raise ValueError(f"lower and upper must be further apart, {got}")


@lru_cache(maxsize=256)
def probability_within(x: float) -> Fraction:
    """erf(x / sqrt(2)): the probability that a normal number lies within +-x; negative for negative x.

    To 70 digits and more, by operations that `decimal` rounds in one way everywhere, as C libraries do not.
    """
    if x < 0:
        return -probability_within(-x)
    if x == 0:
        return Fraction(0)
    if x > 40:  # the tail is below 1e-349
        return Fraction(1)
    with localcontext(Context(100, ROUND_HALF_EVEN, -999999, 999999, traps=[])):  # whatever the caller's
        exact = Decimal(x)
        density = (-exact * exact / 2).exp() * (2 / Decimal(PI)).sqrt()
        if x < 6:  # density * (x + x**3/3 + x**5/(3*5) + ...)
            term = total = exact
            divisor = 1
            while term > total.scaleb(-90):
                divisor += 2
                term *= exact * exact / divisor
                total += term
            return Fraction(density * total)
        fraction = exact  # density / (x + 1/(x + 2/(x + 3/(x + ...))))
        for k in range(400, 0, -1):
            fraction = exact + k / fraction
        return 1 - Fraction(density / fraction)


def sampling(draw: Normal | Uniform, kind: Any) -> tuple[int, Numbers, Array]:
    """The sampler's distribution, its numbers, and the outermost weights or what is infinite on the way."""
    return uniform_sampling(draw, kind) if isinstance(draw, Uniform) else normal_sampling(draw, kind)


def uniform_sampling(draw: Uniform, kind: Any) -> tuple[int, Numbers, Array]:
    low, high = Fraction(draw.low), Fraction(draw.high)
    scale, centre = nearest((high - low) / 2, kind), nearest((low + high) / 2, kind)
    numbers = pad((scale, centre, *bounds_inwards(low, high, kind)), kind)
    return quantile.UNIFORM_BETWEEN, numbers, outermost(np.array([-1, 1], kind), numbers, low, high)


def normal_sampling(draw: Normal, kind: Any) -> tuple[int, Numbers, Array]:
    stddev, mean, lower, upper, _ = draw
    centre = Fraction(mean)
    if lower == upper:
        stddev, centre = 0.0, centre + Fraction(lower) * Fraction(stddev)
    numbers = scale, middle = kind(stddev), nearest(centre, kind)
    scratch = quantile.normal_scratch(quantile.make_scratch(quantile.make_memory(1), 1, kind))
    words = np.iinfo(scratch.word.dtype)
    scratch.word[0::2], scratch.word[1::2] = words.min, words.max
    if stddev == 0 or (lower <= -REACH[kind] and upper >= REACH[kind]):
        return quantile.NORMAL, pad(numbers, kind), quantile.normal(scratch)[:2] * scale + middle
    low, high = at(lower, stddev, mean), at(upper, stddev, mean)
    bounds = bounds_inwards(low, high, kind)
    if upper <= 0:  # words count from the mean, or from the bound that is nearer to it
        lower, upper, scale = -upper, -lower, -scale
    numbers = scale, middle, *bounds, *between_numbers(lower, upper, kind)
    samples = quantile.normal_between(numbers, scratch)[:2]
    return quantile.NORMAL_BETWEEN, numbers, outermost(samples, numbers, low, high)


def outermost(samples: Array, numbers: Numbers, low: Fraction | float, high: Fraction | float) -> Array:
    """The weights of the outermost samples, or what is infinite on the way there."""
    scale, middle, *bounds = numbers[:4]
    products: Array = samples * scale
    weights = products + middle
    ends: Array = np.clip(weights, rounded(low, type(scale)), rounded(high, type(scale)))
    for found in (products, ends):
        if not np.isfinite(found).all():
            return found
    return ends.clip(*bounds)


def at(bound: float, stddev: float, mean: float) -> Fraction | float:
    """The weight there, exactly."""
    return bound if math.isinf(bound) else Fraction(bound) * Fraction(stddev) + Fraction(mean)


def between_numbers(lower: float, upper: float, kind: Any) -> Numbers:
    """Of the normal between two bounds, the upper one > 0: the last six of the kernel's Numbers.

    With u = erf(z / sqrt(2)) and word w, counted from the lowest, sample z is that of

        u(w) = u(lower) + (w + 1/2) * step,    step = (u(upper) - u(lower)) / 2**bits

    computed from the distance to the word where u changes its sign, and from the distance to its own end.
    """
    bits = 8 * np.dtype(kind).itemsize
    first, last = probability_within(lower), probability_within(upper)
    step = (last - first) / 2**bits
    split = min(max(0, math.ceil(-first / step - Fraction(1, 2))), 2**bits - 1)
    start = first + (split + Fraction(1, 2)) * step
    exact = step, start, step - start, 1 - last + step / 2, 1 + first + step / 2
    numbers = [nearest(number * 2 ** (bits - 1), kind) for number in exact]
    tiny = np.finfo(kind).tiny * kind(2.0 ** (bits - 1))  # below it a GPU would flush the sample to 0
    return *(x if abs(x) >= tiny else kind(0) for x in numbers), word_type(kind)(split - 2 ** (bits - 1))


def nearest(number: Fraction, kind: Any) -> Any:
    """Rounded to float64 and then to the type of the sample; never -0.0, of which maxima are not sure."""
    try:
        return kind(float(number)) + kind(0)
    except OverflowError:
        return kind(math.inf if number > 0 else -math.inf)


def rounded(end: Fraction | float, kind: Any) -> Any:
    """The same of an end, which may be infinite."""
    return kind(end) if isinstance(end, float) else nearest(end, kind)


def bounds_inwards(low: Fraction | float, high: Fraction | float, kind: Any) -> tuple[Any, Any]:
    """The outermost numbers of the type between two; where there is none, the one nearest to their middle."""
    ends = [rounded(end, kind) for end in (low, high)]
    if float(ends[0]) < low:
        ends[0] = np.nextafter(ends[0], kind(math.inf))
    if float(ends[1]) > high:
        ends[1] = np.nextafter(ends[1], kind(-math.inf))
    if ends[0] > ends[1]:
        ends = [nearest((Fraction(low) + Fraction(high)) / 2, kind)] * 2
    return ends[0] + kind(0), ends[1] + kind(0)


def pad(numbers: Numbers, kind: Any) -> Numbers:
    """With zeros for what the distribution has not."""
    return *numbers, *(kind(0),) * (9 - len(numbers)), word_type(kind)(0)


def word_type(kind: Any) -> Any:
    """The signed integer as wide."""
    return np.int64 if kind is np.float64 else np.int32
