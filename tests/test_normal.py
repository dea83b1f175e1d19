"""The normal and the normal between any bounds: accuracy, ends, and the same samples on every device."""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

import conftest
import numpy as np
import pytest
from mpmath import mp, mpf

import gpuinit
from gpuinit import exact, quantile
from gpuinit.distributions import Normal, find_sampling
from gpuinit.exact import REACH, between_numbers, probability_within

KINDS = (np.float32, np.float64)
INF = math.inf

# Wide and narrow, one-sided, asymmetric, far out, and bounds round the mean.
BETWEEN = (
    *((-3, 3), (-1, 1), (-0.5, 0.5), (-1e-3, 1e-3), (-5, 5), (-6.3, 6.3), (-2, 2), (-2, 2.0000001)),
    *((-1, 2.5), (-0.5, 4), (-4, 0.5), (-1e-9, 3), (-3, 1e-12), (-6.2, INF), (-INF, 1), (-1, INF)),
    *((0, INF), (-INF, 0), (0, 1), (-1, 0), (1, 2), (1, 1.0001), (1e-3, 0.00100001), (0, 1e-20)),
    *((3, INF), (-INF, -3), (6, INF), (5, 6), (-6, -5), (8.5, 9), (-9, -8.5)),
)


def word_bits(kind) -> int:
    return 8 * np.dtype(kind).itemsize


def words_of(kind, near: list[int], n: int = 24) -> np.ndarray:
    """Rows of four words of 32 bits: those near some signed ones of the kind's width, and random ones."""
    bits = word_bits(kind)
    whole = [(x + step) % 2**bits for x in near for step in range(-3, 4)]
    generator = np.random.default_rng(31)
    whole += [int.from_bytes(generator.bytes(bits // 8), "little") for _ in range(n)]
    whole += [0] * (-len(whole) % 4)
    return np.array(whole, f"<u{bits // 8}").view(np.uint32).reshape(-1, 4)


def signed(words: np.ndarray, kind) -> list[int]:
    return words.reshape(-1).view(f"i{np.dtype(kind).itemsize}").tolist()


def ulps(samples: np.ndarray, exact: list[mpf], kind) -> list[float]:
    errors = []
    for sample, z in zip(samples.reshape(-1), exact, strict=True):
        unit = float(np.spacing(kind(abs(float(z))))) if z else 1.0
        errors.append(float(abs(mpf(float(sample)) - z) / mpf(unit)))
    return errors


def exact_normal(words: list[int], kind) -> list[mpf]:
    half = mpf(2) ** (word_bits(kind) - 1) + mpf(1) / 2
    return [mp.sqrt(2) * mp.erfinv(word / half) for word in words]


@pytest.mark.parametrize(("kind", "most"), [(np.float32, 4), (np.float64, 3)])
def test_the_normal_is_within_a_few_ulp_of_the_exact_quantile(kind, most):
    ends = [0, 2 ** (word_bits(kind) - 1), *(2**k for k in range(0, word_bits(kind) - 1, 3))]
    words = words_of(kind, ends, 600)
    samples = conftest.Cpu().normal(words, kind)
    with mp.workdps(60):
        inside = [word != -(2 ** (word_bits(kind) - 1)) for word in signed(words, kind)]
        exact = exact_normal([w for w, ok in zip(signed(words, kind), inside, strict=True) if ok], kind)
        assert max(ulps(samples.reshape(-1)[inside], exact, kind)) < most


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_coefficient_is_seen(kind, monkeypatch):
    table = quantile.segments(np.dtype(kind))
    columns = table.columns.copy()
    columns[0] *= kind(1 + 4 * np.finfo(kind).eps)
    monkeypatch.setattr(quantile, "segments", lambda dtype: table._replace(columns=columns))
    words = words_of(kind, [0], 600)
    with mp.workdps(60):
        exact = exact_normal(signed(words, kind), kind)
        assert max(ulps(conftest.Cpu().normal(words, kind), exact, kind)) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_normal_is_odd_finite_and_reaches_what_bounds_are_compared_with(device, kind):
    least = -(2 ** (word_bits(kind) - 1))
    words = words_of(kind, [0, least], 100)
    samples, values = device.normal(words, kind).reshape(-1), signed(words, kind)
    by_word = dict(zip(values, samples.tolist(), strict=True))
    assert by_word[0] == 0
    assert math.copysign(1, by_word[0]) == 1
    assert by_word[least] == -REACH[kind] == samples.min()
    assert 0 < max(samples) < REACH[kind]
    for word, sample in by_word.items():
        if -word in by_word and word != least:
            assert by_word[-word] == -sample
    mirrored = device.normal((-words.view(f"i{np.dtype(kind).itemsize}")).view(np.uint32), kind).reshape(-1)
    inner = np.array(values) != least
    assert (mirrored[inner] == -samples[inner]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_normal_of_every_device_is_numpys(device, kind):
    words = words_of(kind, [0, 2 ** (word_bits(kind) - 1), *(2**k for k in range(word_bits(kind) - 1))], 4000)
    assert device.normal(words, kind).tobytes() == conftest.Cpu().normal(words, kind).tobytes()


# Between bounds


def numbers_of(lower: float, upper: float, kind) -> tuple:
    zeros = (kind(0),) * 4
    return *zeros, *between_numbers(lower, upper, kind)


def near_of(numbers: tuple) -> list[int]:
    """The ends, the words of least magnitude and where the samples change their sign."""
    bits = word_bits(type(numbers[0]))
    return [-(2 ** (bits - 1)), 2 ** (bits - 1) - 4, 0, int(numbers[-1])]


def exact_between(words: list[int], lower: float, upper: float, kind) -> list[mpf]:
    """The quantile of the middle of each word's share."""
    first, last = (mp.erf(mpf(bound) / mp.sqrt(2)) for bound in (lower, upper))
    size = mpf(2) ** word_bits(kind)
    shares = [(word + size / 2 + mpf(1) / 2) / size for word in words]
    return [mp.sqrt(2) * mp.erfinv(first + share * (last - first)) for share in shares]


@pytest.mark.parametrize(("kind", "most"), [(np.float32, 6), (np.float64, 10)])
@pytest.mark.parametrize(("lower", "upper"), BETWEEN)
def test_samples_between_bounds_are_within_a_few_ulp_of_the_exact_quantile(lower, upper, kind, most):
    mirrored = upper <= 0
    inner = (-upper, -lower) if mirrored else (lower, upper)
    numbers = numbers_of(*inner, kind)
    words = words_of(kind, near_of(numbers))
    samples = np.clip(conftest.Cpu().normal(words, kind, numbers), kind(inner[0]), kind(inner[1]))
    with mp.workdps(80):
        assert max(ulps(samples, exact_between(signed(words, kind), *inner, kind), kind)) < most


@pytest.mark.parametrize("change", [(4, 1 + 1e-5), (5, 1.001), (8, 1 + 1e-5)], ids=["step", "start", "tail"])
def test_a_wrong_number_is_seen(change):
    place, factor = change
    numbers = list(numbers_of(-1, 2.5, np.float32))
    words = words_of(np.float32, near_of(numbers))
    numbers[place] *= np.float32(factor)
    with mp.workdps(60):
        exact = exact_between(signed(words, np.float32), -1, 2.5, np.float32)
        samples = conftest.Cpu().normal(words, np.float32, tuple(numbers))
        assert max(ulps(samples, exact, np.float32)) > 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lower", "upper"), [(-3, 3), (-1, 2.5), (-3, 1e-12), (3, INF), (0, 1), (8.5, 9)])
def test_samples_between_bounds_are_numpys_on_every_device(device, lower, upper, kind):
    numbers = numbers_of(lower, upper, kind)
    words = words_of(kind, near_of(numbers), 1000)
    expected = conftest.Cpu().normal(words, kind, numbers)
    assert device.normal(words, kind, numbers).tobytes() == expected.tobytes()


def test_probabilities_are_the_same_whatever_the_callers_decimal_context():
    probability_within.cache_clear()
    expected = [probability_within(x) for x in (0.3, 2.5, 7.0)]
    probability_within.cache_clear()
    context = decimal.Context(5, decimal.ROUND_UP, traps=[decimal.Inexact, decimal.Rounded])
    with decimal.localcontext(context):
        assert [probability_within(x) for x in (0.3, 2.5, 7.0)] == expected


def test_probabilities_are_exact_to_seventy_digits():
    with mp.workdps(120):
        for x in (1e-300, 1e-3, 0.5, 1.0, 2.0, 5.999, 6.0, 6.5, 9.1, 13.0, 38.0):
            found = probability_within(x)
            exact = mp.erf(mpf(x) / mp.sqrt(2))
            assert abs(mpf(found.numerator) / found.denominator / exact - 1) < mpf(10) ** -70
            tail = 1 - found  # whose own digits count far out
            least = mpf(10) ** (-85 if x < 6 else -60) / (mp.erfc(mpf(x) / mp.sqrt(2)) if x < 6 else 1)
            difference = mpf(tail.numerator) / tail.denominator / mp.erfc(mpf(x) / mp.sqrt(2)) - 1
            assert abs(difference) < max(least, mpf(10) ** -60)
            assert probability_within(-x) == -found
    assert probability_within(INF) == 1


# Weights


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("lower", "upper"), BETWEEN)
@pytest.mark.parametrize(("stddev", "mean"), [(1.0, 0.0), (0.3, 0.1), (1e-3, -7.0)])
def test_no_weight_is_beyond_its_bounds(lower, upper, stddev, mean, dtype):
    w = gpuinit.truncated_normal(
        4000, stddev, mean, lower, upper, seed=3, dtype=dtype, device="cpu", name=f"{lower} {upper}"
    )
    assert np.isfinite(w).all()
    low, high = (
        bound if math.isinf(bound) else Fraction(bound) * Fraction(stddev) + Fraction(mean)
        for bound in (lower, upper)
    )
    between = [x for x in (float(w.min()), float(w.max())) if low <= x <= high]
    if len(between) < 2:  # only where no number of the type lies between the bounds
        assert w.min() == w.max()
        step = np.spacing(np.abs(w[0]))
        assert w[0] - step < low
        assert w[0] + step > high


def test_a_weight_is_the_sample_times_stddev_and_then_plus_the_mean(device):
    keywords = {"seed": 5, "device": device.name}
    for kind, dtype in ((np.float32, "float32"), (np.float64, "float64")):
        z = device.numpy(gpuinit.normal(4099, 1.0, dtype=dtype, **keywords))
        w = device.numpy(gpuinit.normal(4099, 0.3, -0.7, dtype=dtype, **keywords))
        assert w.tobytes() == (z * kind(0.3) + kind(-0.7)).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_two_standard_deviations_round_0_keep_their_bits(dtype):
    keywords = {"seed": 6, "dtype": dtype, "device": "cpu"}
    limit = gpuinit.truncated_normal(1001, 0.3, 0.0, -2.0, 2.0, **keywords)
    assert limit.tobytes() == gpuinit.truncated_normal(1001, 0.3, **keywords).tobytes()
    sampling = find_sampling(Normal(0.3, 0.0, -2.0, 2.0, ("stddev", 0.3)), np.dtype(np.float32))
    assert sampling == (quantile.TRUNCATED_NORMAL, (np.float32(0.3) * 2,))


def test_bounds_that_no_word_reaches_are_the_normal(device):
    keywords = {"seed": 7, "device": device.name}
    for dtype, kind in (("float32", np.float32), ("bfloat16", np.float32), ("float64", np.float64)):
        w = device.numpy(gpuinit.normal(999, 0.02, 0.5, dtype=dtype, **keywords))
        for bound in (REACH[kind], 100.0, 1e300, INF):
            cut = gpuinit.truncated_normal(999, 0.02, 0.5, -bound, bound, dtype=dtype, **keywords)
            assert device.numpy(cut).tobytes() == w.tobytes()
    inside = float(np.nextafter(REACH[np.float32], 0))
    assert (
        find_sampling(Normal(1.0, 0.0, -inside, INF, ("", 1.0)), np.dtype("f4"))[0] == quantile.NORMAL_BETWEEN
    )


def test_bounds_below_the_mean_are_minus_those_above(device):
    keywords = {"seed": 8, "device": device.name}
    for lower, upper in ((0, 1), (0.5, INF), (3, 4)):
        above = device.numpy(gpuinit.truncated_normal(999, 1.5, 0.0, lower, upper, **keywords))
        below = device.numpy(gpuinit.truncated_normal(999, 1.5, 0.0, -upper, -lower, **keywords))
        assert (below == -above).all()


def test_a_bound_in_weights_is_rounded_inwards():
    third = Fraction(1, 3)
    for kind in KINDS:
        low, high = exact.bounds_inwards(-third, third, kind)
        assert Fraction(float(low)) > -third > Fraction(float(np.nextafter(low, kind(-1))))
        assert Fraction(float(high)) < third < Fraction(float(np.nextafter(high, kind(1))))
        assert exact.bounds_inwards(third, third, kind) == (kind(1 / 3),) * 2


@pytest.mark.parametrize(
    ("dtype", "arguments", "argument"),
    [
        ("float16", (60000.0, -60000.0, 0.5, 1.5), None),
        ("float16", (1000.0, 0.0, -3.0, 100.0), None),
        ("float16", (1e5, -1e5, 0.99, 1.01), None),
        ("float32", (2e38, -2e38, 0.5, 1.5), None),
        ("float64", (1e308, -1e308, 0.5, 1.5), None),
        ("float16", (60000.0, -60000.0, 0.5, 2.5), "stddev"),
        ("float32", (2e38, -3e38, 1.0, 3.0), "mean"),  # the product on the way is infinite, no weight is
        ("float32", (1e38, 0.0, -1.0, INF), "stddev"),
        ("float32", (1.0, 0.0, 1e308, 1e308), "lower"),
        ("float16", (1.0, 1e5, -1.0, 3.0), "mean"),
    ],
)
def test_weights_that_could_be_infinite_are_refused_and_no_others(dtype, arguments, argument):
    if argument is None:
        made = gpuinit.truncated_normal(1000, *arguments, seed=1, dtype=dtype, device="cpu")
        assert np.isfinite(made).all()
        return
    with pytest.raises(
        ValueError, match=rf"^{argument} must leave the weights finite in {dtype}, got {argument} "
    ):
        gpuinit.truncated_normal(1000, *arguments, seed=1, dtype=dtype, device="cpu")


def test_uniform_weights_that_could_be_infinite_are_refused():
    for low, high, argument in ((3e38, 4e38, "high"), (-4e38, 3e38, "low"), (0.0, 1e39, "high")):
        with pytest.raises(ValueError, match=rf"^{argument} must leave the weights finite in float32"):
            gpuinit.uniform(3, low, high, device="cpu")


def test_a_sample_next_to_the_mean_is_no_subnormal_number(device):
    """A GPU would flush it, and a large stddev would show that."""
    for power in range(64, 73):
        numbers = between_numbers(-(2.0**-power), (2**33 - 1) * 2.0**-power, np.float32)
        words = words_of(np.float32, near_of((np.float32(0), *numbers)))
        samples = device.normal(words, np.float32, (np.float32(0),) * 4 + numbers)
        assert (np.abs(samples[samples != 0]) >= np.finfo(np.float32).tiny).all()
