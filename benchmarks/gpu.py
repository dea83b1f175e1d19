"""gpuinit beside its peers on a GPU, and beside what the device's memory allows:

python benchmarks/gpu.py

From a plain checkout, in under 8 minutes. Needs CuPy; PyTorch, JAX, Keras and matplotlib are used where they
are. The golden digests come first: a kernel that makes other bits is not timed. Writes a table, a JSON file
and a bar chart under benchmarks/results/, named after the device and the day.

Times are medians of rounds, each of many calls between two CUDA events on the library's own stream, after a
warm-up. The device is held back while the host queues the calls, so that the time is the device's. JAX and
Keras show no stream: theirs is the time by the clock until the last array is there, the host's where that is
slower, as at 64x64; "he_normal, by the clock" is ours timed in the same way. The calls go through enough
arrays to overflow the L2 cache three times, as far as MOST_ARRAYS of them do: at 64x64 they stay in it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # a plain checkout

import golden

import gpuinit
from gpuinit import devices
from gpuinit.backends import cuda
from gpuinit.initializers import DTYPES

SHAPES = ((64, 64), (1024, 1024), (4096, 4096), (16384, 16384))
SHARD = ((16384, 16384), (slice(None), slice(4096, 8192)))  # a quarter of the columns
SHARD_SHAPE = (16384, 4096)
LARGEST = SHAPES[-1]
PEER_DTYPES = ("float32", "bfloat16")
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # a fill of bits needs no header of CUDA

ROUNDS = 9
SECONDS_A_ROUND = 0.05
SECONDS_TO_WAKE = 1.0  # for the device's clocks to rise
MOST_ARRAYS = 64
MOST_CALLS = 100  # in a round: the queue to the device has to hold all their launches
HELD_BACK = 20_000_000  # nanoseconds, in which the host has to queue them
PACKAGES = ("gpuinit", "numpy", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "keras", "matplotlib")

Measurement = dict[str, Any]  # library, call, dtype, shape, milliseconds, gigabytes_per_second
Run = Callable[[], object]
Elapsed = Callable[[Run], float]  # runs it, and gives its milliseconds
# What is called, the call, how it is timed, shape, dtype.
Case = tuple[str, Callable[[int], object], Elapsed, tuple[int, ...], str]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time gpuinit and its peers on this machine's GPU.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    problem = devices.cuda_problem()
    if problem is not None:
        sys.exit(f"CUDA cannot be used: {problem}")
    check_golden("cuda")
    report: dict[str, Any] = {
        **about(),
        "first_call": first_call(),
        "host_microseconds": host_microseconds(),
        "extra_bytes": extra_bytes(),
        "measurements": [],
        "missing": {},
    }
    wake()
    for name in LIBRARIES:
        measure(name, report)
    write(report, options.results)


def measure(name: str, report: dict[str, Any]) -> None:
    """Add the rows of a library to the report. A failure costs a peer that row, and ours everything."""
    try:
        for call, run, elapsed, shape, dtype in LIBRARIES[name]():
            try:
                measurement = timed(run, elapsed, shape, dtype)
            except Exception as error:
                if name in OURS:
                    raise
                report["missing"][f"{name} {call} {shape} {dtype}"] = devices.describe(error)
                continue
            report["measurements"].append({"library": name, "call": call, **measurement})
            print(row(report["measurements"][-1]), flush=True)
    except Exception as error:  # the peer is not there
        if name in OURS:
            raise
        report["missing"][name] = devices.describe(error)


def check_golden(device: str) -> None:
    """Leave if the device makes other bits than those in tests/golden.json."""
    table = json.loads((ROOT / "tests" / "golden.json").read_text(encoding="utf-8"))
    for case in table["arrays"]:
        weights = golden.make(case, device=device)
        host = weights if isinstance(weights, np.ndarray) else weights.get()
        if hashlib.sha256(host.tobytes()).hexdigest() != case["sha256"]:
            sys.exit(f"{device} makes other bits than tests/golden.json: nothing is timed. The case: {case}")


def about() -> dict[str, Any]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    driver = cupy.cuda.runtime.driverGetVersion()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions.setdefault("gpuinit", gpuinit.__version__)
    return {
        "device": properties["name"].decode(),
        "compute_capability": cupy.cuda.Device().compute_capability,
        "multiprocessors": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "driver": driver_version(),
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def driver_version() -> str | None:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """The commit of the checkout, with a plus where it has changes."""
    head = output("git", "rev-parse", "--short", "HEAD")
    return head and head + ("+" if output("git", "status", "--porcelain", "-uno") else "")


def output(*command: str) -> str | None:
    """What a command prints, in its first line; None where it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.partition("\n")[0].strip()


FIRST_CALL = """
import sys, time
sys.path.insert(0, {root!r})
import cupy
cupy.zeros(1).sum().get()  # CuPy's own start
start = time.perf_counter()
import gpuinit
gpuinit.he_normal((64, 64), device="cuda").device.synchronize()
print(time.perf_counter() - start)
"""


def first_call() -> dict[str, float]:
    """Seconds of `import gpuinit` and the first call in a new process, without and with a cached kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_CALL.format(root=str(ROOT))]
        environment = {**os.environ, "CUPY_CACHE_DIR": folder}
        environment["CUDA_CACHE_DISABLE"] = "1"
        cold, warm = (
            float(
                subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            )
            for _ in range(2)
        )
    return {"cold": cold, "warm": warm}


def host_microseconds() -> dict[str, float]:
    """Host time of one call on a 64x64 array, and of an allocation and a bare launch."""
    import cupy

    kernel = cuda.kernel("float32")
    scalars = (*map(np.uint64, (0, 4096, 1, 0, 1, 0)), np.uint32(1), np.float32(0.1))

    def bare() -> None:
        kernel((4, 1), (256, 1), (cupy.empty((64, 64), np.float32), *scalars))

    calls: dict[str, Run] = {
        "he_normal": lambda: gpuinit.he_normal((64, 64), device="cuda", seed=1),
        "empty and bare launch": bare,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):  # in turns; the first is the warm-up
        for name, call in calls.items():
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(200):  # fewer than the launch queue holds
                call()
            times[name].append((time.perf_counter() - start) / 200 * 1e6)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def extra_bytes() -> int:
    """Memory that he_normal takes from CuPy's pool beyond its result."""
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    weights = gpuinit.he_normal(LARGEST, device="cuda")
    weights.device.synchronize()
    return int(pool.total_bytes() - before - weights.nbytes)


def wake() -> None:
    out = gpuinit.he_normal(LARGEST, device="cuda")
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS_TO_WAKE:
        gpuinit.he_normal(LARGEST, seed=1, out=out).device.synchronize()


def timed(call: Callable[[int], object], elapsed: Elapsed, shape: Any, dtype: str) -> Measurement:
    """The measurement of call(0), call(1), ..."""
    number = itertools.count()
    elapsed(lambda: call(next(number)))  # compiles, and whatever else is paid once
    alone = elapsed(lambda: call(next(number)))
    calls = max(1, min(MOST_CALLS, int(SECONDS_A_ROUND * 1e3 / max(alone, 1e-3))))

    def several() -> None:
        for _ in range(calls):
            call(next(number))

    elapsed(several)
    milliseconds = statistics.median(elapsed(several) for _ in range(ROUNDS)) / calls
    made = {"dtype": dtype, "shape": list(shape), "milliseconds": milliseconds}
    return {**made, "gigabytes_per_second": size(made) / milliseconds / 1e6}


def arrays_needed(array_bytes: int, l2_bytes: int) -> int:
    """How many arrays of that many bytes overflow the L2 cache three times."""
    return min(MOST_ARRAYS, max(2, -(-3 * l2_bytes // array_bytes)))


def cupy_arrays(shape: tuple[int, ...], dtype: str) -> list[Any]:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()  # those of another shape
    l2 = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["l2CacheSize"]
    count = arrays_needed(math.prod(shape) * DTYPES[dtype].itemsize, l2)
    return [cupy.empty(shape, DTYPES[dtype]) for _ in range(count)]


HOLD = r"""
extern "C" __global__ void hold(unsigned long long nanoseconds)
{
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""


@cache
def hold() -> Any:
    import cupy

    return cupy.RawKernel(HOLD, "hold")


def hold_back() -> None:
    """Keep CuPy's current stream waiting, so that the host is ahead of the device."""
    hold()((1,), (1,), (np.uint64(HELD_BACK),))


def cupy_elapsed(run: Run) -> float:
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    hold_back()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end))


def by_the_clock(wait: Run) -> Elapsed:
    """For a library that shows no stream: `wait` returns when all that was called is done."""

    def elapsed(run: Run) -> float:
        start = time.perf_counter()
        run()
        wait()
        return (time.perf_counter() - start) * 1e3

    return elapsed


def measure_device() -> Iterator[Case]:
    """The ceiling: the same bytes written by CuPy's fill and by a memset."""
    for shape in (*SHAPES, SHARD_SHAPE):
        for dtype in ("bfloat16", "float32", "float64"):
            outs = [out.view(UNSIGNED[out.dtype.itemsize]) for out in cupy_arrays(shape, dtype)]
            n = len(outs)

            def memset(i: int, outs: list[Any] = outs, n: int = n) -> None:
                outs[i % n].data.memset_async(0, outs[i % n].nbytes)

            def fill(i: int, outs: list[Any] = outs, n: int = n) -> None:
                outs[i % n].fill(1)  # of 0 CuPy makes a memset

            yield "memset", memset, cupy_elapsed, shape, dtype
            yield "fill", fill, cupy_elapsed, shape, dtype


def measure_gpuinit() -> Iterator[Case]:
    import cupy

    clock = by_the_clock(cupy.cuda.Device().synchronize)
    for shape in SHAPES:
        for dtype in DTYPES:
            outs = cupy_arrays(shape, dtype)

            def he_normal(i: int, shape: Any = shape, outs: list[Any] = outs) -> None:
                gpuinit.he_normal(shape, seed=1, out=outs[i % len(outs)])

            yield "he_normal", he_normal, cupy_elapsed, shape, dtype
            if dtype in PEER_DTYPES and shape != LARGEST:  # whose time is the device's in any case
                yield "he_normal, by the clock", he_normal, clock, shape, dtype
    whole, index = SHARD
    for dtype in DTYPES:
        outs = cupy_arrays(SHARD_SHAPE, dtype)

        def shard(i: int, outs: list[Any] = outs) -> None:
            gpuinit.he_normal(whole, seed=1, index=index, out=outs[i % len(outs)])

        yield "he_normal, column shard", shard, cupy_elapsed, SHARD_SHAPE, dtype
    # How the size of the grid matters, for whoever tunes it.
    usual, multiprocessors = cuda.resident_blocks, cupy.cuda.Device().attributes["MultiProcessorCount"]
    try:
        for blocks in (2, 4, 5, 6, 8, 16, 32):
            cuda.resident_blocks = lambda *key, n=blocks * multiprocessors: n  # type: ignore[assignment]
            for dtype in PEER_DTYPES:
                outs = cupy_arrays(LARGEST, dtype)

                def grid(i: int, outs: list[Any] = outs) -> None:
                    gpuinit.he_normal(LARGEST, seed=1, out=outs[i % len(outs)])

                yield f"he_normal, {blocks} blocks an SM", grid, cupy_elapsed, LARGEST, dtype
    finally:
        cuda.resident_blocks = usual


def measure_torch() -> Iterator[Case]:
    import cupy
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA")
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def elapsed(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with stream:
            hold_back()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 2**26)
    for shape in SHAPES:
        std = math.sqrt(2 / shape[0])
        for dtype in PEER_DTYPES:
            count = arrays_needed(math.prod(shape) * DTYPES[dtype].itemsize, l2)
            outs = [torch.empty(shape, dtype=getattr(torch, dtype), device="cuda") for _ in range(count)]

            def kaiming(i: int, outs: list[Any] = outs) -> None:
                torch.nn.init.kaiming_normal_(outs[i % len(outs)])

            def truncated(i: int, outs: list[Any] = outs, std: float = std) -> None:
                torch.nn.init.trunc_normal_(outs[i % len(outs)], std=std, a=-2 * std, b=2 * std)

            yield "kaiming_normal_", kaiming, elapsed, shape, dtype
            yield "trunc_normal_", truncated, elapsed, shape, dtype
            del outs
            torch.cuda.empty_cache()


def measure_jax() -> Iterator[Case]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if jax.default_backend() != "gpu":
        raise RuntimeError("this JAX has no CUDA")
    key = jax.random.key(1)
    last: list[Any] = [None]
    clock = by_the_clock(lambda: last[0].block_until_ready())  # one stream: all before it are ready too
    for shape in SHAPES:
        for dtype in PEER_DTYPES:
            make = jax.jit(jax.nn.initializers.he_normal(), static_argnums=(1, 2))

            def he_normal(i: int, make: Any = make, shape: Any = shape, dtype: str = dtype) -> None:
                last[0] = make(key, shape, dtype)

            yield "he_normal, jitted", he_normal, clock, shape, dtype


def measure_cupy() -> Iterator[Case]:
    import cupy

    random = cupy.random.default_rng(1)
    for shape in SHAPES:
        outs = cupy_arrays(shape, "float32")

        def normal(i: int, outs: list[Any] = outs) -> None:
            random.standard_normal(dtype=cupy.float32, out=outs[i % len(outs)])

        yield "standard_normal", normal, cupy_elapsed, shape, "float32"


def measure_keras() -> Iterator[Case]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    backend = keras.backend.backend()
    initializer = keras.initializers.HeNormal(seed=1)
    last: list[Any] = [None]
    # One element, when all before it is ready.
    clock = by_the_clock(lambda: keras.ops.convert_to_numpy(last[0][:1, :1]))
    for shape in SHAPES:
        for dtype in PEER_DTYPES:

            def he_normal(i: int, shape: Any = shape, dtype: str = dtype) -> None:
                last[0] = initializer(shape, dtype=dtype)

            yield f"HeNormal on {backend}", he_normal, clock, shape, dtype


OURS = ("device", "gpuinit")  # without which there is nothing to compare
LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "device": measure_device,
    "gpuinit": measure_gpuinit,
    "torch": measure_torch,
    "jax": measure_jax,
    "cupy": measure_cupy,
    "keras": measure_keras,
}


def size(measurement: Measurement) -> int:
    return math.prod(measurement["shape"]) * DTYPES[measurement["dtype"]].itemsize


def ceiling(report: dict[str, Any], measurement: Measurement) -> float | None:
    """The fastest plain write of as many bytes, in GB/s."""
    plain = [m for m in report["measurements"] if m["library"] == "device" and size(m) == size(measurement)]
    return max((m["gigabytes_per_second"] for m in plain), default=None)


def row(measurement: Measurement, of_ceiling: float | None = None) -> str:
    shape = "x".join(map(str, measurement["shape"]))
    call = f"{measurement['library']} {measurement['call']}"
    share = "" if of_ceiling is None else f"{measurement['gigabytes_per_second'] / of_ceiling:6.2f}"
    return (
        f"{call:34.34}{measurement['dtype']:>9}{shape:>12}{measurement['milliseconds']:>10.4f}"
        f"{measurement['gigabytes_per_second']:>9.1f}{share:>6}"
    ).rstrip()


def table(report: dict[str, Any]) -> str:
    """The report for a person, in 80 columns."""
    host = report["host_microseconds"]
    first = report["first_call"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    facts = {
        "device": f"{report['device']}, driver {report['driver']} (CUDA {report['driver_cuda']})",
        "date": f"{report['date']}, commit {report['commit']}",
        "versions": versions,
        "first call": f"{first['cold']:.2f} s, with a cached kernel {first['warm']:.2f} s",
        "host time": ", ".join(f"{name} {taken:.1f} us" for name, taken in host.items()),
        "extra memory": f"{report['extra_bytes']} bytes beyond the result",
    }
    lines = []
    for name, fact in facts.items():
        words = fact.split(" ")
        line = f"{name:14}"
        for word in words:
            if len(line) + len(word) > 79:
                lines.append(line.rstrip())
                line = " " * 14
            line += word + " "
        lines.append(line.rstrip())
    lines += ["", f"{'':34}{'dtype':>9}{'shape':>12}{'ms':>10}{'GB/s':>9}{'share':>6}"]
    for measurement in report["measurements"]:
        lines.append(row(measurement, ceiling(report, measurement)))
    lines += ["", "share: of the faster of fill and memset for the same bytes."]
    lines += [f"not measured: {name} ({reason})"[:80] for name, reason in report["missing"].items()]
    return "\n".join(lines)


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = folder / f"{device}-{report['date'][:10]}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".txt").write_text(table(report) + "\n", encoding="utf-8")
    print("\n" + table(report))
    try:
        chart(report, path.with_suffix(".png"))
    except ImportError:
        print("\nno chart: matplotlib is not installed")


def bars(report: dict[str, Any], dtype: str) -> list[tuple[str, float]]:
    """The chart's bars for a dtype: every call on the largest shape, the fastest first, no sizes of grid."""
    found = [
        (f"{m['library']} {m['call']}", m["gigabytes_per_second"])
        for m in report["measurements"]
        if m["dtype"] == dtype and m["shape"] == list(LARGEST) and "blocks" not in m["call"]
    ]
    return sorted(found, key=lambda bar: -bar[1])


def chart(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(PEER_DTYPES), 1, figsize=(8, 6), layout="constrained")
    for panel, dtype in zip(panels, PEER_DTYPES, strict=True):
        names, rates = zip(*reversed(bars(report, dtype)), strict=True)
        colours = [
            "#888888" if n.startswith("device") else "#76b900" if n.startswith("gpuinit") else "#4477aa"
            for n in names
        ]
        panel.barh(names, rates, color=colours)
        panel.set_xlabel(f"GB/s, {dtype}, {LARGEST[0]} x {LARGEST[1]}")
    figure.suptitle(f"{report['device']}, {report['date'][:10]}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
