"""The promise: the same bytes on every device, however the work is cut."""

from __future__ import annotations

import math
import os

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import gpuinit
from gpuinit.backends import cpu, cuda

DTYPES = ("float32", "float16", "bfloat16", "float64")
SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


def by_numpy(function, *arguments, **keywords):
    """The array made by NumPy, whatever the device under test: what every device must equal."""
    before = os.environ["GPUINIT_CPU_ENGINE"]
    os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
    try:
        return function(*arguments, device="cpu", **keywords)
    finally:
        os.environ["GPUINIT_CPU_ENGINE"] = before


def whole(shape, distribution="truncated_normal", **keywords):
    """The array in one piece: what every cut must equal."""
    return by_numpy(gpuinit.variance_scaling, shape, 2.0, "fan_in", distribution, **keywords)


def assert_same_bytes(array, expected):
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["truncated_normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (1,), (1000, 1001), (3, 3, 17, 19)])
def test_devices_agree(device, dtype, distribution, shape):
    keywords = {"seed": 12, "name": "w", "dtype": dtype}
    made = gpuinit.variance_scaling(shape, 2.0, "fan_in", distribution, device=device.name, **keywords)
    assert_same_bytes(device.numpy(made), whole(shape, distribution, **keywords))


@pytest.mark.parametrize("seed", SEEDS)
def test_devices_agree_for_every_seed(device, seed):
    made = gpuinit.he_normal((400, 301), seed=seed, device=device.name)
    assert_same_bytes(device.numpy(made), whole((400, 301), seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_agree_on_a_large_array(device, dtype):
    made = gpuinit.he_normal((1024, 4099), seed=13, dtype=dtype, device=device.name)
    assert_same_bytes(device.numpy(made), whole((1024, 4099), seed=13, dtype=dtype))


# Function, arguments: the normal, with and without a mean and bounds, and a uniform that is not round 0.
DRAWS = (
    ("normal", (0.02,)),
    ("normal", (1.5, -0.25)),
    ("truncated_normal", (0.02, 0.0, -3.0, 3.0)),
    ("truncated_normal", (0.3, 0.1, -1.0, 2.5)),
    ("truncated_normal", (1.0, 0.0, 3.0, math.inf)),
    ("truncated_normal", (1.0, -4.0, -math.inf, -3.0)),
    ("truncated_normal", (0.5, 1.0)),
    ("uniform", (-0.25, 1.5)),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "arguments"), DRAWS)
def test_devices_agree_on_every_distribution(device, dtype, function, arguments):
    make, keywords = getattr(gpuinit, function), {"seed": 24, "name": "w", "dtype": dtype}
    for shape in ((), (7,), (300, 1001)):
        expected = by_numpy(make, shape, *arguments, **keywords)
        made = make(shape, *arguments, device=device.name, **keywords)
        assert_same_bytes(device.numpy(made), expected)
    for index in (np.s_[3:200, 5:77], np.s_[17], np.s_[:, 999:]):
        part = device.numpy(make(shape, *arguments, index=index, device=device.name, **keywords))
        assert_same_bytes(part, np.ascontiguousarray(expected[index]))


# Where some weights are subnormal and all may be, but not all are 0, which is refused.
SMALL = {
    "float32": (1e-30, 1e-37, 1.2e-38, 1e-38, 3e-42, 1e-45),
    "float16": (1e-4, 1e-5, 1e-6, 1e-7, 3e-8),
    "bfloat16": (1e-30, 1e-37, 1.2e-38, 1e-38, 1e-40, 5e-41),
    "float64": (1e-30, 1e-37, 1.2e-38, 1e-38, 3e-42, 1e-45),
}
SMALL_SIZES = [(dtype, size) for dtype, sizes in SMALL.items() for size in sizes]


@pytest.mark.parametrize(("dtype", "size"), SMALL_SIZES)
def test_devices_agree_on_subnormal_weights_of_every_distribution(device, size, dtype):
    keywords = {"seed": 25, "dtype": dtype}
    for function, arguments in (
        ("normal", (size, size)),
        ("normal", (size, 0.0)),
        ("truncated_normal", (size, -size, -1.0, 2.5)),
        ("uniform", (-size, 3 * size)),
    ):
        make = getattr(gpuinit, function)
        made = make(5003, *arguments, device=device.name, **keywords)
        assert_same_bytes(device.numpy(made), by_numpy(make, 5003, *arguments, **keywords))


# Results that are subnormal, or come of a limit that is: CuPy compiles with -ftz=true, NumPy keeps them.
@pytest.mark.parametrize(("dtype", "limit"), [*SMALL_SIZES, *((dtype, 0.0) for dtype in DTYPES)])
def test_devices_agree_on_subnormal_weights(device, limit, dtype):
    made = gpuinit.uniform(5003, limit, seed=14, dtype=dtype, device=device.name)
    expected = by_numpy(gpuinit.uniform, 5003, limit, seed=14, dtype=dtype)
    assert_same_bytes(device.numpy(made), expected)
    assert expected.any() == (limit > 0)
    scaled = gpuinit.truncated_normal(5003, limit, seed=14, dtype=dtype, device=device.name)
    expected = by_numpy(gpuinit.truncated_normal, 5003, limit, seed=14, dtype=dtype)
    assert_same_bytes(device.numpy(scaled), expected)


def test_subnormal_float64_weights_agree(device):
    for limit in (1e-307, 5e-310, 5e-324):
        made = gpuinit.uniform(1001, limit, seed=14, dtype="float64", device=device.name)
        expected = by_numpy(gpuinit.uniform, 1001, limit, seed=14, dtype="float64")
        assert_same_bytes(device.numpy(made), expected)
        assert np.abs(expected).max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_length_is_a_prefix_of_a_greater_one(device, dtype):
    keywords = {"seed": 15, "dtype": dtype}
    longest = by_numpy(gpuinit.uniform, 1025, **keywords)
    for n in [*range(18), 255, 256, 257, 1023, 1024, 1025]:
        made = gpuinit.uniform(n, device=device.name, **keywords)
        assert_same_bytes(device.numpy(made), longest[:n])


@pytest.mark.parametrize("threads", [32, 64, 256])
@pytest.mark.parametrize("blocks", [1, 7, 1000])
def test_block_and_grid_do_not_matter(device, monkeypatch, threads, blocks):
    expected = {dtype: whole((37, 1003), seed=16, dtype=dtype) for dtype in DTYPES}
    monkeypatch.setattr(cuda, "THREADS_PER_BLOCK", threads)
    monkeypatch.setattr(cuda, "resident_blocks", lambda device, *variant: blocks)
    monkeypatch.setattr(cpu, "BLOCKS_ALONE", threads // 31)
    cuda.launch_shape.cache_clear()  # it remembers shapes of other numbers of threads
    for dtype in DTYPES:
        keywords = {"seed": 16, "dtype": dtype, "device": device.name}
        made = gpuinit.he_normal((37, 1003), **keywords)
        assert_same_bytes(device.numpy(made), expected[dtype])
        part = gpuinit.he_normal((37, 1003), index=np.s_[1:, 3:100], **keywords)
        assert_same_bytes(device.numpy(part), np.ascontiguousarray(expected[dtype][1:, 3:100]))


@pytest.mark.parametrize("threads", ["1", "2", "3", "64"])
def test_the_number_of_threads_does_not_matter(device, monkeypatch, threads):
    expected = whole((1024, 1031), seed=17)
    monkeypatch.setenv("GPUINIT_NUM_THREADS", threads)
    monkeypatch.setattr(cpu, "ELEMENTS_PER_THREAD", 1000)
    made = gpuinit.he_normal((1024, 1031), seed=17, device=device.name)
    assert_same_bytes(device.numpy(made), expected)


def test_the_order_of_calls_does_not_matter(device):
    names = ["a", "b", "c"]
    first = {n: gpuinit.he_normal(999, seed=18, name=n, device=device.name) for n in names}
    gpuinit.he_normal(12345, device=device.name)
    second = {n: gpuinit.he_normal(999, seed=18, name=n, device=device.name) for n in names[::-1]}
    for name in names:
        assert_same_bytes(device.numpy(second[name]), device.numpy(first[name]))


# index


def indices(shape):
    """Basic indices into shape: integers, slices of step 1, an Ellipsis, and fewer entries than axes."""
    entries = st.tuples(*map(entry, shape))

    def with_ellipsis(items, start, stop):
        start, stop = sorted((start, stop))
        return (*items[:start], ..., *items[stop:])

    position = st.integers(0, len(shape))
    return st.one_of(
        entries,
        st.builds(with_ellipsis, entries, position, position),
        st.builds(lambda items, n: items[:n], entries, position),
        entry(shape[0]) if shape else st.just(...),
    )


def entry(length):
    bounds = st.none() | st.integers(-length - 2, length + 2)
    slices = st.builds(lambda a, b, one: slice(a, b, one), bounds, bounds, st.sampled_from([None, 1]))
    return st.one_of(slices, st.integers(-length, length - 1)) if length else slices


@st.composite
def shapes_and_indices(draw):
    shape = tuple(draw(st.lists(st.integers(0, 9) | st.just(40), max_size=4)))
    return shape, draw(indices(shape))


@hypothesis.given(shapes_and_indices(), st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=300)
def test_a_part_equals_the_same_part_of_the_whole(device, case, dtype):
    shape, index = case
    keywords = {"seed": 19, "dtype": dtype}
    axes = {} if len(shape) > 1 else {"in_axis": (), "out_axis": ()}
    expected = whole(shape, **keywords, **axes)[index]
    part = gpuinit.he_normal(shape, index=index, device=device.name, **keywords, **axes)
    assert_same_bytes(device.numpy(part), np.ascontiguousarray(expected).reshape(np.shape(expected)))


def test_shards_of_any_shape_join_to_the_whole(device):
    shape, expected = (6, 7, 50, 33), whole((6, 7, 50, 33), seed=20)
    for cuts in [(1, 1, 1, 2), (1, 1, 3, 1), (2, 1, 1, 4), (3, 2, 1, 1), (2, 3, 5, 7)]:
        joined = np.zeros(shape, np.float32)
        steps = [-(-length // n) for length, n in zip(shape, cuts, strict=True)]  # uneven at the end
        for corner in np.ndindex(cuts):
            index = tuple(slice(i * s, (i + 1) * s) for i, s in zip(corner, steps, strict=True))
            part = gpuinit.he_normal(shape, seed=20, index=index, device=device.name)
            joined[index] = device.numpy(part)
        assert_same_bytes(joined, expected)


def test_fans_are_those_of_the_whole_shape(device):
    part = device.numpy(gpuinit.he_normal((10_000, 4), seed=21, index=slice(8), device=device.name))
    assert np.abs(part).max() <= 2 * math.sqrt(2 / 10_000) / 0.8796
    local = by_numpy(gpuinit.he_normal, (8, 4), seed=21)  # the control: local fans are far wider
    assert np.abs(local).max() > 2 * math.sqrt(2 / 10_000) / 0.8796


# Canaries: nothing is written beside what was asked for.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 1000, 4099])
def test_nothing_beside_out_is_written(device, dtype, length):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for lead in (0, 1, 2, 3, 5, 8):  # every alignment
        canvas = np.full(lead + length + 9, 77, kind)
        expected = canvas.copy()
        expected[lead : lead + length] = by_numpy(gpuinit.uniform, length, seed=22, dtype=dtype)
        on_device = device.from_numpy(canvas)
        gpuinit.uniform(length, seed=22, out=on_device[lead : lead + length])
        assert_same_bytes(device.numpy(on_device), expected)


@hypothesis.given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    left=st.integers(0, 9),
    right=st.integers(0, 9),
    lead=st.integers(0, 8),
    dtype=st.sampled_from(DTYPES),
)
def test_nothing_beside_rows_is_written(device, rows, columns, left, right, lead, dtype):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shape, index = (rows + 2, left + columns + right), np.s_[1:-1, left : left + columns]
    size = rows * columns
    canvas = np.full(lead + size + 9, 77, kind)
    expected = canvas.copy()
    expected[lead : lead + size] = whole(shape, seed=23, dtype=dtype)[index].reshape(-1)
    on_device = device.from_numpy(canvas)
    out = on_device[lead : lead + size].reshape(rows, columns)
    assert gpuinit.he_normal(shape, seed=23, index=index, out=out) is out
    assert_same_bytes(device.numpy(on_device), expected)
