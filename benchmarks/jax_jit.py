"""gpuinit.jax under jit on the CPU, beside JAX's own and beside itself eagerly: python benchmarks/jax_jit.py

One array of 4096 x 4096: time in turns, medians, and the peak of memory beyond the array. Then a program of
300 weights of 64 x 64, each with a key of its own: the time to trace and lower it, to compile it, and to run
it. All is in one process, but for memory, which is measured in one more for each way.

It needs gpuinit[jax] and gpuinit[cpu]. --results FOLDER keeps what was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cpu
import numpy as np

sys.path.insert(0, str(cpu.CHECKOUT))

SHAPE = (4096, 4096)
SMALL, COUNT = (64, 64), 300
ENGINES = ("numba", "numpy")
ROUNDS = 15


def ways() -> dict[str, Callable[[Any, tuple[int, ...]], Any]]:
    """Functions of a key and a shape."""
    import jax

    import gpuinit.jax

    return {
        "gpuinit, jit": gpuinit.jax.he_normal(),
        "gpuinit, eager": gpuinit.jax.he_normal(),
        "JAX, jit": jax.nn.initializers.he_normal(),
    }


def maker(way: str) -> Callable[[Any], Any]:
    """A function of a key that waits for the large array."""
    import jax

    initializer = ways()[way]
    run = jax.jit(initializer, static_argnums=1) if "jit" in way else initializer
    return lambda key: run(key, SHAPE).block_until_ready()


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each, in turns. The first two of each are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 2):
        for name, call in calls.items():
            gc.collect()
            start = time.perf_counter()
            made = call()
            taken[name].append(time.perf_counter() - start)
            del made
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


def run(compiled: Any, words: Any) -> Any:
    import jax

    return jax.block_until_ready(compiled(words))


def with_engine(engine: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def set_and_call() -> Any:
        os.environ["GPUINIT_CPU_ENGINE"] = engine
        return call()

    return set_and_call


def large() -> dict[str, float]:
    import jax

    key = jax.random.key(7)
    calls = {}
    for way in ways():
        make = maker(way)
        for engine in ENGINES if way.startswith("gpuinit") else ("",):
            name = f"{way}, {engine}".strip(", ")
            calls[name] = with_engine(engine or "numba", partial(make, key))
    return medians(calls)


def memory(way: str, engine: str, connection: Any) -> None:
    import jax

    os.environ["GPUINIT_CPU_ENGINE"] = engine
    make, key = maker(way), jax.random.key(7)
    make(key)
    kept: list[Any] = []
    peak = cpu.peak_beyond(lambda: kept.append(make(key)))
    connection.send(None if peak is None else peak - kept[0].nbytes)


def small() -> dict[str, dict[str, float]]:
    """Of the many small weights: seconds to lower, to compile and to run."""
    import jax

    words = jax.numpy.arange(2 * COUNT, dtype=np.uint32).reshape(COUNT, 2)
    found: dict[str, dict[str, float]] = {}
    calls = {}
    for way, initializer in ways().items():
        if "jit" not in way:
            continue

        def program(words: Any, initializer: Any = initializer) -> Any:
            return [initializer(jax.random.wrap_key_data(words[i]), SMALL) for i in range(COUNT)]

        start = time.perf_counter()
        lowered = jax.jit(program).lower(words)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        for engine in ENGINES if way.startswith("gpuinit") else ("",):
            name = f"{way}, {engine}".strip(", ")
            found[name] = {"lower": middle - start, "compile": end - middle}
            calls[name] = with_engine(engine or "numba", partial(run, compiled, words))
    for name, taken in medians(calls).items():
        found[name]["run"] = taken
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, help="a folder for jax-jit.json")
    folder = parser.parse_args().results
    report: dict[str, Any] = {"machine": cpu.describe_machine(), "large": large(), "beyond": {}}
    print(f"one array of {SHAPE[0]} x {SHAPE[1]}, float32\n{'':24}{'ms':>10}{'MiB beyond it':>16}")
    for name, taken in report["large"].items():
        way, _, engine = name.rpartition(", ") if name.startswith("gpuinit") else (name, "", "numba")
        beyond = cpu.in_new_process(memory, way, engine)
        report["beyond"][name] = beyond
        print(f"{name:24}{1e3 * taken:10.1f}" + (f"{beyond / 2**20:16.1f}" if beyond is not None else ""))
    report["small"] = small()
    print(f"\n{COUNT} arrays of {SMALL[0]} x {SMALL[1]} in one program")
    print(f"{'':24}{'lower, s':>10}{'compile, s':>12}{'run, ms':>10}")
    for name, row in report["small"].items():
        print(f"{name:24}{row['lower']:10.2f}{row['compile']:12.2f}{1e3 * row['run']:10.1f}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jax-jit.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
