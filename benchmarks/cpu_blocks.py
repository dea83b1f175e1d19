"""Where the constants of gpuinit/backends/cpu.py come from: python benchmarks/cpu_blocks.py

Each table tries several values of one constant, in turns, and shows the medians. Run it on an idle machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CHECKOUT = str(Path(__file__).parent.parent)
sys.path.insert(0, CHECKOUT)

from gpuinit import quantile
from gpuinit.backends import cpu
from gpuinit.stream import Run

ROUNDS = 9


def once(engine: str, size: int, threads: int, dtype: str = "float32", **constants: int) -> float:
    """Nanoseconds an element, with these constants of the backend."""
    fill = {"numpy": cpu.fill_with_numpy, "numba": cpu.fill_with_numba}[engine]
    kept = {name: getattr(cpu, name) for name in constants}
    os.environ["GPUINIT_NUM_THREADS"] = str(threads)
    try:
        for name, value in constants.items():
            setattr(cpu, name, value)
        out = np.empty(size, dtype)
        calls = max(1, 2**21 // size)
        start = time.perf_counter()
        for call in range(calls):
            fill(out, [Run(0, size, 1, 0)], (call, 0, quantile.TRUNCATED_NORMAL, (out.dtype.type(1),)))
        return (time.perf_counter() - start) / calls / size * 1e9
    finally:
        for name, value in kept.items():
            setattr(cpu, name, value)


def medians(cases: dict[str, Any]) -> dict[str, float]:
    found: dict[str, list[float]] = {label: [] for label in cases}
    for _ in range(ROUNDS + 1):
        for label, (arguments, constants) in cases.items():
            found[label].append(once(*arguments, **constants))
    return {label: statistics.median(times[1:]) for label, times in found.items()}


def show(title: str, cases: dict[str, Any]) -> None:
    print(f"\n{title}")
    for label, time_taken in medians(cases).items():
        print(f"  {label:>24}{time_taken:10.3f} ns an element", flush=True)


def powers(low: int, high: int) -> dict[str, int]:
    return {f"2**{n}": 2**n for n in range(low, high + 1)}


def seconds_to_load(engine: str) -> float:
    """Seconds of the first small array in a process, after `import gpuinit`."""
    code = (
        "import time, gpuinit; start = time.perf_counter(); "
        "gpuinit.he_normal((64, 64), device='cpu'); print(time.perf_counter() - start)"
    )
    environment = os.environ | {"GPUINIT_CPU_ENGINE": engine, "PYTHONPATH": CHECKOUT}
    command = [sys.executable, "-c", code]
    run = [subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True) for _ in range(6)]
    return statistics.median(float(done.stdout) for done in run[1:])


def show_philox() -> None:
    """Of few blocks, by integers of Python and by arrays."""
    print("\nFEW_BLOCKS, NumPy engine: one call of philox4x32, by integers of Python and by arrays")
    most = quantile.FEW_BLOCKS
    for label, n in powers(0, 8).items():
        block = np.arange(n, dtype=np.uint64)
        scratch = quantile.make_scratch(quantile.make_memory(n), n, np.float32)
        found = []
        for quantile.FEW_BLOCKS in (n, 0):
            times = []
            for _ in range(2000):
                start = time.perf_counter()
                quantile.philox4x32(block, 1, 2, scratch)
                times.append(time.perf_counter() - start)
            found.append(statistics.median(times) * 1e6)
        print(f"  {label:>24}{found[0]:10.1f}{found[1]:10.1f} microseconds", flush=True)
    quantile.FEW_BLOCKS = most


def main() -> None:
    cores = max(2, cpu.thread_limit())
    print(f"{cores} threads where threads are tried")
    show_philox()
    size = 2**23
    show("BLOCKS_ALONE, NumPy engine, one thread", {
        label: (("numpy", size, 1), {"BLOCKS_ALONE": n}) for label, n in powers(10, 17).items()
    })  # fmt: skip
    show("BLOCKS_AMONG_THREADS, NumPy engine", {
        label: (("numpy", size, cores), {"BLOCKS_AMONG_THREADS": n, "SCRATCH_BYTES": 2**30})
        for label, n in powers(11, 18).items()
    })  # fmt: skip
    for engine, constant in (("numpy", ""), ("numba", "COMPILED_")):
        if engine == "numba" and cpu.numba_problem():
            print(f"\nno more: {cpu.numba_problem()}")
            return
        show(f"{constant}ELEMENTS_PER_THREAD, {engine} engine: sizes with one thread and with {cores}", {
            f"{label}, threads: {threads}": ((engine, n, threads), {f"{constant}ELEMENTS_PER_THREAD": 1})
            for label, n in powers(17, 22).items() for threads in (1, cores)
        })  # fmt: skip
    show("COMPILED_ELEMENTS_AT_ONCE, Numba engine", {
        label: (("numba", 2**24, cores), {"COMPILED_ELEMENTS_AT_ONCE": n})
        for label, n in powers(14, 22).items()
    })  # fmt: skip
    load = seconds_to_load("numba") - seconds_to_load("numpy")
    made = medians({"numpy": (("numpy", 2**24, cores), {})})["numpy"]
    print(f"\nELEMENTS_TO_REPAY: loading Numba takes {load:.3f} s, as long as the NumPy engine takes for")
    print(f"  {load / made * 1e9 / 2**20:.0f} * 2**20 elements with {cores} threads")


if __name__ == "__main__":
    main()
