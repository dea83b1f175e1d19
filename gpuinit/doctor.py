"""`gpuinit doctor`: what a user or a bug report needs, and the golden digests on every backend here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gpuinit
from gpuinit import devices
from gpuinit.backends import cpu, cuda
from gpuinit.initializers import DTYPES
from gpuinit.limits import cpu_quota
from gpuinit.loading import place_of
from gpuinit.messages import ERROR, Parser, say
from gpuinit.stream import STREAM_FORMAT

SHAPE = (1000, 1001)

UNIT = {"stddev": 1.0}
CUT = {"stddev": 1.0, "lower": -3.0, "upper": 3.0}

# Function, dtype, SHA-256 of the little-endian bytes with seed 0, and further arguments. tests/test_doctor.py
# holds them equal to tests/golden.json.
GOLDEN: tuple[tuple[str, str, str, dict[str, float]], ...] = (
    ("he_normal", "float32", "0fd6a45f0f8216f2018159ab6836f4cc0ca9fe3b6aa3fc700f888ec680c986bd", {}),
    ("he_uniform", "float32", "55ba179f94ad68b120c027894f999c183ba5b14a37b0420a5600ee4c36f1eb74", {}),
    ("he_normal", "float16", "09ab6a4bc2a3b1c6f7946a6cf923c5eff4db53747cb11aa46e8bb39701354078", {}),
    ("he_normal", "bfloat16", "feba4a19339be56f945dfafc9d01bad448623ef6e44bc327569fc68838a715ea", {}),
    ("he_normal", "float64", "188574d4035886a4183b813dac333e7bfadfc5593c1a550a152c5160915d8d91", {}),
    ("normal", "float32", "b8c2fe816cee8d7e38a5df697ba4b7b89ce890b8ec45463212ff4f5769d228d0", UNIT),
    ("normal", "bfloat16", "4958e5455f356280caf9ebf7d7d7aabc9ba3320d708359329934ffb99555fac6", UNIT),
    ("normal", "float64", "a8388f2c780cd2dc4cbb466c3dc6e12f05c354cfa992c080c465812d790c8bad", UNIT),
    ("truncated_normal", "float32", "53bb7f9acec0ba511d351551337e829754abb9b0cef3e5d5fe8e7ca896a66bfb", CUT),
)

REPORT = "Please report it with `gpuinit doctor --json`"

OK, FAILED, ABSENT = "ok", "failed", "absent"  # absent: not on this machine, and need not be
MARKS = {OK: "✓", FAILED: "✗", ABSENT: "-"}
ASCII_MARKS = {OK: "ok", FAILED: "X", ABSENT: "-"}


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="gpuinit doctor",
        description="Describe this installation, and check the bytes that every backend here makes.",
        epilog="Exit status 2 if something that should work does not; no CUDA is no fault.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    report = examine()
    text = (
        json.dumps(report, indent=2)
        if options.json
        else table(report, marks(getattr(sys.stdout, "encoding", None)))
    )
    say(*text.split("\n"))
    if not report["healthy"]:
        sys.exit(ERROR)


def marks(encoding: str | None) -> dict[str, str]:
    try:
        "".join(MARKS.values()).encode(encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII_MARKS
    return MARKS


def examine() -> dict[str, Any]:
    wrong = wrong_settings()
    checks = [result("settings", FAILED, f"{error}. Correct or unset it") for error in wrong.values()]
    with environment(**dict.fromkeys(wrong)):
        checks += [check_cpu("numpy", None), check_numba(), *check_cuda()]
    return {
        "healthy": all(check["status"] != FAILED for check in checks),
        "facts": facts(),
        "checks": checks,
    }


def facts() -> dict[str, str]:
    """What is installed and where, in words."""
    found = {
        "gpuinit": f"{gpuinit.__version__}, stream format {STREAM_FORMAT}, {Path(gpuinit.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "NumPy": f"{np.__version__}, ml_dtypes {version('ml_dtypes')}, Numba {version('numba')}",
        "CPU": describe_threads(),
        **cupy_facts(),
    }
    settings = {name: value for name, value in os.environ.items() if name.startswith("GPUINIT_")}
    found["settings"] = ", ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "none"
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_threads() -> str:
    try:
        threads = cpu.thread_limit()
    except ValueError as error:
        return str(error)
    cores, usable, quota = os.cpu_count(), len(cpu.usable_cores()), cpu_quota()
    words = [platform.machine(), f"{cores} cores"]
    if usable != cores:
        words.append(f"{usable} of them for this process")
    if quota is not None:
        words.append(f"a quota of {quota:g} cores' time")
    return ", ".join([*words, f"{threads} threads"])


def cupy_facts() -> dict[str, str]:
    """CuPy, the driver, CUDA's parts and the devices, as far as they answer."""
    try:
        import cupy
    except Exception as error:
        absent = isinstance(error, ImportError) and error.name == "cupy"
        return {"CuPy": "not installed" if absent else f"cannot be imported ({devices.describe(error)})"}
    packages = importlib.metadata.packages_distributions().get("cupy", ["no package"])
    if not devices.is_cupy(cupy):
        return {"CuPy": f"not what `import cupy` finds: {place_of(cupy)}"}
    folder, writable = kernel_cache()
    found = {
        "CuPy": ask(lambda: f"{cupy.__version__} from {', '.join(packages)}, {Path(cupy.__file__).parent}"),
        "driver": ask(lambda: describe_driver(cupy.cuda.runtime.driverGetVersion())),
        "runtime": ask(lambda: f"CUDA {dotted(cupy.cuda.runtime.runtimeGetVersion())}"),
        "compiler": ask(lambda: describe_compiler(cupy)),
        "headers": ask(lambda: str(cupy.cuda.get_cuda_path() or "CuPy's own and those of the pip packages")),
        "cache": f"{folder}, {'can be written' if writable else 'cannot be written: set CUPY_CACHE_DIR'}",
    }
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception:
        count = 0
    for number in range(count):
        found[f"cuda:{number}"] = ask(partial(describe_gpu, cupy, number))
    return found


def ask(question: Callable[[], str]) -> str:
    """The answer, or why there is none: a broken installation must not keep the rest from being told."""
    try:
        return question()
    except Exception as error:
        return f"unknown ({devices.describe(error)})"


def describe_driver(number: int) -> str:
    return f"supports CUDA {dotted(number)}" if number else "none"


def dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def describe_compiler(cupy: Any) -> str:
    major, minor = cupy.cuda.nvrtc.getVersion()
    return f"NVRTC {major}.{minor}, {loaded_library('libnvrtc.') or 'place unknown'}"


def loaded_library(name: str) -> str | None:
    """Where this process has loaded a library from; only Linux tells."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    return next((line.split(maxsplit=5)[5] for line in lines if f"/{name}" in line), None)


def describe_gpu(cupy: Any, number: int) -> str:
    found = cupy.cuda.runtime.getDeviceProperties(number)
    capability = f"compute capability {found['major']}.{found['minor']}"
    return f"{found['name'].decode()}, {capability}, {found['totalGlobalMem'] / 2**30:.1f} GiB"


def kernel_cache() -> tuple[Path, bool]:
    """Where CuPy keeps compiled kernels, and whether it can."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            return folder, True
    except OSError:
        return folder, False


def wrong_settings() -> dict[str, str]:
    """The variables of the environment for which no array is made on the CPU, and why."""
    used = {
        "GPUINIT_CPU_ENGINE": lambda: cpu.engine(1, DTYPES["float32"]),
        "GPUINIT_NUM_THREADS": cpu.thread_limit,
    }
    wrong = {}
    for name, use in used.items():
        try:
            use()
        except (ValueError, ImportError) as error:
            wrong[name] = str(error)
    return wrong


def check_numba() -> dict[str, str]:
    """Loaded only where a fill would load it, for which a limit of address space may be too low."""
    problem = cpu.room_problem(1)
    return (
        check_cpu("numba", cpu.numba_problem()) if problem is None else result("cpu, numba", ABSENT, problem)
    )


def check_cpu(engine: str, problem: str | None) -> dict[str, str]:
    if problem is not None:
        status = ABSENT if version(engine) == "not installed" else FAILED
        return result(f"cpu, {engine}", status, problem)
    with environment(GPUINIT_CPU_ENGINE=engine):
        return check_bytes(f"cpu, {engine}", "cpu")


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """With these variables of the environment, unset where None."""
    before = {name: os.environ.get(name) for name in variables}
    put(variables)
    try:
        yield
    finally:
        put(before)


def put(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_cuda() -> list[dict[str, str]]:
    """The kernel compiled and its bytes, for every device; or why not, and where only a device is missing,
    the kernel compiled all the same.
    """
    try:
        problem = devices.cuda_problem()
    except MemoryError as error:
        problem = f"{error}. Free memory on the device"
    if problem is None:
        return [check_bytes(f"cuda:{i}", f"cuda:{i}") for i in range(devices.cuda_device_count())]
    if not cuda_need_not_work():
        return [result("cuda", FAILED, problem)]
    return [result("cuda", ABSENT, problem), *([check_compiler()] if has_cupy() else [])]


def check_compiler() -> dict[str, str]:
    """Compile the kernel, which needs no device: whoever installed CuPy has what this takes, too."""
    architecture = cuda.OFFLINE_ARCHITECTURE
    start = time.perf_counter()
    try:
        for shifted in (False, True):
            cuda.compile_offline(cuda.source(shifted), cuda.compiler_options(architecture))
    except Exception as error:
        return result("cuda, nvrtc", FAILED, devices.explain_kernel_error(error))
    seconds = time.perf_counter() - start
    return result("cuda, nvrtc", OK, f"both kernels compile for sm_{architecture}, {seconds:.1f} s")


def has_cupy() -> bool:
    try:
        import cupy
    except Exception:
        return False
    return devices.is_cupy(cupy)


def cuda_need_not_work() -> bool:
    """Whether CUDA is missing rather than broken: CuPy is not installed, or there is no driver or device."""
    try:
        import cupy
    except ImportError as error:
        return error.name == "cupy"
    except Exception:
        return False
    if not devices.is_cupy(cupy):  # a folder of the name, or a module that hides the CuPy that is installed
        return "cupy" not in importlib.metadata.packages_distributions()
    try:
        return int(cupy.cuda.runtime.getDeviceCount()) == 0
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status == devices.INSUFFICIENT_DRIVER:
            return int(cupy.cuda.runtime.driverGetVersion()) == 0
        return bool(error.status == devices.NO_DEVICE)
    except Exception:
        return False


def check_bytes(backend: str, device: str) -> dict[str, str]:
    """Make the golden arrays on a backend and compare their digests."""
    try:
        for function, dtype, digest, arguments in GOLDEN:
            weights = getattr(gpuinit, function)(SHAPE, **arguments, seed=0, dtype=dtype, device=device)
            host = weights if isinstance(weights, np.ndarray) else weights.get()
            little = host.astype(host.dtype.newbyteorder("<"), copy=False)
            if hashlib.sha256(little.tobytes()).hexdigest() != digest:
                return result(backend, FAILED, f"{function} makes wrong bytes in {dtype}. {REPORT}")
    except Exception as error:
        return result(backend, FAILED, f"{devices.describe(error)}. {REPORT}")
    compiled = "the kernel compiles, " if device != "cpu" else ""
    return result(backend, OK, f"{compiled}{len(GOLDEN)} golden digests equal")


def result(backend: str, status: str, detail: str) -> dict[str, str]:
    return {"backend": backend, "status": status, "detail": detail}


def table(report: dict[str, Any], signs: dict[str, str]) -> str:
    """The report for a person, in 80 columns."""
    lines = [row(f"  {name:<10}", fact) for name, fact in report["facts"].items()]
    lines.append("")
    for check in report["checks"]:
        lines.append(row(f"  {signs[check['status']]:<3}{check['backend']:<13}", check["detail"]))
    failed = sum(check["status"] == FAILED for check in report["checks"])
    lines += ["", f"  {failed} failed: see {signs[FAILED]} above" if failed else "  healthy"]
    return "\n".join(lines)


def row(start: str, text: str) -> str:
    """One row, continued under its text where it is long; a path that is longer still is cut in two."""
    indent = " " * len(start)
    return textwrap.fill(text, 80, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
