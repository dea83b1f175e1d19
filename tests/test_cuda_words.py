"""A key that only the device knows: the kernel reads it from memory, and with it where the part begins."""

from __future__ import annotations

import re
from functools import partial
from math import prod

import numpy as np
import pytest

import gpuinit
from gpuinit.backends import cpu, cuda
from gpuinit.distributions import find_sampling
from gpuinit.initializers import DTYPES, find_draw
from gpuinit.stream import Run, parse_name, row_major, strided_runs

with_kernels = pytest.mark.parametrize("device", ["cuda-sim", "cuda"], indirect=True)

KEY = 0xFEDCBA9876543210
KEYS = (KEY, 0x80000001FFFFFFFE, 1, 2**32)
# On both sides of a word's end and of a span of blocks; the last fills both words.
PLACES = (0, 1, 2**28 - 13, 2**29 - 13, 2**32 - 1, 2**32 + 5, 2**33 + 12, 0x123456789ABCDE1)

DRAWS = {
    "truncated_normal": gpuinit.he_normal,
    "uniform": partial(gpuinit.uniform, limit=0.3),
    "normal": partial(gpuinit.normal, stddev=1.5, mean=-0.25),
    "uniform_between": partial(gpuinit.uniform, low=-0.25, high=1.5),
    "normal_between": partial(gpuinit.truncated_normal, stddev=0.3, mean=0.1, lower=-1.0, upper=2.5),
}


def request_of(name, dtype, key, stream=0xF00DFACE12345678):
    return (key, stream, *find_sampling(find_draw(DRAWS[name], (64, 64)), DTYPES[dtype]))


def words_of(key, place=0):
    return np.array([key >> 32, key & 0xFFFFFFFF, place >> 32, place & 0xFFFFFFFF], np.uint32)


def by_numpy(name, dtype, key, runs):
    """What NumPy makes of a key and runs that are known."""
    runs = list(runs)
    out = np.empty(sum(run.rows * run.length for run in runs), DTYPES[dtype])
    cpu.fill(out, runs, request_of(name, dtype, key))
    return out


def by_kernel(device, name, dtype, key, place, runs, lead=0):
    """The same, with key and place in the device's memory; nothing beside it may be written."""
    runs = list(runs)
    size = sum(run.rows * run.length for run in runs)
    canvas = device.from_numpy(np.full(lead + size + 9, 77, DTYPES[dtype]))
    words = device.from_numpy(words_of(key, place))
    cuda.fill(canvas[lead : lead + size], runs, request_of(name, dtype, words))
    assert device.numpy(words).tobytes() == words_of(key, place).tobytes()
    made = device.numpy(canvas)
    assert (made[:lead] == 77).all()
    assert (made[lead + size :] == 77).all()
    return made[lead : lead + size]


def moved(runs, place):
    return [run._replace(offset=run.offset + place) for run in runs]


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DRAWS)
def test_every_key_and_place_gives_numpys_bytes(device, name, dtype):
    for key in KEYS:
        for place in PLACES:
            for offset in (0, 1, 2**32 - 1):  # the sum carries into the high word
                runs = [Run(offset, 41, 1, 0)]
                made = by_kernel(device, name, dtype, key, place, runs)
                assert made.tobytes() == by_numpy(name, dtype, key, moved(runs, place)).tobytes()


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["truncated_normal", "normal_between"])
def test_every_length_and_start_and_nothing_beside_it(device, name, dtype):
    for length in range(41):
        for lead, place in ((0, 0), (1, 2**32 - 7), (3, 3), (8, 2**34 + 8), (5, 2**32 + 1)):
            runs = list(strided_runs(0, (length,), (1,)))
            made = by_kernel(device, name, dtype, KEY, place, runs, lead)
            assert made.tobytes() == by_numpy(name, dtype, KEY, moved(runs, place)).tobytes()


# Shape of the whole array, starts and lengths of the part: rows, a column, several runs, rows far out.
PARTS = (
    ((37, 1003), (3, 5), (20, 72)),
    ((37, 1003), (0, 17), (37, 1)),
    ((5, 9, 7, 30), (1, 2, 0, 3), (3, 4, 5, 21)),
    ((2**20, 2**20), (3 * 2**12 - 2, 2**20 - 9), (4, 9)),  # a word's end lies between its rows
)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["truncated_normal", "normal"])
@pytest.mark.parametrize(("shape", "starts", "lengths"), PARTS)
def test_a_part_of_a_wider_array_equals_the_same_part_of_the_whole(
    device, name, dtype, shape, starts, lengths
):
    index = tuple(slice(start, start + n) for start, n in zip(starts, lengths, strict=True))
    expected = find_array(name, dtype, shape, index)
    strides = row_major(shape)
    place = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    for part in {place, 0, place - 1}:  # in memory; the rest is the runs'
        runs = list(strided_runs(place - part, lengths, strides))
        out = device.cupy.empty(prod(lengths), DTYPES[dtype])
        key = device.from_numpy(words_of(KEY, part))
        cuda.fill(out, runs, request_of_shape(name, dtype, key, shape))
        assert device.numpy(out).tobytes() == expected.tobytes()


def find_array(name, dtype, shape, index):
    """By the functions that users call."""
    return DRAWS[name](shape, seed=KEY, name="w", dtype=dtype, index=index, device="cpu")


def request_of_shape(name, dtype, key, shape):
    return (key, parse_name("w"), *find_sampling(find_draw(DRAWS[name], shape), DTYPES[dtype]))


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_runs_in_one_fill_and_many_turns_of_a_loop(device, dtype):
    runs = [Run(3, 1001, 1, 0), Run(0, 7, 11, 2**32 + 3), Run(2**31, 5, 1, 0), Run(1, 100_003, 1, 0)]
    for name in ("truncated_normal", "normal_between"):
        made = by_kernel(device, name, dtype, KEY, 2**32 - 2, runs, lead=1)
        assert made.tobytes() == by_numpy(name, dtype, KEY, moved(runs, 2**32 - 2)).tobytes()


@with_kernels
@pytest.mark.parametrize("threads", [32, 256])
@pytest.mark.parametrize("blocks", [1, 7, 1000])
def test_block_and_grid_do_not_matter(device, monkeypatch, threads, blocks):
    monkeypatch.setattr(cuda, "THREADS_PER_BLOCK", threads)
    monkeypatch.setattr(cuda, "resident_blocks", lambda *key: blocks)
    cuda.launch_shape.cache_clear()  # it remembers shapes of other numbers of threads
    runs = [Run(5, 1003, 37, 2001)]
    for dtype in DTYPES:
        made = by_kernel(device, "normal", dtype, KEY, 2**35 + 1, runs)
        assert made.tobytes() == by_numpy("normal", dtype, KEY, moved(runs, 2**35 + 1)).tobytes()
    cuda.launch_shape.cache_clear()


def test_a_key_in_memory_takes_kernels_of_its_own_and_no_other_does(cupy_sim, monkeypatch):
    compiled = []
    source = cuda.source
    monkeypatch.setattr(cuda, "source", lambda *choice: compiled.append(choice) or source(*choice))
    out = cupy_sim.empty(100, np.float64)
    for key, expected in ((KEY, (False,) * 3), (cupy_sim.ndarray(words_of(KEY)), (False, True, False))):
        cuda.fill(out, [Run(0, 100, 1, 0)], request_of("uniform", "float64", key))
        assert compiled.pop() == expected
        assert not compiled
    sources = [source(shifted, memory) for shifted in (False, True) for memory in (False, True)]
    assert [code.startswith("#define KEY_IN_MEMORY\n") for code in sources] == [False, True] * 2
    assert [code.removeprefix("#define KEY_IN_MEMORY\n") for code in sources[1::2]] == sources[::2]


def test_the_host_never_reads_the_key_and_the_launch_is_on_the_current_stream(cupy_sim, monkeypatch):
    """Were it read, the call would wait for the device; what a capture of the stream has, it reads later."""
    memory = words_of(KEY, 3)
    with cupy_sim.cuda.Device(1):
        out = cupy_sim.empty(100, np.float32)
        owned = cupy_sim.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 1)
        words = cupy_sim.ndarray((4,), np.uint32, cupy_sim.cuda.MemoryPointer(owned, 0))
    launch, launched = cupy_sim.host_build.launch, []
    monkeypatch.setattr(cupy_sim.host_build, "launch", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(cupy_sim.ndarray, "get", lambda self: pytest.fail("read on the host"))
    stream = cupy_sim.cuda.ExternalStream(0x5EED, 1)
    cupy_sim.launches.clear()
    with cupy_sim.cuda.Device(1), stream:
        cuda.fill(out, [Run(0, 100, 1, 0)], request_of("uniform", "float32", words))
    assert cupy_sim.launches == [(1, stream)]
    memory[:] = words_of(KEY + 1, 5)  # before the kernel runs
    for arguments in launched:
        launch(*arguments)
    assert out.host.tobytes() == by_numpy("uniform", "float32", KEY + 1, [Run(5, 100, 1, 0)]).tobytes()


def test_the_kernels_refuse_a_key_of_the_other_kind_and_words_out_of_place(cupy_sim):
    out, runs = cupy_sim.empty(100, np.float32), [Run(0, 100, 1, 0)]

    def refuses(error, words, message):
        with pytest.raises(error, match=message):
            cuda.fill(out, runs, request_of("uniform", "float32", words))

    more = np.zeros(12, np.uint32)
    first = -(more.ctypes.data // 4) % 4  # that is aligned
    aligned, not_aligned = more[first : first + 4], more[first + 1 : first + 5]
    cuda.fill(out, runs, request_of("uniform", "float32", cupy_sim.ndarray(aligned)))
    refuses(ValueError, cupy_sim.ndarray(not_aligned), "not aligned")
    refuses(ValueError, cupy_sim.ndarray(aligned, cupy_sim.Device(1)), "not on the current device")
    refuses(TypeError, aligned, "argument 5 must be an array")
    number, address = (cuda.kernel("float32", False, in_memory) for in_memory in (False, True))
    scalars = (*map(np.uint64, runs[0][:4]), np.uint64(1), np.uint64(0), np.uint32(0), np.float32(1))
    number((1, 1), (32, 1), (out, *scalars))
    with pytest.raises(TypeError, match="argument 5 must be an array"):
        address((1, 1), (32, 1), (out, *scalars))
    with pytest.raises(TypeError, match=re.escape("argument 5 must be <class 'numpy.uint64'>")):
        number((1, 1), (32, 1), (out, *scalars[:4], cupy_sim.ndarray(aligned), *scalars[5:]))


def test_a_stream_by_its_address_is_current_on_its_own_device_alone(cupy_sim):
    """The stand-in, as CuPy has it."""
    stream, other = cupy_sim.cuda.ExternalStream(16, 1), cupy_sim.cuda.ExternalStream(32)
    with pytest.raises(RuntimeError, match="device 1"):
        stream.__enter__()
    with other, cupy_sim.cuda.Device(1), stream:
        gpuinit.he_normal((8, 8), device="cuda:0")
        assert cupy_sim.launches[-1] == (0, other)
        gpuinit.he_normal((8, 8), device="cuda:1")
        assert cupy_sim.launches[-1] == (1, stream)
    assert not any(cupy_sim.current_stream.values())
