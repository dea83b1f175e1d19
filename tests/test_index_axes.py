"""Parts that are cut along many axes: the bytes of the whole's part, in one call of an engine."""

import itertools

import numpy as np
import pytest

import gpuinit
from gpuinit.backends import cpu, cuda
from gpuinit.stream import Run, parse_index, runs, walk

FUNCTIONS = {
    "uniform": (gpuinit.uniform, 0.5),
    "truncated normal": (gpuinit.he_normal,),
    "normal": (gpuinit.normal, 1.0),
    "normal between": (gpuinit.truncated_normal, 1.0, 0.0, -1.0, 3.0),
}
PARTS = [
    ((64, 8, 8), np.s_[:, :4, :4]),
    ((64, 8, 8), np.s_[3:60, 1:6, 2:7]),
    ((5, 7, 9, 11), np.s_[1:4, 2:6, 3:8, 1:10]),
    ((5, 7, 9, 11), np.s_[:, 2:6, :, 10]),  # single elements
    ((3, 4, 5, 6, 7), np.s_[1:, :3, 1:4, :5, 2:5]),
    ((3, 2, 3, 2, 3, 2, 3), np.s_[:2, :1, 1:, :, 1:, :1, :2]),
    ((2, 3) * 4, np.s_[:, 1:, :, 1:, :, :2, :, 1:]),
    ((3,) * 9, np.s_[(slice(1, 3),) * 9]),  # of more axes than one launch walks along
    ((3, 3000, 4, 4), np.s_[:2, 1:2999, :3, 1:3]),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("shape", "index"), PARTS, ids=[str(number) for number in range(len(PARTS))])
def test_a_part_has_the_bytes_of_the_whole(device, shape, index, function, dtype):
    make, *arguments = FUNCTIONS[function]
    keywords = {"seed": 7, "dtype": dtype, "device": device.name}
    whole = device.numpy(make(shape, *arguments, **keywords))
    part = device.numpy(make(shape, *arguments, index=index, **keywords))
    assert part.tobytes() == whole[index].tobytes()


@pytest.mark.parametrize("place", [0, 2**34 - 100, 2**62])
@pytest.mark.parametrize("strides", [(1,), (8, 4), (3, 7, 40), (3, 5, 100, 1000, 2**33, 2**34 + 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_groups_are_made_as_if_one_by_one(device, dtype, strides, place):
    """Whatever the strides: every row at its own place of a block, past 2**32 blocks."""
    outer = tuple((3, stride) for stride in strides)
    backend = cuda if device.name == "cuda" else cpu
    run = Run(place, 5, 2, 13, outer)
    one_by_one = [Run(place + further, 5, 2, 13) for further in walk(outer)]
    made = []
    for given in ([run], one_by_one, [one_by_one[0], run]):
        size = sum(one.rows * one.length * 3 ** len(one.outer) for one in given)
        out = backend.empty((size,), np.dtype(dtype), 0 if backend is cuda else None)
        backend.fill(out, given, (5, 6, 1, (np.dtype(dtype).type(1),)))
        made.append(device.numpy(out).tobytes())
    assert made[0] == made[1] == made[2][10 * np.dtype(dtype).itemsize :]
    assert len(set(np.frombuffer(made[0], dtype)[:30])) > 9


def test_the_run_of_a_part_is_its_elements_in_order():
    for shape, index in PARTS:
        starts, lengths, _ = parse_index(index, shape)
        (run,) = runs(shape, starts, lengths)
        inner = itertools.product(walk(run.outer), range(run.rows), range(run.length))
        elements = [run.offset + further + r * run.row_stride + i for further, r, i in inner]
        expected = np.arange(np.prod(shape)).reshape(shape)[index].reshape(-1)
        assert elements == expected.tolist()


def test_places_are_those_of_a_walk():
    axes = ((3, 5), (4, 2**40), (2, 7), (5, 2**61))
    expected = list(walk(axes))
    assert len(expected) == 120
    for start, stop in ((0, 120), (1, 2), (7, 113), (119, 120)):
        assert cpu.places(axes, start, stop).tolist() == expected[start:stop]


@pytest.mark.parametrize("shape", [(2**12, 8, 8), (2**15, 8, 8)])
def test_the_engines_are_called_a_few_times(device, shape, monkeypatch):
    """Not once for each of thousands of groups."""
    calls = []
    if device.name == "cuda":
        kernel = cuda.kernel

        def spy(*variant):
            calls.append(variant)
            return kernel(*variant)

        monkeypatch.setattr(cuda, "kernel", spy)
    else:
        tiles = cpu.tiles

        def counted(*arguments):
            for tile in tiles(*arguments):
                calls.append(tile)
                yield tile

        monkeypatch.setattr(cpu, "tiles", counted)
    gpuinit.he_normal(shape, seed=1, index=np.s_[:, :4, :4], device=device.name)
    assert 1 <= len(calls) <= 40
