"""The quantile: its coefficients, its accuracy, its bound."""

from __future__ import annotations

import math
import re

import fit_quantile
import numpy as np
import pytest
from mpmath import mp, mpf
from reference import exact_sample, signed

from gpuinit import quantile
from gpuinit.backends import cuda

MOST_ULP = 10  # the design's bound, in units in the last place of the exact sample


def test_the_coefficients_are_those_of_the_fit():
    for tables, suffix in (
        (fit_quantile.float32_coefficients(), ""),
        (fit_quantile.float64_coefficients(), "64"),
    ):
        for letter, coefficients in tables.items():
            assert coefficients == list(getattr(quantile, letter + suffix))
            assert all(coefficient > 0 for coefficient in coefficients)


@pytest.mark.parametrize(
    ("degrees", "error"), [(fit_quantile.FLOAT32_DEGREES, 1.7e-7), (fit_quantile.FLOAT64_DEGREES, 9.4e-18)]
)
def test_the_fit_is_as_good_as_it_says(degrees, error):
    assert fit_quantile.fit(*degrees)[2] < error


def defined(pattern: str) -> dict[str, str]:
    return dict(re.findall(rf"#define ({pattern}) (\S+)", cuda.source()))


def test_the_kernel_has_the_same_constants():
    for letter in "RYNQ":
        coefficients = getattr(quantile, letter)
        found = defined(rf"{letter}\d")
        assert list(found) == [f"{letter}{k}" for k in range(len(coefficients))]
        assert [np.float32(value.rstrip("f")) for value in found.values()] == list(coefficients)
    for name in ("R64", "N64", "Q64"):
        found = re.search(rf"double {name}\[\] = {{(.*?)}};", cuda.source(), re.DOTALL)
        assert [float(value) for value in found[1].split(",") if value.strip()] == list(
            getattr(quantile, name)
        )
    for name in ("PHILOX_M0", "PHILOX_M1", "PHILOX_W0", "PHILOX_W1", "PHILOX_ROUNDS"):
        assert int(defined(name)[name].rstrip("u"), 0) == getattr(quantile, name)
    for name in ("UNIFORM", "TRUNCATED_NORMAL"):
        assert int(defined(name)[name]) == getattr(quantile, name)


def test_the_weyl_increments_are_the_golden_ratio_and_the_root_of_three():
    with mp.workdps(30):
        assert int(mp.floor((mp.sqrt(5) - 1) / 2 * 2**32)) == quantile.PHILOX_W0
        assert int(mp.floor((mp.sqrt(3) - 1) * 2**32)) == quantile.PHILOX_W1


def edge_words() -> np.ndarray:
    """Words round 0 and round both ends of the signed range, in random company."""
    generator = np.random.default_rng(8)
    words = generator.integers(0, 2**32, (600, 4), dtype=np.uint32)
    near = np.arange(-100, 100)
    words[:, 0] = (np.concatenate([near, near + 2**31, near + 2**31 - 64]) % 2**32).astype(np.uint32)
    words[:, 1] = words[::-1, 0]
    return words


def ulp_of(exact: mpf, kind: type) -> float:
    return float(np.spacing(kind(abs(float(exact)))))


def largest_error(samples: np.ndarray, words: list[list[int]], bits: int) -> float:
    """In units in the last place of the exact sample."""
    errors = []
    with mp.workdps(40):
        for row, row_words in zip(samples, words, strict=True):
            for sample, word in zip(row, row_words, strict=True):
                exact = exact_sample(word, bits)
                error = abs(mpf(float(sample)) - exact)
                errors.append(float(error) / ulp_of(exact, type(sample)) if exact else float(error))
    return max(errors)


def random_words(n: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**32, (n, 4), dtype=np.uint32)


def signed64(words: np.ndarray) -> list[list[int]]:
    return [[signed(row[1] << 32 | row[0], 64), signed(row[3] << 32 | row[2], 64)] for row in words.tolist()]


def test_float32_samples_are_within_ten_ulp_of_the_exact_quantile(device):
    words = np.concatenate([random_words(400), edge_words()])
    samples = device.truncated_normal(words)
    assert samples.dtype == np.float32
    assert largest_error(samples, words.view(np.int32).tolist(), 32) < MOST_ULP


def test_float64_samples_are_within_ten_ulp_of_the_exact_quantile(device):
    words = random_words(600)
    words[::3, 1] = edge_words()[::3, 0]  # high halves: ends and centre
    samples = device.truncated_normal64(words)
    assert samples.dtype == np.float64
    assert largest_error(samples, signed64(words), 64) < MOST_ULP


def float64_of_word32(words: np.ndarray) -> np.ndarray:
    """The float64 samples of the same u: the word above 32 zero bits."""
    import conftest

    high = words.reshape(-1, 2)
    wide = np.zeros((len(high), 4), np.uint32)
    wide[:, 1], wide[:, 3] = high[:, 0], high[:, 1]
    return conftest.Cpu().truncated_normal64(wide).reshape(words.shape)


def test_a_million_float32_samples_are_within_ten_ulp_of_the_float64_ones(device):
    words = random_words(2**18)
    samples, exact = device.truncated_normal(words), float64_of_word32(words)
    error = np.abs(samples.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert error.max() < MOST_ULP


def test_a_wrong_coefficient_is_seen(monkeypatch):
    import conftest

    wrong = (quantile.Q[0] * np.float32(1 + 4e-6), quantile.Q[1])
    monkeypatch.setattr(quantile, "Q", wrong)
    words = random_words(400)
    samples = conftest.Cpu().truncated_normal(words)
    assert largest_error(samples, words.view(np.int32).tolist(), 32) > MOST_ULP


def test_no_sample_is_beyond_the_bound_and_both_ends_are_reached(device):
    words = random_words(2**16)
    # The 64 highest words and the 65 lowest round to u = +-1; take them and more, in random company.
    words[:, 0] = (2**31 - 100 + np.arange(2**16) % 200).astype(np.uint32)
    samples = device.truncated_normal(words)
    assert np.abs(samples).max() == 1
    u = words[:, 0].view(np.int32).astype(np.float32) * np.float32(2**-31)
    ends = np.abs(u) == 1
    assert len(set(words[ends, 0])) == 64 + 65
    assert (samples[ends, 0] * u[ends] >= 1 - MOST_ULP * 2**-24).all()


def test_a_sample_is_odd_in_its_word(device):
    words = random_words(1000)
    words[0] = 0
    mirrored = (-words.astype(np.int64) % 2**32).astype(np.uint32)
    samples = device.truncated_normal(words)
    assert (device.truncated_normal(mirrored) == -samples).all()
    assert (samples[0] == 0).all()
    assert (np.sign(samples) == np.sign(words.view(np.int32))).all()


def test_the_centre_has_the_slope_of_the_exact_quantile():
    c = math.erf(math.sqrt(2)) / 2
    r0, _, r2, r3 = map(float, quantile.R)
    y = math.prod(map(float, quantile.Y))
    q0, q1 = map(float, quantile.Q)
    slope = r0 + (y + float(quantile.N[0])) * (r2 + r3 / (y * q1 + q0))
    assert slope == pytest.approx(c * math.sqrt(2 * math.pi) / 2, rel=2e-7)
