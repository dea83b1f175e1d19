"""The distribution of the weights, against the exact truncated normal, on every device.

Every statistic is asked to lie within six standard errors: a false alarm once in 5e8 tests of a correct
sampler (the seeds are fixed, so a test that passes once passes always). Each has a control: a sampler with a
known fault that it must reject.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
import pytest
from mpmath import mp, mpf

import gpuinit
from gpuinit.__main__ import EXPECTED_KURTOSIS

N = 2**24
SIGMAS = 6
FALSE_ALARM = 1e-9  # of the DKW test

NORMAL = NormalDist()
MASS = NORMAL.cdf(2) - NORMAL.cdf(-2)


def exact_moments(highest: int) -> list[float]:
    """E z**k of the unit normal truncated at +-2: E z**k = (k-1) E z**(k-2) - 2 * 2**(k-1) pdf(2) / MASS."""
    moments = [1.0, 0.0]
    for k in range(2, highest + 1):
        edge = 2 * 2 ** (k - 1) * NORMAL.pdf(2) / MASS if k % 2 == 0 else 0.0
        moments.append((k - 1) * moments[k - 2] - edge)
    return moments


EXACT = exact_moments(16)


def test_the_exact_moments_are_the_published_ones():
    assert EXACT[2] == pytest.approx(0.7737413035, abs=1e-10)
    assert EXACT[4] / EXACT[2] ** 2 == pytest.approx(2.3655367172, abs=1e-9)
    assert pytest.approx(EXACT[4] / EXACT[2] ** 2, abs=1e-10) == EXPECTED_KURTOSIS


def moment_scores(z: np.ndarray) -> list[float]:
    """Moments 1 to 8, in standard errors from the exact ones."""
    scores = []
    power = np.ones_like(z)
    for k in range(1, 9):
        power *= z
        error = math.sqrt((EXACT[2 * k] - EXACT[k] ** 2) / z.size)
        scores.append((power.mean() - EXACT[k]) / error)
    return scores


def shape_scores(z: np.ndarray) -> dict[str, float]:
    """Mean, variance, skewness and kurtosis, in standard errors (by the delta method) from the exact ones."""
    m1, m2, m3, m4 = (float(np.mean(z**k)) for k in (1, 2, 3, 4))
    n, (_, _, v, _, f, _, s, _, e, *_) = z.size, EXACT
    return {
        "mean": m1 / math.sqrt(v / n),
        "variance": (m2 - v) / math.sqrt((f - v**2) / n),
        "skewness": (m3 - 3 * v * m1) / math.sqrt((s - 6 * v * f + 9 * v**3) / n),
        "kurtosis": (m4 / m2**2 - f / v**2)
        / math.sqrt((e - f**2 - 4 * f / v * (s - f * v) + 4 * f**2 / v**2 * (f - v**2)) / v**4 / n),
    }


def dkw_distance(z: np.ndarray) -> float:
    """Largest distance of the empirical from the exact distribution function, at 4095 exact quantiles."""
    levels = np.arange(1, 4096) / 4096
    points = [NORMAL.inv_cdf(NORMAL.cdf(-2) + level * MASS) for level in levels]
    counts, _ = np.histogram(z, [-np.inf, *points, np.inf])
    return float(np.abs(np.cumsum(counts)[:-1] / z.size - levels).max())


def dkw_bound(n: int) -> float:
    """Exceeded with probability at most FALSE_ALARM (Dvoretzky-Kiefer-Wolfowitz, Massart's constant)."""
    return math.sqrt(math.log(2 / FALSE_ALARM) / (2 * n))


def failures(z: np.ndarray) -> list[str]:
    """Names of the tests that z fails."""
    found = [f"moment {k}" for k, score in enumerate(moment_scores(z), 1) if abs(score) > SIGMAS]
    found += [name for name, score in shape_scores(z).items() if abs(score) > SIGMAS]
    if dkw_distance(z) > dkw_bound(z.size):
        found.append("DKW")
    if np.abs(z).max() > 2 * (1 + 2**-20):
        found.append("truncation")
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_have_the_exact_distribution(device, dtype):
    w = gpuinit.truncated_normal(N, 1.0, seed=20, dtype=dtype, device=device.name)
    assert failures(device.numpy(w).astype(np.float64)) == []


def test_he_normal_has_its_standard_deviation(device):
    w = device.numpy(gpuinit.he_normal((1024, 2**14), seed=21, device=device.name))
    scale = math.sqrt(2 / 1024) / math.sqrt(EXACT[2])
    assert failures(w.astype(np.float64).reshape(-1) / scale) == []


def test_the_bound_is_bit_exact_in_every_dtype(device):
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        w = device.numpy(gpuinit.he_normal((4096, 2048), seed=22, dtype=dtype, device=device.name))
        kind = np.float64 if dtype == "float64" else np.float32
        scale = kind(math.sqrt(2 / 4096) / 0.87962566103423976)
        assert np.abs(w).max() <= (2 * scale).astype(w.dtype)


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    """N values of an untruncated normal from NumPy's own generator."""
    return np.random.default_rng(23).standard_normal(N)


def test_an_exact_sampler_of_another_make_passes(normal):
    """Numbers of NumPy's, cut by rejection: the tests accept what is right whoever made it."""
    cut = normal[np.abs(normal) <= 2]
    assert failures(cut) == []


def test_a_scale_wrong_by_one_percent_is_rejected(normal):
    cut = normal[np.abs(normal) <= 2]
    for scale in (0.99, 1.01):
        assert {"variance", "DKW"} <= set(failures(cut * scale))


def test_a_missing_truncation_is_rejected(normal):
    assert {"variance", "kurtosis", "DKW", "truncation"} <= set(failures(normal))


def test_a_shift_and_a_skew_are_rejected(normal):
    cut = normal[np.abs(normal) <= 2]
    assert {"mean", "DKW"} <= set(failures(cut + 0.003))
    assert "skewness" in failures(cut + 0.002 * (cut**2 - 1))


def test_uniform_weights_have_the_exact_distribution(device):
    u = device.numpy(gpuinit.uniform(N, 1.0, seed=24, device=device.name)).astype(np.float64)
    for k in range(1, 7):
        exact, square = (0 if k % 2 else 1 / (k + 1)), 1 / (2 * k + 1)
        assert abs(np.mean(u**k) - exact) < SIGMAS * math.sqrt((square - exact**2) / N)
    levels = np.arange(1, 4096) / 4096
    counts, _ = np.histogram(u, [-np.inf, *(2 * levels - 1), np.inf])
    assert np.abs(np.cumsum(counts)[:-1] / N - levels).max() < dkw_bound(N)
    assert np.abs(u).max() <= 1


# Independence


def correlation_score(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two equally long samples, in standard errors from 0."""
    return float(np.mean(a * b) / EXACT[2] * math.sqrt(a.size))


def sample(device, n: int = 2**20, **keywords) -> np.ndarray:
    w = gpuinit.truncated_normal(n, 1.0, device=device.name, **keywords)
    return device.numpy(w).astype(np.float64)


def test_neighbouring_seeds_are_independent(device):
    for seed in (0, 1, 2**31, 2**32 - 1):
        first = sample(device, seed=seed)
        for other in (seed + 1, seed + 2**32, seed + 2**63):
            assert abs(correlation_score(first, sample(device, seed=other))) < SIGMAS


def test_names_are_independent(device):
    names = [None, "", "a", "b", "layer.0.weight", "layer.1.weight", "layer.10.weight"]
    samples = [sample(device, n=2**18, seed=5, name=name) for name in names]
    for i, first in enumerate(samples):
        for second in samples[:i]:
            assert abs(correlation_score(first, second)) < SIGMAS


def test_lags_are_independent(device):
    z = sample(device, seed=6)
    for lag in (1, 2, 3, 4, 5, 8, 17, 256, 1024):
        assert abs(correlation_score(z[:-lag], z[lag:])) < SIGMAS
        squares = (z**2 - EXACT[2]) * math.sqrt(EXACT[2] / (EXACT[4] - EXACT[2] ** 2))
        assert abs(correlation_score(squares[:-lag], squares[lag:])) < SIGMAS


def test_dependence_is_rejected(device):
    """Controls: the same seed, a name forgotten, a word used twice, one part in fifty in common."""
    z = sample(device, seed=7)
    assert correlation_score(z, sample(device, seed=7)) > SIGMAS
    twice = z.reshape(-1, 4)[:, [0, 1, 2, 2]].reshape(-1)
    assert correlation_score(twice[:-1], twice[1:]) > SIGMAS
    other = sample(device, seed=8)
    assert correlation_score(z, 0.02 * z + math.sqrt(1 - 0.02**2) * other) > SIGMAS


def test_a_thousand_seeds_have_a_thousand_first_weights(device):
    first = {
        device.numpy(gpuinit.uniform(1, 1.0, seed=seed, dtype="float64", device=device.name)).item()
        for seed in range(1000)
    }
    assert len(first) == 1000


# The normal, cut nowhere and anywhere: 2**26 weights each, by NumPy's engine, whose bits all devices have.

LARGE = 2**26
CHUNK = 2**22
ORDERS = range(1, 13)
LEVELS = np.arange(1, 1024) / 1024
TAILS = (-6.0, -5.5, -5.0, -4.75, -4.5, -4.0, 4.0, 4.5, 4.75, 5.0, 5.5, 6.0)
LEAST_EXPECTED = 40  # beyond a tail's border: fewer would not be missed, as 6 * sqrt(36) = 36
BOUNDS = [(-math.inf, math.inf), (-3.0, 3.0), (-1.0, 2.5), (3.0, math.inf)]


class Exact:
    """Moments, quantiles and tail probabilities of the unit normal between two bounds, by mpmath."""

    def __init__(self, lower: float, upper: float) -> None:
        with mp.workdps(30):
            a, b = mpf(lower), mpf(upper)
            within = mp.ncdf(-a) - mp.ncdf(-b)
            ends = [(sign, x) for sign, x in ((1, a), (-1, b)) if mp.isfinite(x)]
            moments = [mpf(1), sum(sign * mp.npdf(x) for sign, x in ends) / within]
            for k in range(2, 25):  # E z**k = (k-1) E z**(k-2) + what stands at the ends
                edge = sum(sign * x ** (k - 1) * mp.npdf(x) for sign, x in ends)
                moments.append((k - 1) * moments[k - 2] + edge / within)
            self.moments = [float(m) for m in moments]
            above = [(1 - level) * within + mp.ncdf(-b) for level in LEVELS]
            self.points = [float(-mp.sqrt(2) * mp.erfinv(2 * tail - 1)) for tail in above]
            self.tails = {}
            for t in TAILS:
                end = b if t > 0 else -a
                if lower < t < upper:
                    self.tails[t] = float((mp.ncdf(-abs(t)) - mp.ncdf(-end)) / within)


@functools.cache
def exact_between(lower: float, upper: float) -> Exact:
    return Exact(lower, upper)


def faults(z: np.ndarray, lower: float, upper: float) -> set[str]:
    """What the weights fail of moments 1 to 12, each within SIGMAS, the DKW test with a false alarm of
    FALSE_ALARM, the counts beyond the borders of TAILS within SIGMAS of Poisson's, and the bounds.
    """
    exact = exact_between(lower, upper)
    sums, below = np.zeros(len(ORDERS)), np.zeros(len(LEVELS) + 1)
    beyond = {t: 0 for t, tail in exact.tails.items() if tail * z.size >= LEAST_EXPECTED}
    for start in range(0, z.size, CHUNK):
        chunk = z[start : start + CHUNK].astype(np.float64)
        below += np.bincount(np.searchsorted(exact.points, chunk), minlength=len(LEVELS) + 1)
        for t in beyond:
            beyond[t] += int((chunk > t if t > 0 else chunk < t).sum())
        power = np.ones_like(chunk)
        for k in ORDERS:
            power *= chunk
            sums[k - 1] += power.sum()
    found = set()
    for k in ORDERS:
        error = math.sqrt((exact.moments[2 * k] - exact.moments[k] ** 2) / z.size)
        if abs(sums[k - 1] / z.size - exact.moments[k]) > SIGMAS * error:
            found.add(f"moment {k}")
    if np.abs(np.cumsum(below)[:-1] / z.size - LEVELS).max() > dkw_bound(z.size):
        found.add("DKW")
    for t, count in beyond.items():
        expected = exact.tails[t] * z.size
        if abs(count - expected) > SIGMAS * math.sqrt(expected):
            found.add(f"tail {t}")
    if z.min() < lower or z.max() > upper:
        found.add("bounds")
    return found


@functools.lru_cache(maxsize=1)  # each has 256 MiB
def large(lower: float, upper: float) -> np.ndarray:
    return gpuinit.truncated_normal(LARGE, 1.0, 0.0, lower, upper, seed=30, device="cpu")


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_normal_between_any_bounds_has_its_distribution(bounds):
    assert faults(large(*bounds), *bounds) == set()


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_same_half_a_percent_too_wide_is_rejected(bounds):
    """The control of moments and distribution function, with a quarter of the weights."""
    assert {"moment 2", "moment 4", "DKW"} <= faults(large(*bounds)[::4] * np.float32(1.006), *bounds)


def test_a_tail_that_is_too_thin_is_rejected():
    """The control of the counts: the samples beyond 4.6 drawn in, which no low moment shows."""
    z = large(*BOUNDS[0])
    found = faults(np.where(np.abs(z) > 4.6, np.sign(z) * np.float32(4.55), z), *BOUNDS[0])
    assert {"tail 4.75", "tail -4.75"} <= found
    assert not {"moment 1", "moment 2", "DKW", "tail 4.5", "tail 4.0"} & found


@pytest.mark.parametrize(("made", "claimed"), [((-3.0, 3.0), BOUNDS[0]), (BOUNDS[0], (-3.0, 3.0))])
def test_a_cut_that_is_missing_or_too_many_is_rejected(made, claimed):
    found = faults(large(*made)[::4], *claimed)
    assert {"moment 2", "moment 12", "DKW"} <= found
    assert ("bounds" in found) == (made == BOUNDS[0])
