"""Numbers that are 0-d arrays of NumPy, PyTorch and JAX."""

from __future__ import annotations

import math
import re
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import gpuinit
from gpuinit.initializers import find_draw

NUMBER = "must be a finite number >= 0, got "
FINITE = "must be a finite number, got "

ARRAYS = {
    "numpy": lambda value, dtype: np.array(value, dtype),
    "torch": lambda value, dtype: (torch := pytest.importorskip("torch")).tensor(
        value, dtype=getattr(torch, dtype)
    ),
    "jax": lambda value, dtype: pytest.importorskip("jax.numpy").asarray(value, dtype),
}


@pytest.mark.parametrize("library", ARRAYS)
def test_0d_arrays_are_numbers(library):
    array = partial(ARRAYS[library], dtype="float32")
    made = partial(find_draw, shape=3)
    assert made(gpuinit.normal, stddev=array(0.5), mean=array(-2)) == made(
        gpuinit.normal, stddev=0.5, mean=-2
    )
    bounds = {"lower": -0.5, "upper": math.inf}
    given = {argument: array(value) for argument, value in bounds.items()}
    assert made(gpuinit.truncated_normal, **given) == made(gpuinit.truncated_normal, **bounds)
    assert made(gpuinit.uniform, limit=array(0.25)) == made(gpuinit.uniform, limit=0.25)
    assert made(gpuinit.uniform, low=array(0), high=array(0.5)) == made(gpuinit.uniform, low=0, high=0.5)
    assert made(gpuinit.variance_scaling, scale=array(2)) == made(gpuinit.variance_scaling, scale=2)
    for dtype in ("bfloat16" if library != "numpy" else ml_dtypes.bfloat16, "float16", "int8"):
        assert made(gpuinit.normal, stddev=ARRAYS[library](2, dtype)) == made(gpuinit.normal, stddev=2)


@pytest.mark.parametrize("library", ARRAYS)
@pytest.mark.parametrize(("value", "dtype"), [(True, "bool"), (1, "complex64"), ([1], "float32")])
def test_arrays_that_are_no_numbers_are_refused(library, value, dtype):
    array = ARRAYS[library](value, dtype)
    for argument, wanted in (("stddev", NUMBER), ("mean", FINITE), ("lower", "must be a number, got ")):
        with pytest.raises(TypeError, match="^" + re.escape(f"{argument} {wanted}{array!r}") + "$"):
            gpuinit.truncated_normal(3, **{argument: array})


def test_an_array_whose_value_is_not_known_is_refused():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"^mean must be a finite number that is known now, got JitTracer"):
        jax.jit(lambda mean: gpuinit.normal(3, 1.0, mean, device="cpu"))(0.5)


def test_an_array_on_no_device_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^limit must be a finite number >= 0 that is known now, got tensor"):
        gpuinit.uniform(3, torch.tensor(1.0, device="meta"), device="cpu")


@pytest.mark.parametrize("library", ARRAYS)
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32"])
def test_0d_arrays_are_integers(library, dtype):
    none, one, two = (ARRAYS[library](value, dtype) for value in range(3))
    made = partial(gpuinit.he_normal, device="cpu")
    expected = made((2, 2), seed=1, in_axis=1, out_axis=0, batch_axis=(), index=np.s_[1, 1:2])
    axes = {"in_axis": one, "out_axis": (none,)}
    given = made((two, two), seed=one, **axes, index=(one, slice(one, two, one)))
    assert given.tobytes() == expected.tobytes()
    assert made(two, seed=0).tobytes() == made(2, seed=0).tobytes()


@pytest.mark.parametrize("library", ["numpy", "torch"])  # JAX has 64 bits only where it is told so
def test_0d_arrays_of_64_bits_are_seeds(library):
    for seed, dtype in ((2**63 - 1, "int64"), (2**63, "uint64"), (2**64 - 1, "uint64")):
        made = gpuinit.he_normal(3, seed=ARRAYS[library](seed, dtype), device="cpu")
        assert made.tobytes() == gpuinit.he_normal(3, seed=seed, device="cpu").tobytes()


INTEGERS = {
    "seed": lambda value: {"seed": value},
    "shape": lambda value: {"shape": value},
    "a length": lambda value: {"shape": (2, value)},
    "in_axis": lambda value: {"in_axis": value},
    "an axis": lambda value: {"out_axis": (value,)},
    "batch_axis": lambda value: {"batch_axis": value},
    "index": lambda value: {"index": value},
    "start": lambda value: {"index": slice(value, None)},
    "stop": lambda value: {"index": (0, slice(value))},
    "step": lambda value: {"index": slice(None, None, value)},
}


@pytest.mark.parametrize("library", ARRAYS)
@pytest.mark.parametrize(
    ("value", "dtype"), [(True, "bool"), ([1], "int32"), ([[1]], "int32"), (1, "float32"), (1, "complex64")]
)
@pytest.mark.parametrize("argument", INTEGERS)
def test_arrays_that_are_no_integers_are_refused(library, value, dtype, argument):
    if isinstance(value, list) and argument in ("shape", "in_axis", "batch_axis"):
        value = [value]  # where arrays are sequences of numbers
    given = INTEGERS[argument](ARRAYS[library](value, dtype))
    with pytest.raises(TypeError, match=r"^(seed|shape|in_axis|out_axis|batch_axis|index) must .*, got "):
        gpuinit.he_normal(**{"shape": (2, 2), "seed": 0, "device": "cpu"} | given)


@pytest.mark.parametrize("argument", INTEGERS)
def test_truth_values_are_no_integers(argument):
    for value in (True, np.True_, np.timedelta64(1)):
        with pytest.raises(TypeError, match=r"^(seed|shape|in_axis|out_axis|batch_axis|index) must .*, got "):
            gpuinit.he_normal(**{"shape": (2, 2), "seed": 0, "device": "cpu"} | INTEGERS[argument](value))
    with pytest.raises(TypeError, match=r"^stddev must be .*, got "):
        gpuinit.normal(3, np.timedelta64(1))


@pytest.mark.parametrize("argument", INTEGERS)
def test_integers_that_have_no_value_are_refused(argument):
    torch = pytest.importorskip("torch")
    given = INTEGERS[argument](torch.tensor(1, device="meta"))
    with pytest.raises(TypeError, match=r"^(seed|shape|in_axis|out_axis|batch_axis|index) must .*, got "):
        gpuinit.he_normal(**{"shape": (2, 2), "seed": 0, "device": "cpu"} | given)
