"""The host time of one call beyond what it cannot do without, measured without a GPU:

python benchmarks/host_overhead.py

The CUDA path runs against the stand-in CuPy of the tests, whose launches are made to do nothing here. Beside
it the same stand-in's `empty` and a bare launch with ready arguments: the difference is the time of this
package. Each row is the median of many rounds, in which both are taken in turns.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a plain checkout

import cuda_sim
import host_build

import gpuinit
from gpuinit.backends import cuda
from gpuinit.distributions import find_sampling
from gpuinit.initializers import DTYPES, find_draw
from gpuinit.quantile import NORMAL

CALLS = 200  # in one round
ROUNDS = 40

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "float32": (gpuinit.he_normal, {}),
    "bfloat16": (gpuinit.he_normal, {"dtype": "bfloat16"}),
    "float64": (gpuinit.he_normal, {"dtype": "float64"}),
    "float32, named": (gpuinit.he_normal, {"name": "layer.0.weight"}),
    "float32, a shard": (gpuinit.he_normal, {"index": (slice(0, 64), slice(64, 128))}),
    "float32, normal": (gpuinit.normal, {}),
    "float32, other bounds": (partial(gpuinit.truncated_normal, lower=-3, upper=3), {}),
}


def seconds(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS


def bare(function: Callable[..., Any], dtype: str) -> Callable[[], Any]:
    """An allocation and a launch of the same kernel, and nothing else."""
    numpy_dtype = DTYPES[dtype]
    distribution, numbers = find_sampling(find_draw(function, (64, 64)), numpy_dtype)
    kernel = cuda.kernel(dtype, distribution >= NORMAL)
    scalars = (*map(np.uint64, (0, 4096, 1, 0, 1, 0)), np.uint32(distribution), *numbers)

    def call() -> None:
        out = cuda_sim.empty((64, 64), numpy_dtype)
        kernel((4, 1), (256, 1), (out, *scalars))

    return call


def measure() -> list[tuple[str, float, float]]:
    """Case, and the medians of the whole call and of the bare one, in seconds."""
    rows = []
    for case, (function, keywords) in CASES.items():
        shape = (64, 128) if "index" in keywords else (64, 64)
        whole = partial(function, shape, seed=1, device="cuda", **keywords)
        least = bare(function, keywords.get("dtype", "float32"))
        seconds(whole), seconds(least)
        times = [(seconds(whole), seconds(least)) for _ in range(ROUNDS)]
        rows.append((case, *(statistics.median(column) for column in zip(*times, strict=True))))
    return rows


def table(rows: list[tuple[str, float, float]]) -> str:
    lines = [f"{'microseconds a call, 64x64':30}{'whole':>10}{'bare':>10}{'beyond':>10}"]
    lines += [f"{c:30}{w * 1e6:10.2f}{b * 1e6:10.2f}{(w - b) * 1e6:10.2f}" for c, w, b in rows]
    return "\n".join(lines)


def main() -> None:
    sys.modules["cupy"] = cuda_sim
    for function in (gpuinit.he_normal, gpuinit.normal):  # both kernels are compiled
        function((64, 64), device="cuda", seed=1)
    host_build.launch = lambda *arguments: None
    cuda_sim.TWICE_UP_TO = -1
    print(f"Python {platform.python_version()}, {platform.machine()}, {time.strftime('%Y-%m-%d')}\n")
    print(table(measure()))


if __name__ == "__main__":
    main()
