"""Bad input: TypeError or ValueError, by its message, before anything is written."""

from __future__ import annotations

import array
import math
import random
import re
from fractions import Fraction
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import gpuinit
from gpuinit import distributions
from gpuinit.backends import cpu, cuda
from gpuinit.initializers import DTYPES, find_draw, parse_dtype
from gpuinit.stream import parse_seed

SHAPE = "shape must be an integer or a sequence of integers >= 0, got "
SEED = "seed must be None or an integer in [0, 2**64), got "
DTYPE = "dtype must be one of float32, float16, bfloat16, float64, got "
INDEX = "index must hold integers, slices and at most one Ellipsis, got "
AXES = "must be an axis or a sequence of axes in [-2, 2), got "
NUMBER = "must be a finite number >= 0, got "
FINITE = "must be a finite number, got "
BOUNDS = "lower and upper must "
FORMS = "uniform must be given one limit, or low and high, got "
WEIGHTS = "must leave the weights finite in "
NOT_ALL_0 = "must leave weights other than 0 in "
LEAST = {"float32": "1.4e-45", "float16": "6e-08", "bfloat16": "9.2e-41", "float64": "4.9e-324"}


class Dtyped:
    """What has a dtype that cannot be asked for."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def dtype(self) -> None:
        raise self.error

    def __repr__(self) -> str:
        return "Dtyped()"


BAD = [
    # shape
    ({"shape": -1}, ValueError, SHAPE + "-1"),
    ({"shape": (3, -1)}, ValueError, SHAPE + "(3, -1)"),
    ({"shape": 2.5}, TypeError, SHAPE + "2.5"),
    ({"shape": (3, 2.0)}, TypeError, SHAPE + "(3, 2.0)"),
    ({"shape": True}, TypeError, SHAPE + "True"),
    ({"shape": (3, True)}, TypeError, SHAPE + "(3, True)"),
    ({"shape": (np.True_,)}, TypeError, SHAPE),
    ({"shape": "12"}, TypeError, SHAPE + "'12'"),
    ({"shape": None}, TypeError, SHAPE + "None"),
    ({"shape": {3, 4}}, TypeError, SHAPE + "{3, 4}"),
    ({"shape": ((3, 4),)}, TypeError, SHAPE + "((3, 4),)"),
    ({"shape": frozenset({3, 4})}, TypeError, SHAPE + "frozenset({3, 4})"),
    ({"shape": bytearray(b"\3\4")}, TypeError, SHAPE + "bytearray("),
    ({"shape": {3: 1}}, TypeError, SHAPE + "{3: 1}"),
    ({"shape": {3: 1}.keys()}, TypeError, SHAPE + "dict_keys([3])"),
    ({"shape": 2**63}, ValueError, "shape must have fewer than 2**63 elements, got 9223372036854775808"),
    ({"shape": (2**62, 4)}, ValueError, "shape must have fewer than 2**63 elements, got ("),
    ({"shape": (2**40, 0, 2**40)}, ValueError, "shape must have fewer than 2**63 elements, got ("),
    ({"shape": (1,) * 65}, ValueError, "shape must have at most 64 axes, got 65"),
    # seed and name
    ({"seed": -1}, ValueError, SEED + "-1"),
    ({"seed": 2**64}, ValueError, SEED + "18446744073709551616"),
    ({"seed": 1.5}, TypeError, SEED + "1.5"),
    ({"seed": "7"}, TypeError, SEED + "'7'"),
    ({"seed": True}, TypeError, SEED + "True"),
    ({"seed": np.False_}, TypeError, SEED),
    ({"seed": np.array([1, 2])}, TypeError, SEED + "array([1, 2])"),
    ({"name": 3}, TypeError, "name must be None or a string, got 3"),
    ({"name": b"w"}, TypeError, "name must be None or a string, got b'w'"),
    ({"name": "\ud800"}, ValueError, "name must be encodable as UTF-8, got '\\ud800'"),
    # dtype
    ({"dtype": "int32"}, ValueError, DTYPE + "'int32'"),
    ({"dtype": ">f4"}, ValueError, DTYPE + "'>f4'"),
    ({"dtype": "float8"}, TypeError, DTYPE + "'float8'"),
    ({"dtype": 3}, TypeError, DTYPE + "3"),
    ({"dtype": "3000000000f4"}, TypeError, DTYPE + "'3000000000f4'"),
    ({"dtype": complex}, ValueError, DTYPE + "<class 'complex'>"),
    ({"dtype": "(1,"}, TypeError, DTYPE + "'(1,'"),  # parts of it are evaluated, as Python
    ({"dtype": "i4,,f4"}, TypeError, DTYPE + "'i4,,f4'"),
    ({"dtype": "01f4"}, TypeError, DTYPE + "'01f4'"),
    ({"dtype": b"(1,"}, TypeError, DTYPE + "b'(1,'"),
    ({"dtype": [("a", "(1,")]}, TypeError, DTYPE + "[('a', '(1,')]"),
    ({"dtype": ("(1,", 1)}, TypeError, DTYPE + "('(1,', 1)"),
    (
        {"dtype": {"names": ["a"], "formats": ["(1,"]}},
        TypeError,
        DTYPE + "{'names': ['a'], 'formats': ['(1,']}",
    ),
    ({"dtype": Dtyped(ZeroDivisionError())}, TypeError, DTYPE + "Dtyped()"),
    ({"dtype": Dtyped(KeyError("f4"))}, TypeError, DTYPE + "Dtyped()"),
    # device
    ({"device": "gpu"}, ValueError, 'device must be None, "cpu", "cuda" or "cuda:N", got \'gpu\''),
    ({"device": "cuda:-1"}, ValueError, 'device must be None, "cpu", "cuda" or "cuda:N", got \'cuda:-1\''),
    ({"device": "cuda:"}, ValueError, 'device must be None, "cpu", "cuda" or "cuda:N", got \'cuda:\''),
    ({"device": "cpu:0"}, ValueError, 'device must be None, "cpu", "cuda" or "cuda:N", got \'cpu:0\''),
    (
        {"device": 0},
        TypeError,
        'device must be None, "cpu", "cuda", "cuda:N" or a cupy.cuda.Device, got 0',
    ),
    # axes
    ({"in_axis": 2}, ValueError, "in_axis " + AXES + "2"),
    ({"out_axis": -3}, ValueError, "out_axis " + AXES + "-3"),
    ({"batch_axis": (0, 5)}, ValueError, "batch_axis " + AXES + "(0, 5)"),
    ({"in_axis": 0.5}, TypeError, "in_axis " + AXES + "0.5"),
    ({"in_axis": "0"}, TypeError, "in_axis " + AXES + "'0'"),
    ({"in_axis": True}, TypeError, "in_axis " + AXES + "True"),
    ({"out_axis": np.array([0, 3])}, ValueError, "out_axis " + AXES + "array([0, 3])"),
    (
        {"in_axis": 1},
        ValueError,
        "in_axis, out_axis and batch_axis must not name an axis twice, got 1, -1 and () for shape (4, 6)",
    ),
    # index
    ({"index": 4}, ValueError, "index must lie inside the shape (4, 6), got 4"),
    ({"index": (0, -7)}, ValueError, "index must lie inside the shape (4, 6), got (0, -7)"),
    (
        {"index": np.s_[::2]},
        ValueError,
        "index must hold slices of step 1, got slice(None, None, 2)",
    ),
    ({"index": np.s_[::-1]}, ValueError, "index must hold slices of step 1, got "),
    ({"index": np.s_[::0]}, ValueError, "index must hold slices of step 1, got "),
    ({"index": np.s_[0.5:]}, TypeError, INDEX + "slice(0.5, None, None)"),
    ({"index": (None,)}, TypeError, INDEX + "(None,)"),
    ({"index": (True, 0)}, TypeError, INDEX + "(True, 0)"),
    ({"index": 1.0}, TypeError, INDEX + "1.0"),
    ({"index": [0, 1]}, TypeError, INDEX + "[0, 1]"),
    ({"index": np.array([0, 1])}, TypeError, INDEX + "array([0, 1])"),
    ({"index": (..., 0, ...)}, ValueError, INDEX + "(Ellipsis, 0, Ellipsis)"),
    (
        {"index": (0, 0, 0)},
        ValueError,
        "index must have at most 2 entries for shape (4, 6), got (0, 0, 0)",
    ),
]


@pytest.mark.parametrize(("keywords", "error", "message"), BAD)
def test_bad_arguments_are_refused_with_nothing_written(device, keywords, error, message):
    out = device.from_numpy(np.full((4, 6), 77, np.float32))
    for extra in ({}, {"out": out}):
        keywords = {"shape": (4, 6), "seed": 0, "device": device.name, **extra, **keywords}
        with pytest.raises(error, match="^" + re.escape(message)):
            gpuinit.he_normal(**keywords)
    assert (device.numpy(out) == 77).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gpuinit.truncated_normal(3, -0.1), ValueError, "stddev " + NUMBER + "-0.1"),
        (lambda: gpuinit.truncated_normal(3, float("nan")), ValueError, "stddev " + NUMBER + "nan"),
        (lambda: gpuinit.truncated_normal(3, "1"), TypeError, "stddev " + NUMBER + "'1'"),
        (lambda: gpuinit.truncated_normal(3, None), TypeError, "stddev " + NUMBER + "None"),
        (lambda: gpuinit.uniform(3, True), TypeError, "limit " + NUMBER + "True"),
        (lambda: gpuinit.uniform(3, float("inf")), ValueError, "limit " + NUMBER + "inf"),
        (lambda: gpuinit.uniform(3, 10**400), ValueError, "limit " + NUMBER + "1000"),
        (lambda: gpuinit.uniform(3, 1j), TypeError, "limit " + NUMBER + "1j"),
        (lambda: gpuinit.uniform(3, np.complex128(1)), TypeError, "limit " + NUMBER),
        (lambda: gpuinit.uniform(3, np.array(True)), TypeError, "limit " + NUMBER),
        (
            lambda: gpuinit.he_normal(24, in_axis=-2.0),
            TypeError,
            "in_axis must be an axis or a sequence of axes in [-1, 1), got -2.0",
        ),
        (
            lambda: gpuinit.uniform(3, 3.4e38, dtype="bfloat16"),
            ValueError,
            "limit must leave the weights finite in bfloat16, got limit 3.4e+38",
        ),
        (
            lambda: gpuinit.truncated_normal(3, 1.5e308, dtype="float64"),
            ValueError,
            "stddev must leave the weights finite in float64, got stddev 1.5e+308",
        ),
        (
            lambda: gpuinit.variance_scaling(3, 1, np.array(["fan_in", "fan_out"])),
            ValueError,
            "mode must be one of fan_in, fan_out, fan_avg, fan_geo_avg, got array(",
        ),
        (
            lambda: gpuinit.uniform(2**62),
            ValueError,
            "shape must leave fewer than 2**63 bytes to make, got (4611686018427387904,)",
        ),
        (
            lambda: gpuinit.uniform(3, 1e39),
            ValueError,
            "limit must leave the weights finite in float32, got limit 1e+39",
        ),
        (
            lambda: gpuinit.truncated_normal(3, 40000.0, dtype="float16"),
            ValueError,
            "stddev must leave the weights finite in float16, got stddev 40000.0",
        ),
        (
            lambda: gpuinit.variance_scaling(3, 0.0),
            ValueError,
            "scale must be a finite number > 0, got 0.0",
        ),
        (lambda: gpuinit.variance_scaling(3, -1), ValueError, "scale " + NUMBER + "-1"),
        (
            lambda: gpuinit.variance_scaling(3, 1, "fan_sum"),
            ValueError,
            "mode must be one of fan_in, fan_out, fan_avg, fan_geo_avg, got 'fan_sum'",
        ),
        (
            lambda: gpuinit.variance_scaling(3, 1, "fan_in", "normal"),
            ValueError,
            "distribution must be one of truncated_normal, untruncated_normal, uniform, got 'normal'",
        ),
        (
            lambda: gpuinit.variance_scaling(3, 1, "fan_in", ["uniform"]),
            ValueError,
            "distribution must be one of truncated_normal, untruncated_normal, uniform, got ['uniform']",
        ),
    ],
)
def test_bad_widths_are_refused(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


# Function, arguments, error and message of what is drawn.
NARROW = float(np.nextafter(9, 10))  # from 9, where less than 2**-93 of the probability lies between them
BAD_DRAWS = [
    (gpuinit.normal, {"stddev": -0.1}, ValueError, "stddev " + NUMBER + "-0.1"),
    (gpuinit.normal, {"stddev": math.nan}, ValueError, "stddev " + NUMBER + "nan"),
    (gpuinit.normal, {"stddev": math.inf}, ValueError, "stddev " + NUMBER + "inf"),
    (gpuinit.normal, {"mean": math.inf}, ValueError, "mean " + FINITE + "inf"),
    (gpuinit.normal, {"mean": math.nan}, ValueError, "mean " + FINITE + "nan"),
    (gpuinit.normal, {"mean": -(10**400)}, ValueError, "mean " + FINITE + "-1000"),
    (gpuinit.normal, {"mean": None}, TypeError, "mean " + FINITE + "None"),
    (gpuinit.truncated_normal, {"lower": math.nan}, ValueError, "lower must be a number, got nan"),
    (gpuinit.truncated_normal, {"upper": math.nan}, ValueError, "upper must be a number, got nan"),
    (gpuinit.truncated_normal, {"lower": "-2"}, TypeError, "lower must be a number, got '-2'"),
    (gpuinit.truncated_normal, {"upper": None}, TypeError, "upper must be a number, got None"),
    (
        gpuinit.truncated_normal,
        {"lower": 1, "upper": 0.5},
        ValueError,
        "upper must be at least lower, got lower 1.0 and upper 0.5",
    ),
    (
        gpuinit.truncated_normal,
        {"lower": math.inf, "upper": math.inf},
        ValueError,
        BOUNDS + "not be the same infinity, got lower inf and upper inf",
    ),
    (
        gpuinit.truncated_normal,
        {"lower": -math.inf, "upper": -math.inf},
        ValueError,
        BOUNDS + "not be the same infinity, got lower -inf and upper -inf",
    ),
    (
        gpuinit.truncated_normal,
        {"lower": 0, "upper": 1e-300},
        ValueError,
        BOUNDS + "be further apart, got lower 0.0 and upper 1e-300",
    ),
    (
        gpuinit.truncated_normal,
        {"lower": -NARROW, "upper": -9},
        ValueError,
        BOUNDS + f"be further apart, got lower {-NARROW} and upper -9.0",
    ),
    (
        gpuinit.truncated_normal,
        {"lower": 10, "upper": math.inf},
        ValueError,
        BOUNDS + "lie within the normal's tails of 2**-64, got lower 10.0 and upper inf",
    ),
    (
        gpuinit.truncated_normal,
        {"lower": -math.inf, "upper": -6.5},
        ValueError,
        BOUNDS + "lie within the normal's tails of 2**-64, got lower -inf and upper -6.5",
    ),
    (gpuinit.uniform, {"low": 0, "high": "1"}, TypeError, "high " + FINITE + "'1'"),
    (gpuinit.uniform, {"low": math.nan, "high": 1}, ValueError, "low " + FINITE + "nan"),
    (gpuinit.uniform, {"low": -math.inf, "high": 1}, ValueError, "low " + FINITE + "-inf"),
    (
        gpuinit.uniform,
        {"low": 2, "high": 1},
        ValueError,
        "high must be at least low, got low 2 and high 1",
    ),
    (gpuinit.uniform, {"low": 0}, ValueError, FORMS + "low=0"),
    (gpuinit.uniform, {"high": 1}, ValueError, FORMS + "high=1"),
    (gpuinit.uniform, {"low": 0, "limit": 1}, ValueError, FORMS + "low=0, limit=1"),
    (gpuinit.uniform, {"low": 0, "high": 1, "limit": 2}, ValueError, FORMS + "low=0, high=1, limit=2"),
    (
        gpuinit.normal,
        {"stddev": 11000, "dtype": "float16"},
        ValueError,
        "stddev " + WEIGHTS + "float16, got stddev 11000.0",
    ),
    (
        gpuinit.normal,
        {"mean": 7e4, "dtype": "float16"},
        ValueError,
        "mean " + WEIGHTS + "float16, got mean 70000.0",
    ),
    (
        gpuinit.truncated_normal,
        {"stddev": 2e4, "upper": 4, "dtype": "float16"},
        ValueError,
        "stddev " + WEIGHTS + "float16, got stddev 20000.0",
    ),
    (
        gpuinit.truncated_normal,
        {"stddev": 1e308, "mean": 1e308, "lower": 1, "upper": 1, "dtype": "float64"},
        ValueError,
        "stddev " + WEIGHTS + "float64, got stddev 1e+308",
    ),
    (
        gpuinit.truncated_normal,
        {"stddev": 1e308, "lower": 1, "upper": 1e308, "dtype": "float64"},
        ValueError,
        "stddev " + WEIGHTS + "float64, got stddev 1e+308",
    ),
    (
        gpuinit.uniform,
        {"low": 0, "high": 7e4, "dtype": "float16"},
        ValueError,
        "high " + WEIGHTS + "float16, got high 70000.0",
    ),
    (
        gpuinit.uniform,
        {"low": -7e4, "high": 1, "dtype": "float16"},
        ValueError,
        "low " + WEIGHTS + "float16, got low -70000.0",
    ),
    (
        gpuinit.variance_scaling,
        {"scale": 1.7e308, "distribution": "uniform"},
        ValueError,
        "scale " + WEIGHTS + "float32, got scale 1.7e+308",
    ),
]


# Function, arguments, the argument that the message names and its value: every weight would be 0.
ALL_0 = [
    (gpuinit.normal, {"stddev": 1e-9, "dtype": "float16"}, "stddev", 1e-9),
    (gpuinit.normal, {"stddev": 1e-9, "mean": 1e-9, "dtype": "float16"}, "stddev", 1e-9),
    (gpuinit.normal, {"stddev": 1e-42, "dtype": "bfloat16"}, "stddev", 1e-42),
    (gpuinit.normal, {"stddev": 1e-46}, "stddev", 1e-46),
    (gpuinit.truncated_normal, {"stddev": 1e-9, "dtype": "float16"}, "stddev", 1e-9),
    (gpuinit.truncated_normal, {"stddev": 1e-46}, "stddev", 1e-46),
    (gpuinit.truncated_normal, {"stddev": 1e-9, "lower": 1, "upper": 9, "dtype": "float16"}, "stddev", 1e-9),
    (gpuinit.truncated_normal, {"stddev": 1e-9, "upper": math.inf, "dtype": "float16"}, "stddev", 1e-9),
    (gpuinit.truncated_normal, {"lower": 0, "upper": 1e-9, "dtype": "float16"}, "upper", 1e-9),
    (gpuinit.truncated_normal, {"lower": -1e-9, "upper": 1e-12, "dtype": "float16"}, "lower", -1e-9),
    (
        gpuinit.truncated_normal,
        {"stddev": 5e-324, "lower": -0.4, "upper": 0.4, "dtype": "float64"},
        "stddev",
        5e-324,
    ),
    # Bounds in weights are of the dtype, but stddev is 0 in it.
    (gpuinit.truncated_normal, {"stddev": 6e-46, "lower": -3, "upper": 3}, "stddev", 6e-46),
    # The other way round: no number of float32 but 0 lies between the bounds, but stddev is its least.
    (gpuinit.truncated_normal, {"stddev": 9.8e-46, "lower": -1, "upper": 1}, "stddev", 9.8e-46),
    (gpuinit.uniform, {"limit": 1e-9, "dtype": "float16"}, "limit", 1e-9),
    (gpuinit.uniform, {"limit": 1e-300}, "limit", 1e-300),
    (gpuinit.uniform, {"low": 0, "high": 1e-9, "dtype": "float16"}, "high", 1e-9),
    (gpuinit.uniform, {"low": -1e-9, "high": 0, "dtype": "float16"}, "low", -1e-9),
    (gpuinit.uniform, {"low": 1e-10, "high": 1e-9, "dtype": "float16"}, "high", 1e-9),
    # The end is a number of float32, but half of it, round which the weights are, is not.
    (gpuinit.uniform, {"low": 0, "high": 1.401298464324817e-45}, "high", 1.401298464324817e-45),
    *(
        (
            gpuinit.variance_scaling,
            {"scale": 1e-300, "mode": mode, "distribution": distribution},
            "scale",
            1e-300,
        )
        for mode in distributions.MODES
        for distribution in distributions.DISTRIBUTIONS
    ),
    (gpuinit.variance_scaling, {"scale": 1e-20, "dtype": "float16"}, "scale", 1e-20),
]
BAD_DRAWS += [
    (
        function,
        arguments,
        ValueError,
        f"{argument} {NOT_ALL_0}{dtype}, whose least is {LEAST[dtype]}, got {argument} {value!r}",
    )
    for function, arguments, argument, value in ALL_0
    for dtype in [arguments.get("dtype", "float32")]
]
TINY = Fraction(1, 10**400)
BAD_DRAWS += [
    (
        gpuinit.normal,
        {"stddev": TINY},
        ValueError,
        "stddev must be a finite number >= 0 that float64 does not",
    ),
    (
        gpuinit.normal,
        {"stddev": -TINY},
        ValueError,
        "stddev must be a finite number >= 0 that float64 does not",
    ),
    (
        gpuinit.uniform,
        {"limit": TINY},
        ValueError,
        "limit must be a finite number >= 0 that float64 does not",
    ),
    (
        gpuinit.uniform,
        {"low": 0, "high": TINY},
        ValueError,
        "high must be a finite number that float64 does not",
    ),
    (
        gpuinit.variance_scaling,
        {"scale": TINY},
        ValueError,
        "scale must be a finite number >= 0 that float64 ",
    ),
    # Weights that would be cut where float32 ends, and not where was asked.
    (
        gpuinit.truncated_normal,
        {"stddev": 2e38, "mean": 2e38, "lower": -1, "upper": 1},
        ValueError,
        "stddev " + WEIGHTS + "float32, got stddev 2e+38",
    ),
    # The outermost of 2**64 samples beyond 3 is 9.84.
    (
        gpuinit.truncated_normal,
        {"stddev": 1.9e307, "lower": 3, "upper": math.inf, "dtype": "float64"},
        ValueError,
        "stddev " + WEIGHTS + "float64, got stddev 1.9e+307",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD_DRAWS)
def test_what_cannot_be_drawn_is_refused_with_nothing_written(device, function, arguments, error, message):
    dtype = DTYPES[arguments.get("dtype", "float32")]
    out = device.from_numpy(np.full((4, 6), 77, dtype))
    for where in ({"device": device.name}, {"out": out}):
        with pytest.raises(error, match="^" + re.escape(message)):
            function((4, 6), seed=0, **where, **arguments)
    assert (device.numpy(out) == 77).all()


def test_no_text_and_nothing_nested_is_another_error_than_a_dtype_that_is_wrong():
    letters, random_number = "(),[]{}<>=|0123456789fVSMOib \0'_", random.Random(1)
    pieces = ["(1,", "f4", "a", "names", "formats", "titles", 1, -1, 2**70, None, (), [], b"(1,", 1.5]

    def text():
        return "".join(random_number.choices(letters, k=random_number.randint(1, 8)))

    def nested(depth):
        chosen = random_number.choices(pieces, k=random_number.randint(0, 3))
        inner = [nested(depth - 1) if depth and random_number.random() < 0.5 else piece for piece in chosen]
        return random_number.choice([inner, tuple(inner), {"names": inner, "formats": inner[::-1]}])

    refused = 0
    for dtype in [*(text() for _ in range(5000)), *(nested(3) for _ in range(5000))]:
        message = ""
        try:
            parse_dtype(dtype)
        except (TypeError, ValueError) as error:
            message, refused = str(error), refused + 1
        assert message in ("", f"{DTYPE}{dtype!r}")
    assert refused > 9000


# The sample that is furthest out: that of a word, and not the bound, where that is further.
FURTHEST = [
    (gpuinit.normal, {}, 6.3379578590393066),
    (gpuinit.truncated_normal, {}, 2),
    (gpuinit.truncated_normal, {"lower": -1, "upper": 3}, 3),
    (gpuinit.truncated_normal, {"lower": -4, "upper": -3}, 4),
    (gpuinit.truncated_normal, {"lower": -1, "upper": math.inf}, 6.364528272),
    (gpuinit.truncated_normal, {"lower": -math.inf, "upper": 1}, 6.364528272),
]


@pytest.mark.parametrize(("function", "arguments", "furthest"), FURTHEST)
def test_the_least_width_is_that_of_the_sample_furthest_out(function, arguments, furthest):
    least = 2.0**-25 / furthest  # half of float16's least number is rounded to 0
    find_draw(function, 3, dtype="float16", stddev=least * (1 + 1e-6), **arguments)
    with pytest.raises(ValueError, match=f"^stddev {NOT_ALL_0}float16"):
        find_draw(function, 3, dtype="float16", stddev=least * (1 - 1e-6), **arguments)


@pytest.mark.parametrize(
    ("dtype", "half"), [("float32", 2.0**-150), ("float16", 2.0**-25), ("bfloat16", 2.0**-134)]
)
def test_half_of_the_least_number_of_a_dtype_is_0(dtype, half):
    for function, argument, width in (
        (gpuinit.uniform, "limit", half),
        (gpuinit.truncated_normal, "stddev", half / 2),
    ):
        if (dtype, argument) == ("float32", "stddev"):
            width = half  # stddev is rounded to float32 before it is doubled
        find_draw(function, 3, dtype=dtype, **{argument: width * (1 + 2**-13)})
        with pytest.raises(ValueError, match=f"^{argument} {NOT_ALL_0}{dtype}"):
            find_draw(function, 3, dtype=dtype, **{argument: width})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_spread_that_vanishes_beside_its_mean_leaves_the_mean(device, dtype):
    """Every weight is right to its last digit."""
    keywords = {"seed": 1, "dtype": dtype, "device": device.name}
    for made in (
        gpuinit.normal(9, 1e-20, 1.0, **keywords),
        gpuinit.truncated_normal(9, 1e-20, 1.0, **keywords),
        gpuinit.uniform(9, 1.0, 1 + 2**-52, **(keywords | {"dtype": "float32"})),
    ):
        assert (device.numpy(made) == 1).all()


@pytest.mark.parametrize(
    ("ends", "keywords", "got"),
    [
        ((1, 2, 3), {}, "1, 2, 3"),
        ((0.1,), {"limit": 0.1}, "0.1, limit=0.1"),
        ((0.1,), {"low": 0}, "0.1, low=0"),
        ((0, 1), {"high": 1}, "0, 1, high=1"),
    ],
)
def test_the_forms_of_uniform_are_not_mixed(ends, keywords, got):
    with pytest.raises(ValueError, match="^" + re.escape(FORMS + got) + "$"):
        gpuinit.uniform(3, *ends, **keywords)


@pytest.mark.parametrize(
    ("ends", "argument"), [((None,), "limit"), ((0.1, None), "high"), ((None, 0.1), "low")]
)
def test_an_end_that_is_none_is_refused(ends, argument):
    with pytest.raises(TypeError, match=rf"^{argument} must be a finite number.*, got None$"):
        gpuinit.uniform(3, *ends)


def test_the_forms_of_uniform_are_one_draw(device):
    make = partial(gpuinit.uniform, (4, 6), seed=3, device=device.name)

    def bits(array):
        return device.numpy(array).tobytes()

    first = bits(make())
    for other in (make(0.05), make(limit=0.05), make(-0.05, 0.05), make(low=-0.05, high=0.05)):
        assert bits(other) == first
    assert bits(make(0, 1)) == bits(make(low=0, high=1)) == bits(make(0.0, np.float32(1)))
    assert device.numpy(make(0, 1)).min() >= 0


@pytest.mark.parametrize(
    "value", [True, np.True_, 1j, "1", np.str_("1"), np.array("1"), [1], (1,), b"1", None]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="^" + re.escape(f"stddev {NUMBER}{value!r}") + "$"):
        gpuinit.normal(3, value)
    if value is not None:
        with pytest.raises(TypeError, match="^" + re.escape(f"limit {NUMBER}{value!r}") + "$"):
            gpuinit.uniform(3, limit=value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "arguments", "constant"),
    [
        (gpuinit.normal, {"stddev": 0, "mean": 0.3}, 0.3),
        (gpuinit.truncated_normal, {"stddev": 0, "mean": -0.3, "lower": -1, "upper": 2}, -0.3),
        (gpuinit.truncated_normal, {"stddev": 0}, 0),
        (gpuinit.truncated_normal, {"stddev": 0.5, "mean": 1, "lower": 0.3, "upper": 0.3}, 1.15),
        (gpuinit.truncated_normal, {"stddev": 1, "lower": 300, "upper": 300}, 300),
        (gpuinit.uniform, {"low": 0.3, "high": 0.3}, 0.3),
        (gpuinit.uniform, {"limit": 0}, 0),
        (gpuinit.uniform, {"limit": -0.0}, 0),
        (gpuinit.uniform, {"low": 0, "high": 0}, 0),
        (gpuinit.uniform, {"low": -0.0, "high": -0.0}, 0),
        (gpuinit.uniform, {"low": 0.0, "high": -0.0}, 0),
        (gpuinit.normal, {"stddev": 0}, 0),
        (gpuinit.normal, {"stddev": -0.0, "mean": -0.0}, 0),
        (gpuinit.truncated_normal, {"stddev": 0, "mean": -0.0}, 0),
        (gpuinit.truncated_normal, {"stddev": 0, "lower": -3, "upper": 3}, 0),
        (gpuinit.truncated_normal, {"stddev": 0, "lower": 0, "upper": math.inf}, 0),
        (gpuinit.truncated_normal, {"stddev": 1, "lower": 0, "upper": -0.0}, 0),
        (gpuinit.truncated_normal, {"stddev": 1, "mean": -1, "lower": 1, "upper": 1}, 0),
        (gpuinit.truncated_normal, {"stddev": 0, "lower": -1, "upper": -1}, 0),
    ],
)
def test_what_has_no_width_is_a_constant(device, function, arguments, constant, dtype):
    """0.0 where it is 0, and never -0.0."""
    weights = device.numpy(function(67, seed=1, dtype=dtype, device=device.name, **arguments))
    wanted = np.asarray(constant, np.float64 if dtype == "float64" else np.float32).astype(dtype)
    assert weights.tobytes() == wanted.tobytes() * 67


def test_two_zeros_are_one_number():
    """Whichever comes first in a process."""
    for function in (gpuinit.truncated_normal, gpuinit.normal, gpuinit.uniform):
        made = set()
        for zeros in ((0.0, -0.0), (-0.0, 0.0)):
            distributions.find_sampling.cache_clear()
            made |= {function(9, zero, seed=1, device="cpu").tobytes() for zero in zeros}
        assert len(made) == 1, function


# find_draw


@pytest.fixture
def nothing_made(monkeypatch):
    """An error where a backend is asked for an array, or for weights."""
    for module in (cpu, cuda):
        for name in ("empty", "fill"):
            monkeypatch.delattr(module, name)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *((gpuinit.he_normal, *case) for case in BAD if "device" not in case[0]),
        *BAD_DRAWS,
        (gpuinit.he_normal, {"dtype": "int8"}, ValueError, DTYPE + "'int8'"),
    ],
)
def test_what_would_be_refused_is_without_being_made(nothing_made, function, arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        find_draw(function, **{"shape": (4, 6), **arguments})


def test_what_would_be_drawn_is_told_without_being_made(nothing_made):
    he = find_draw(gpuinit.he_normal, (2**31, 2**31), seed=1, name="w", dtype="bfloat16", index=np.s_[3, 4:])
    assert he[:4] == (math.sqrt(2 / 2**31) / 0.87962566103423978, 0, -2, 2)
    transposed = find_draw(gpuinit.he_uniform, (8, 32), in_axis=1, out_axis=0)
    assert transposed[:2] == (-math.sqrt(6 / 32), math.sqrt(6 / 32))
    assert find_draw(gpuinit.normal, 0)[:4] == (0.05, 0, -math.inf, math.inf)
    cut = partial(gpuinit.truncated_normal, stddev=2, upper=np.float32(0.5))
    assert find_draw(cut, (), mean=-1)[:4] == (2, -1, -2, 0.5)
    assert find_draw(gpuinit.uniform, 3, low=1, high=1)[:2] == (1, 1)


def test_what_should_be_accepted_is(device):
    first = device.numpy(gpuinit.he_normal((4, 6), seed=3, device=device.name))
    for keywords in (
        {"shape": [4, 6]},
        {"shape": (np.int32(4), np.uint8(6))},
        {"shape": np.array([4, 6])},
        {"seed": np.uint64(3)},
        {"seed": np.array(3)},
        {"dtype": np.float32},
        {"dtype": np.dtype("float32")},
        {"dtype": "f4"},
        {"index": ...},
        {"index": ()},
        {"index": np.s_[:, :]},
        {"index": np.s_[0:99, -99:99]},
        {"in_axis": (-2,), "out_axis": [1]},
        {"in_axis": np.int64(-2), "out_axis": np.array([-1]), "batch_axis": []},
    ):
        keywords = {"shape": (4, 6), "seed": 3, "device": device.name, **keywords}
        assert device.numpy(gpuinit.he_normal(**keywords)).tobytes() == first.tobytes()
    row = gpuinit.he_normal(5, seed=3, in_axis=(-2,), batch_axis=[], device="cpu")  # the default axes
    assert row.tobytes() == gpuinit.he_normal(5, seed=3, device="cpu").tobytes()
    bfloat16 = gpuinit.he_normal((4, 6), dtype=ml_dtypes.bfloat16, device=device.name)
    assert bfloat16.dtype == ml_dtypes.bfloat16
    assert device.numpy(gpuinit.he_normal(np.array(5), seed=3, device=device.name)).shape == (5,)


def test_no_seed_is_a_fresh_one(device):
    first, second = (device.numpy(gpuinit.he_normal(8, device=device.name)) for _ in range(2))
    assert first.tobytes() != second.tobytes()


def test_a_fresh_seed_has_64_random_bits():
    seeds = np.array([parse_seed(None) for _ in range(64)], np.uint64)
    assert np.bitwise_or.reduce(seeds) == 2**64 - 1  # a false alarm once in 2**57 runs
    assert np.bitwise_and.reduce(seeds) == 0


def test_too_much_memory_is_a_memory_error():
    with pytest.raises(MemoryError):
        gpuinit.he_normal(2**60, device="cpu")


# out


def test_out_is_filled_and_returned(device):
    for shape in [(4, 6), (), (0, 6)]:
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
            out = device.from_numpy(np.full(shape, 77, dtype))
            assert gpuinit.he_normal(shape, seed=1, out=out) is out
            expected = gpuinit.he_normal(shape, seed=1, dtype=dtype, device="cpu")
            assert device.numpy(out).tobytes() == expected.tobytes()


def test_out_that_does_not_suit_is_refused(device):
    def ones(shape, dtype=np.float32):
        return device.from_numpy(np.ones(shape, dtype))

    wide = ones((4, 7))
    cases = [
        (ones((4, 5)), {}, ValueError, "out must have shape (4, 6), got (4, 5)"),
        (ones((4, 6)), {"index": 0}, ValueError, "out must have shape (6,), got (4, 6)"),
        (ones((4, 6), np.int32), {}, ValueError, "out must have dtype float32, float16, bfloat16, "),
        (
            ones((4, 6)),
            {"dtype": "float64"},
            ValueError,
            "out must have dtype float64, as asked, got float32",
        ),
        (wide[:, :6], {}, ValueError, "out must be C-contiguous, got an array with gaps or in another"),
        (
            device.from_numpy(np.ones((6, 4), np.float32)).T,
            {},
            ValueError,
            "out must be C-contiguous, got an array with gaps or in another order",
        ),
        ([1.0, 2.0], {}, TypeError, "out must be a NumPy or CuPy array, or offer "),
    ]
    for out, keywords, error, message in cases:
        with pytest.raises(error, match="^" + re.escape(message)):
            gpuinit.he_normal((4, 6), seed=0, out=out, **keywords)
        if not isinstance(out, list):
            assert (device.numpy(out).astype(np.float64) == 1).all()
    assert (device.numpy(wide) == 1).all()


def test_out_may_offer_the_buffer_protocol():
    expected = gpuinit.he_normal(6, seed=1, device="cpu")
    plain = array.array("f", [0] * 6)
    assert gpuinit.he_normal(6, seed=1, out=plain) is plain
    assert plain.tobytes() == expected.tobytes()
    view = memoryview(bytearray(24)).cast("f")
    gpuinit.he_normal(6, seed=1, out=view)
    assert view.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [1, 3])
def test_out_may_offer_dlpack_of_plain_and_of_pinned_memory(kind):
    class Tensor:
        def __init__(self):
            self.array = np.zeros(6, np.float32)

        def __dlpack__(self, **keywords):
            return self.array.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return kind, 0

    tensor = Tensor()
    assert gpuinit.he_normal(6, seed=1, out=tensor) is tensor
    assert tensor.array.tobytes() == gpuinit.he_normal(6, seed=1, device="cpu").tobytes()


def test_out_of_swapped_bytes_is_refused():
    with pytest.raises(ValueError, match=r"^out must have dtype float32, .*, got >f4$"):
        gpuinit.he_normal(1, seed=0, out=np.zeros(1, ">f4"))


def test_the_data_of_a_masked_array_is_filled():
    out = np.ma.masked_array(np.ones(6, np.float32), mask=[True, False] * 3, hard_mask=True)
    gpuinit.he_normal(6, seed=1, out=out)
    assert out.data.tobytes() == gpuinit.he_normal(6, seed=1, device="cpu").tobytes()


def test_read_only_out_is_refused():
    for out in (np.broadcast_to(np.float32(1), (1,)), bytes(4)):
        if isinstance(out, bytes):
            out = memoryview(out).cast("f")
        with pytest.raises(ValueError, match=r"^out must be writable, got a read-only array$"):
            gpuinit.he_normal(1, seed=0, out=out)
