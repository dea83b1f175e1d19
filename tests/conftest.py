"""One suite for every device. A test that takes `device` runs on each, and never asks which it is.

GPUINIT_TEST_DEVICES=cpu,cpu-numba,cuda-sim,cuda chooses. A device that was asked for and is missing fails the
run; one that was not asked for is a visible skip. Unset, every device that is here is used.
"""

from __future__ import annotations

import collections
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cuda_sim
import host_build
import hypothesis
import numpy as np
import pytest

from gpuinit import devices, quantile
from gpuinit.backends import cpu, cuda

NAMES = ("cpu", "cpu-numba", "cuda-sim", "cuda")

hypothesis.settings.register_profile(
    "gpuinit",
    deadline=None,  # the machine is shared
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("gpuinit")

# For tests only: the kernel's own functions, called one by one.
PROBES = """
extern "C" __global__ void probe_philox4x32(uint64 *counters_and_keys, uint4 *words, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x()) {
        uint64 *row = counters_and_keys + 3 * i;
        words[i] = philox4x32(row[0], row[1], row[2]);
    }
}

extern "C" __global__ void probe_reciprocal(float *x, float *inverses, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x())
        inverses[i] = reciprocal(x[i]);
}

extern "C" __global__ void probe_truncated_normal(uint4 *words, float4 *samples, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x())
        samples[i] = truncated_normal(make_float4(uniform(words[i].x), uniform(words[i].y),
                                                  uniform(words[i].z), uniform(words[i].w)));
}

extern "C" __global__ void probe_truncated_normal64(uint4 *words, double2 *samples, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x())
        samples[i] = truncated_normal64(make_double2(uniform64(words[i].x, words[i].y),
                                                     uniform64(words[i].z, words[i].w)));
}
"""

# The normal, cut or not, of words; SAMPLE is the call, with the numbers written in.
NORMAL_PROBES = """
extern "C" __global__ void probe_normal(uint4 *words, float4 *samples, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x()) {
        uint4 w = words[i];
        samples[i] = make_float4(SAMPLE(w.x), SAMPLE(w.y), SAMPLE(w.z), SAMPLE(w.w));
    }
}
"""
NORMAL_PROBES64 = """
extern "C" __global__ void probe_normal(uint4 *words, double2 *samples, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x()) {
        uint4 w = words[i];
        samples[i] = make_double2(SAMPLE(w.x, w.y), SAMPLE(w.z, w.w));
    }
}
"""


class Cpu:
    """The CPU and its NumPy engine, seen by the tests."""

    name = "cpu"

    def numpy(self, array: Any) -> np.ndarray:
        assert isinstance(array, np.ndarray)
        return array

    def from_numpy(self, array: np.ndarray) -> Any:
        return array

    def philox4x32(self, blocks: list[int], streams: list[int], keys: list[int]) -> np.ndarray:
        """The words, one block a row."""
        rows = []
        for block, stream, key in zip(blocks, streams, keys, strict=True):
            words = []
            for n in (1, quantile.FEW_BLOCKS + 1):  # there are two ways
                scratch = quantile.make_scratch(quantile.make_memory(n), n, np.float32)
                even, odd = quantile.philox4x32(np.full(n, block, np.uint64), stream, key, scratch)
                words.append([even.low[0], odd.low[0], even.low[n], odd.low[n]])
            assert words[0] == words[1]
            rows.append(words[0])
        return np.array(rows, np.uint32).reshape(-1, 4)

    def reciprocal(self, x: np.ndarray) -> np.ndarray:
        return np.divide(np.float32(1), x)

    def truncated_normal(self, words: np.ndarray) -> np.ndarray:
        """The float32 samples of words, (n, 4) both."""
        n = len(words)
        scratch = quantile.make_scratch(quantile.make_memory(n), n, np.float32)
        scratch.even.low[:], scratch.odd.low[:] = words.T[0::2].ravel(), words.T[1::2].ravel()
        u = quantile.uniform((scratch.even, scratch.odd), scratch.u)
        return quantile.truncated_normal(u, scratch)[[0, 2, 1, 3]].T.copy()

    def truncated_normal64(self, words: np.ndarray) -> np.ndarray:
        """The float64 samples, (n, 2), of words, (n, 4)."""
        n = len(words)
        scratch = quantile.make_scratch(quantile.make_memory(n), n, np.float64)
        scratch.even.both[:], scratch.odd.both[:] = words.T[0::2].ravel(), words.T[1::2].ravel()
        quantile.join64(scratch.even, scratch.odd)
        u = quantile.uniform64(scratch.words, scratch.u)
        return quantile.truncated_normal64(u, scratch).T.copy()

    def normal(self, words: np.ndarray, kind: Any, numbers: tuple | None = None) -> np.ndarray:
        """The samples of words, (n, 4), in float32 or float64; with numbers, of the normal between bounds."""
        n = len(words)
        scratch = quantile.make_scratch(quantile.make_memory(n), n, kind)
        if kind is np.float64:
            scratch.even.both[:], scratch.odd.both[:] = words.T[0::2].ravel(), words.T[1::2].ravel()
            quantile.join64(scratch.even, scratch.odd)
        else:
            scratch.words[:] = words.T.view(np.int32)
        scratch = quantile.normal_scratch(scratch)
        made = quantile.normal_between(numbers, scratch) if numbers else quantile.normal(scratch)
        return made.T.copy()


class CpuNumba(Cpu):
    """The CPU and its Numba engine, seen by the tests."""

    def philox4x32(self, blocks: list[int], streams: list[int], keys: list[int]) -> np.ndarray:
        numbers = np.array([blocks, streams, keys], np.uint64)
        words = np.stack([numbers & 0xFFFFFFFF, numbers >> 32], 1).reshape(6, -1)
        made = numba_probe("philox4x32")(words, np.uint64, 4)
        return (made.T & 0xFFFFFFFF).astype(np.uint32)

    def truncated_normal(self, words: np.ndarray) -> np.ndarray:
        return numba_probe("truncated_normal")(words.T, np.float32, 4).T.copy()

    def truncated_normal64(self, words: np.ndarray) -> np.ndarray:
        return numba_probe("truncated_normal64")(words.T, np.float64, 2).T.copy()

    def normal(self, words: np.ndarray, kind: Any, numbers: tuple | None = None) -> np.ndarray:
        name = ("normal_between" if numbers else "normal") + ("64" if kind is np.float64 else "")
        return numba_probe(name, numbers)(words.T, kind, 2 if kind is np.float64 else 4).T.copy()


@functools.cache
def numba_probe(name: str, numbers: tuple | None = None) -> Callable[..., np.ndarray]:
    """One of the compiled engine's own functions, of rows of 64-bit words, that gives rows of numbers."""
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from gpuinit import compiled

    functions: dict[str, Callable[..., Any]] = {
        "philox4x32": lambda b0, b1, *others: compiled.philox4x32((b0, b1), others[:2], others[2:]),
        "truncated_normal": lambda *words: compiled.truncated_normal(*map(compiled.uniform, narrow(words))),
        "truncated_normal64": lambda *words: compiled.truncated_normal64(
            *map(compiled.uniform64, joined(words))
        ),
        "normal": lambda *words: map(compiled.normal, narrow(words)),
        "normal64": lambda *words: map(compiled.normal, joined(words)),
        "normal_between": lambda *words: (compiled.normal_between(s, lanes(s)) for s in narrow(words)),
        "normal_between64": lambda *words: (compiled.normal_between(s, lanes(s)) for s in joined(words)),
        "round_to_float16": lambda *words: [compiled.round_to_float16(*map(weight, words))],
        "round_to_bfloat16": lambda *words: [compiled.round_to_bfloat16(*map(weight, words))],
    }

    def narrow(words: Any) -> list[Any]:
        return [word.low_halves() for word in words]

    def joined(words: Any) -> list[Any]:
        return [compiled.join64(*words[:2]), compiled.join64(*words[2:])]

    def weight(word: Any) -> Any:
        return word.low_halves().bits(compiled.FLOAT)

    def lanes(word: Any) -> Any:
        is_wide = name.endswith("64")
        kinds = (compiled.DOUBLE, compiled.INT64) if is_wide else (compiled.FLOAT, compiled.INT32)
        each = [ir.Constant(kinds[isinstance(x, np.integer)], x.item()) for x in numbers]
        return compiled.Numbers(*(compiled.in_every_lane(word.builder, x, word.count) for x in each))

    @intrinsic
    def apply(typing: Any, rows: Any, results: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def pointers(tuple_type: Any, arrays: Any) -> list[Any]:
                each = [builder.extract_value(arrays, i) for i in range(len(tuple_type))]
                data = [context.make_array(tuple_type.dtype)(context, builder, array).data for array in each]
                return [builder.gep(pointer, [arguments[2]]) for pointer in data]

            vector = ir.VectorType(ir.IntType(64), compiled.BLOCKS).as_pointer()
            loaded = [
                compiled.Lanes(builder, builder.load(builder.bitcast(pointer, vector), align=8))
                for pointer in pointers(rows, arguments[0])
            ]
            for made, pointer in zip(functions[name](*loaded), pointers(results, arguments[1]), strict=True):
                builder.store(made.value, builder.bitcast(pointer, made.value.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(rows, results, place), generate

    @numba.njit
    def run(rows: Any, results: Any) -> None:
        for place in range(0, len(rows[0]), compiled.BLOCKS):
            apply(rows, results, place)

    def probe(words: np.ndarray, result_type: Any, results: int) -> np.ndarray:
        count = words.shape[1]
        padded = np.zeros((len(words), -(-count // compiled.BLOCKS) * compiled.BLOCKS), np.uint64)
        padded[:, :count] = words
        if name != "philox4x32" and not name.endswith("64"):  # what low_halves will put in turns
            groups = padded.reshape(len(words), -1, compiled.BLOCKS // 2, 2)
            padded = groups.swapaxes(2, 3).reshape(padded.shape)
        made = np.zeros((results, padded.shape[1]), result_type)
        run(tuple(padded), tuple(made))
        return made[:, :count]

    return probe


class Cuda:
    """CUDA through the CuPy that is imported now, real or not, seen by the tests."""

    name = "cuda"

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def numpy(self, array: Any) -> np.ndarray:
        assert isinstance(array, self.cupy.ndarray)
        return array.get()

    def from_numpy(self, array: np.ndarray) -> Any:
        if isinstance(self.cupy, type(sys)) and hasattr(self.cupy, "array"):
            return self.cupy.array(array, order="C")  # RawKernel heeds no strides
        return self.cupy.ndarray(array.copy())

    def probe(self, name: str, given: np.ndarray, result: Any, code: str | None = None) -> np.ndarray:
        kernel = self.cupy.RawKernel(code or cuda.source() + PROBES, name, options=cuda.OPTIONS)
        kernel((7,), (32,), (self.from_numpy(given), result, np.uint64(len(given))))
        return result.get()

    def philox4x32(self, blocks: list[int], streams: list[int], keys: list[int]) -> np.ndarray:
        rows = np.array([blocks, streams, keys], np.uint64).T.copy()
        return self.probe("probe_philox4x32", rows, self.cupy.empty((len(rows), 4), np.uint32))

    def reciprocal(self, x: np.ndarray) -> np.ndarray:
        return self.probe("probe_reciprocal", x, self.cupy.empty(x.shape, np.float32))

    def truncated_normal(self, words: np.ndarray) -> np.ndarray:
        result = self.cupy.empty((len(words), 4), np.float32)
        return self.probe("probe_truncated_normal", words.astype(np.uint32), result)

    def truncated_normal64(self, words: np.ndarray) -> np.ndarray:
        result = self.cupy.empty((len(words), 2), np.float64)
        return self.probe("probe_truncated_normal64", words.astype(np.uint32), result)

    def normal(self, words: np.ndarray, kind: Any, numbers: tuple | None = None) -> np.ndarray:
        wide = "64" if kind is np.float64 else ""
        sample = f"normal{wide}(__VA_ARGS__)"
        if numbers:
            *floats, split = (x.item() for x in numbers)
            written = ", ".join(f"{x.hex()}{'' if wide else 'f'}" for x in floats)
            sample = f"normal_between{wide}(__VA_ARGS__, Numbers{wide or 32}{{{written}, {split}}})"
        code = f"#define SAMPLE(...) {sample}\n{NORMAL_PROBES64 if wide else NORMAL_PROBES}"
        result = self.cupy.empty((len(words), 2 if wide else 4), kind)
        return self.probe("probe_normal", words.astype(np.uint32), result, cuda.source(shifted=True) + code)


REMEMBERED = (devices.find_cuda_problem, cuda.kernel, cuda.resident_blocks)


def forget() -> None:
    """Make gpuinit look for CUDA anew."""
    for function in REMEMBERED:
        function.cache_clear()
    devices.fallback_warned = False


def missing(name: str) -> str | None:
    """Why a test device is not here; None if it is."""
    if name == "cpu-numba":
        return cpu.numba_problem()
    if name == "cuda-sim":
        return None if host_build.compiler() else "no C++ compiler. Install g++"
    if name == "cuda":
        return devices.cuda_problem()
    return None


def asked_for() -> list[str]:
    setting = os.environ.get("GPUINIT_TEST_DEVICES")
    return list(NAMES) if setting is None else setting.split(",")


REASONS: dict[str, str | None] = {}  # why a device does not run, None where it does


def pytest_configure() -> None:
    names = asked_for()
    unknown = set(names) - set(NAMES)
    if unknown:
        raise pytest.UsageError(
            f"GPUINIT_TEST_DEVICES must be a list of {', '.join(NAMES)}, got {', '.join(unknown)}"
        )
    for name in NAMES:
        REASONS[name] = missing(name) if name in names else "not asked for"
        if REASONS[name] and name in names and "GPUINIT_TEST_DEVICES" in os.environ:
            raise pytest.UsageError(f"{name} was asked for and cannot run: {REASONS[name]}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("devices")
    for name, reason in REASONS.items():
        terminalreporter.line(f"{name:10}" + (f"did not run: {reason}" if reason else "ran"))
    skipped = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in skipped.items():
        terminalreporter.line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def numpy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the tests run the NumPy engine, unless the device or the test is about the other."""
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numpy")


@pytest.fixture
def cupy_sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in CuPy, in place of the real one."""
    if REASONS["cuda-sim"]:
        pytest.skip(f"cuda-sim: {REASONS['cuda-sim']}")
    if "cupy" in sys.modules:
        # Hypothesis looks at every module, which makes the real CuPy import this one, from itself.
        importlib.import_module("cupyx.scipy.sparse")
    monkeypatch.setitem(sys.modules, "cupy", cuda_sim)
    forget()
    yield cuda_sim
    forget()


@pytest.fixture(params=NAMES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name = request.param
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")
    if name == "cpu":
        yield Cpu()
    elif name == "cpu-numba":
        monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
        yield CpuNumba()
    elif name == "cuda-sim":
        yield Cuda(request.getfixturevalue("cupy_sim"))
    else:
        import cupy

        yield Cuda(cupy)


@pytest.fixture
def place(device: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts one of torch's tensors on the device, in its layout."""
    import torch_devices

    return torch_devices.placer(request.node.callspec.params["device"], monkeypatch)
