"""Fans, and the width of the distribution that follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp

import gpuinit
from gpuinit.distributions import (
    DISTRIBUTIONS,
    GLOROT_UNIFORM,
    HE_NORMAL,
    HE_UNIFORM,
    MODES,
    TRUNCATED_STD,
    Recipe,
    Uniform,
    draw_of,
)
from gpuinit.fans import fans
from gpuinit.initializers import find_draw


def test_the_standard_deviation_of_the_truncated_normal():
    with mp.workdps(30):
        exact = mp.sqrt(1 - 4 * mp.npdf(2) / (2 * mp.ncdf(2) - 1))
        assert float(exact) == TRUNCATED_STD == 0.87962566103423978  # as Keras and JAX write it


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((7,), (7, 7)),
        ((100, 64), (100, 64)),  # Dense
        ((5, 10, 20), (50, 100)),  # Conv1D
        ((3, 3, 16, 32), (144, 288)),  # Conv2D
        ((3, 4, 5, 6, 7), (360, 420)),  # Conv3D
        ((0, 5), (0, 5)),
    ],
)
def test_default_axes_give_the_fans_of_keras(shape, expected):
    assert fans(shape, -2, -1, ()) == expected


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((64, 100), (1, 0, ()), (100, 64)),  # torch Linear, (out, in)
        ((32, 16, 3, 3), (1, 0, ()), (144, 288)),  # torch Conv2d
        ((8, 100, 64), (-2, -1, 0), (100, 64)),  # eight stacked experts
        ((8, 100, 64), (1, 2, ()), (800, 512)),
        ((512, 8, 64), (0, (1, 2), ()), (512, 512)),  # attention projection, heads of the output
        ((8, 64, 512), ((0, 1), -1, ()), (512, 512)),
        ((3, 3, 256, 1), ((), 3, 2), (9, 9)),  # depthwise
        ((9,), (0, (), ()), (9, 1)),
        ((9,), ((), (), 0), (1, 1)),
        ((9,), (np.int64(0), [], ()), (9, 1)),
    ],
)
def test_axes_can_be_named(shape, axes, expected):
    assert fans(shape, *axes) == expected


@pytest.mark.parametrize(
    ("function", "std"),
    [
        ("he_normal", math.sqrt(2 / 300)),
        ("he_uniform", math.sqrt(2 / 300)),
        ("glorot_normal", math.sqrt(2 / 1100)),
        ("glorot_uniform", math.sqrt(2 / 1100)),
        ("lecun_normal", math.sqrt(1 / 300)),
        ("lecun_uniform", math.sqrt(1 / 300)),
    ],
)
def test_the_family_has_its_standard_deviations(function, std):
    """Within six standard errors of the variance; the kurtosis is 2.37 or 1.8, so 2.37 bounds both."""
    w = getattr(gpuinit, function)((300, 800), seed=1, device="cpu").astype(np.float64)
    error = math.sqrt((2.3656 - 1) / w.size)
    assert abs(np.mean(w**2) / std**2 - 1) < 6 * error
    limit = math.sqrt(3) * std if "uniform" in function else 2 * std / TRUNCATED_STD
    assert 0.999 * limit < np.abs(w).max() <= limit * (1 + 1e-6)


def test_a_fan_below_one_counts_as_one():
    assert draw_of(HE_NORMAL, 0, 5) == draw_of(HE_NORMAL, 1, 5)
    assert draw_of(HE_NORMAL, 0, 5).stddev == math.sqrt(2) / TRUNCATED_STD
    assert draw_of(HE_UNIFORM, 0, 5).high == math.sqrt(6)
    assert draw_of(GLOROT_UNIFORM, 0, 1).high == math.sqrt(3)
    assert draw_of(HE_UNIFORM._replace(mode="fan_geo_avg"), 0, 7).high == math.sqrt(6)


SCALES = (1.0, 2.0, 3.0, 0.1, 1 / 3, 1e10, 7e-200, 5e307, 1e308, 1.797e308, 1e-300, 1e-310, 5e-324)
FANS = ((1, 1), (3, 7), (0, 9), (2**31, 2**31 - 1), (2**62, 1), (2**62, 2**62 - 3), (2**63 - 1, 2**63 - 1))


def width_of(scale, mode, distribution, fan_in, fan_out):
    draw = draw_of(Recipe(distribution, scale, mode), fan_in, fan_out)
    return draw.high if isinstance(draw, Uniform) else draw.stddev


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_width_is_lost_on_the_way(mode, distribution):
    """Within a few roundings of the formula, whatever the scale and the fans are."""
    divisor, factor = {
        "truncated_normal": (TRUNCATED_STD, 1),
        "untruncated_normal": (1, 1),
        "uniform": (1, 3),
    }[distribution]
    for scale in SCALES:
        for fan_in, fan_out in FANS:
            with mp.workdps(40):
                fan = {
                    "fan_in": mp.mpf(fan_in),
                    "fan_out": mp.mpf(fan_out),
                    "fan_avg": (mp.mpf(fan_in) + fan_out) / 2,
                    "fan_geo_avg": mp.sqrt(mp.mpf(fan_in) * fan_out),
                }[mode]
                exact = mp.sqrt(factor * mp.mpf(scale) / max(1, fan)) / divisor
                assert abs(width_of(scale, mode, distribution, fan_in, fan_out) / exact - 1) < 2.5 * 2.0**-53


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_width_is_that_of_the_formula_in_float64_operation_by_operation(distribution):
    """So that bits stay: what a way round overflow must not change. Powers of 4 cost no digit."""
    for scale in np.random.default_rng(1).uniform(0.1, 10, 300).tolist():
        for fan_in, fan_out in FANS:
            fan = max(1, (fan_in + fan_out) / 2)
            plain = {
                "truncated_normal": math.sqrt(scale / fan) / TRUNCATED_STD,
                "untruncated_normal": math.sqrt(scale / fan),
                "uniform": math.sqrt(3 * scale / fan),
            }[distribution]
            assert width_of(scale, "fan_avg", distribution, fan_in, fan_out) == plain
            for power in (-500, -100, 1, 510):
                width = width_of(scale * 4.0**power, "fan_avg", distribution, fan_in, fan_out)
                assert width == plain * 2.0**power


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_weights_of_the_widest_and_of_the_narrowest_scale(device, distribution):
    for scale, power in ((4.0**511, 511), (4.0**-537, -537)):
        keywords = {"seed": 1, "dtype": "float64", "device": device.name, "distribution": distribution}
        w = device.numpy(gpuinit.variance_scaling((4, 5), scale, **keywords))
        unit = device.numpy(gpuinit.variance_scaling((4, 5), 1.0, **keywords))
        assert w.tobytes() == np.ldexp(unit, power).tobytes()


def test_the_largest_shapes_have_fans():
    for shape in ((2**62, 1), (1, 2**62), (2**31, 2**31), (0, 2**62)):
        for mode in MODES:
            find_draw(gpuinit.variance_scaling, shape, mode=mode, dtype="float64")


def test_modes_and_scale():
    for mode, fan in (("fan_in", 200), ("fan_out", 500), ("fan_avg", 350), ("fan_geo_avg", math.sqrt(1e5))):
        w = gpuinit.variance_scaling((200, 500), 3.0, mode, "uniform", seed=2, device="cpu")
        assert np.abs(w).max() == pytest.approx(math.sqrt(9 / fan), rel=1e-3)


@pytest.mark.parametrize("distribution", ["truncated_normal", "untruncated_normal", "uniform"])
def test_every_distribution_has_the_variance_that_is_asked_for(distribution):
    """Within six standard errors; the kurtosis is 3 at most."""
    w = gpuinit.variance_scaling((200, 500), 3.0, "fan_geo_avg", distribution, seed=2, device="cpu")
    deviations = np.abs(w.astype(np.float64)) / math.sqrt(3 / math.sqrt(1e5))
    assert abs(np.mean(deviations**2) - 1) < 6 * math.sqrt(2 / w.size)
    least, most = {
        "truncated_normal": (0.999 * 2 / TRUNCATED_STD, 2 / TRUNCATED_STD),
        "untruncated_normal": (3.7, 6.34),  # nothing beyond 3.7 once in 2**31 runs
        "uniform": (0.999 * math.sqrt(3), math.sqrt(3)),
    }[distribution]
    assert least < deviations.max() <= most * (1 + 1e-6)


def test_the_untruncated_normal_is_normal_with_the_width_of_the_fans():
    w = gpuinit.variance_scaling((200, 500), 2.0, "fan_out", "untruncated_normal", seed=2, device="cpu")
    assert w.tobytes() == gpuinit.normal((200, 500), math.sqrt(2 / 500), seed=2, device="cpu").tobytes()


def test_he_normal_of_a_transposed_kernel_has_its_own_fans():
    w = gpuinit.he_normal((50, 2000), in_axis=1, out_axis=0, seed=3, device="cpu")
    bound = 2 * math.sqrt(2 / 2000) / TRUNCATED_STD
    assert 0.999 * bound < np.abs(w).max() <= bound * (1 + 1e-6)


def test_truncated_normal_takes_the_standard_deviation_before_truncation():
    w = gpuinit.truncated_normal(10**6, 0.1, seed=4, device="cpu").astype(np.float64)
    assert abs(np.mean(w**2) / (0.1 * TRUNCATED_STD) ** 2 - 1) < 6 * math.sqrt(1.3656 / 10**6)
    assert np.abs(w).max() <= np.float32(0.2)
