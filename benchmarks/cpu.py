"""gpuinit beside its peers on the CPU: pip install "gpuinit[bench]" && python benchmarks/cpu.py

There are two tables: he_normal, and the normal distribution of mean 0 and standard deviation 1.

Every peer that is installed runs in a process of its own, all on the same cores, one at a time and in turns:
round by round each makes the array, into memory of its own choice, and the medians are compared. An array
that takes less than 0.2 s is made several times in a row, and their median is taken. A peer that would take
longer than --budget seconds runs fewer rounds; the table says so. Before the rounds each peer makes the array
twice, unmeasured, so that it has compiled; and at the start of every round for 0.2 s, so that the cores are
awake, unless one array takes a second.

Peak memory is what the process holds at most during a call beyond what it held before and beyond the array
itself. It is measured in another process, where malloc returns what is freed, and on Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CHECKOUT = Path(__file__).parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"
SHAPES = ((1, 1), (64, 64), (1024, 1024), (4096, 4096), (16384, 4096))
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TRUNCATED_STD = 0.87962566103423976
SECONDS_A_ROUND = 0.2  # an array that takes less is made more than once
SECONDS_TO_WAKE = 0.2  # for so long after a pause arrays were seen to take up to twice their time
LONG = 1.0  # seconds, beside which that is nothing
PAUSE = 0.02  # for the threads of the peer before to go to sleep
QUIET = 0.1  # of the cores, busy with others' work: more is reported

Make = Callable[[tuple[int, ...], str, int], Any]
StdOf = Callable[[tuple[int, ...]], float]


# The peers: each function imports what it needs and returns one that makes an array, done when it returns.


def gpuinit_with(engine: str, function: str, *arguments: float) -> Make:
    os.environ["GPUINIT_CPU_ENGINE"] = engine
    sys.path.insert(0, str(CHECKOUT))
    import gpuinit

    fill = getattr(gpuinit, function)
    return lambda shape, dtype, seed: fill(shape, *arguments, seed=seed, dtype=dtype, device="cpu")


def jax_jitted(function: str, *arguments: float) -> Make:
    import jax

    initializer = getattr(jax.nn.initializers, function)(*arguments)
    make = jax.jit(lambda seed, *rest: initializer(jax.random.key(seed), *rest), static_argnums=(1, 2))
    return lambda shape, dtype, seed: make(seed, shape, dtype).block_until_ready()


def gpuinit_jax() -> Make:
    os.environ["GPUINIT_CPU_ENGINE"] = "numba"
    sys.path.insert(0, str(CHECKOUT))
    import jax

    import gpuinit.jax

    initializer = gpuinit.jax.he_normal()
    return lambda shape, dtype, seed: initializer(jax.random.key(seed), shape, dtype).block_until_ready()


def gpuinit_keras_on_torch() -> Make:
    os.environ["GPUINIT_CPU_ENGINE"] = "numba"
    os.environ["KERAS_BACKEND"] = "torch"
    sys.path.insert(0, str(CHECKOUT))
    import gpuinit.keras

    return lambda shape, dtype, seed: gpuinit.keras.HeNormal(seed)(shape, dtype=dtype)


def keras_on_jax() -> Make:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax  # noqa: F401
    import keras

    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return keras.initializers.HeNormal(seed)(shape, dtype=dtype).block_until_ready()

    return make


def keras_on_torch() -> Make:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import torch  # noqa: F401

    return lambda shape, dtype, seed: keras.initializers.HeNormal(seed)(shape, dtype=dtype)


def torch_trunc_normal(std_of: StdOf) -> Make:
    import torch

    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        torch.manual_seed(seed)
        std = std_of(shape)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std)

    return make


def torch_kaiming_normal() -> Make:
    import torch

    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        torch.manual_seed(seed)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu")

    return make


def torch_normal() -> Make:
    import torch

    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        torch.manual_seed(seed)
        return torch.empty(shape, dtype=getattr(torch, dtype)).normal_()

    return make


def numpy_standard_normal_out() -> Make:
    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        w = np.empty(shape, np.float32)
        np.random.default_rng(seed).standard_normal(dtype=np.float32, out=w)
        return w.astype(DTYPES[dtype], copy=False)

    return make


def numpy_standard_normal() -> Make:
    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        w = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return w.astype(DTYPES[dtype], copy=False)

    return make


def scipy_truncnorm() -> Make:
    from scipy.stats import truncnorm

    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return truncnorm.rvs(-2, 2, size=shape, random_state=seed).astype(DTYPES[dtype])

    return make


def bare_fill() -> Make:
    """What memory itself costs: one value, written by NumPy in one thread."""

    def make(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        bits = np.empty(shape, f"u{DTYPES[dtype].itemsize}")
        bits.fill(seed)
        return bits.view(DTYPES[dtype])

    return make


def parent_std(shape: tuple[int, ...]) -> float:
    """The standard deviation of He's normal before it is truncated; fan_in is the first axis."""
    return math.sqrt(2 / shape[0]) / TRUNCATED_STD


def one(shape: tuple[int, ...]) -> float:
    return 1.0


# Of each table the peers: name, what builds it, whether its distribution is truncated, and the standard
# deviation of the normal that this is, or is cut from.
OURS = "gpuinit, Numba engine"
TABLES: dict[str, dict[str, tuple[Callable[[], Make], bool | None, StdOf]]] = {
    "he_normal": {
        OURS: (partial(gpuinit_with, "numba", "he_normal"), True, parent_std),
        "gpuinit, NumPy engine": (partial(gpuinit_with, "numpy", "he_normal"), True, parent_std),
        "gpuinit.jax he_normal": (gpuinit_jax, True, parent_std),
        "gpuinit.keras on torch": (gpuinit_keras_on_torch, True, parent_std),
        "jax he_normal, jitted": (partial(jax_jitted, "he_normal"), True, parent_std),
        "keras HeNormal on jax": (keras_on_jax, True, parent_std),
        "keras HeNormal on torch": (keras_on_torch, True, parent_std),
        "torch trunc_normal_": (partial(torch_trunc_normal, parent_std), True, parent_std),
        "torch kaiming_normal_": (torch_kaiming_normal, False, lambda shape: math.sqrt(2 / shape[0])),
        "numpy standard_normal": (numpy_standard_normal, False, one),
        "scipy truncnorm.rvs": (scipy_truncnorm, True, one),
        "bare fill": (bare_fill, None, lambda shape: math.inf),
    },
    "normal": {
        OURS: (partial(gpuinit_with, "numba", "normal", 1.0), False, one),
        "gpuinit, NumPy engine": (partial(gpuinit_with, "numpy", "normal", 1.0), False, one),
        "jax normal, jitted": (partial(jax_jitted, "normal", 1.0), False, one),
        "torch normal_": (torch_normal, False, one),
        "torch trunc_normal_": (partial(torch_trunc_normal, one), True, one),
        "numpy standard_normal": (numpy_standard_normal_out, False, one),
    },
}
PACKAGES = ("numpy", "numba", "jax", "keras", "torch", "scipy", "ml_dtypes")


# In the process of a peer


def serve(connection: Any, table: str, name: str) -> None:
    """Answer questions about a peer until told to stop."""
    build, _, std_of = TABLES[table][name]
    try:
        make = build()
    except ImportError as error:
        connection.send(str(error))
        return
    connection.send(None)
    questions: dict[str, Callable[..., Any]] = {"seconds": seconds, "inspect": inspect}
    while (question := connection.recv()) is not None:
        verb, *arguments = question
        connection.send(questions[verb](make, *arguments, std_of=std_of))


def seconds(
    make: Make, shape: tuple[int, ...], dtype: str, seed: int, calls: int, to_wake: float, std_of: Any
) -> float:
    """The seconds that an array takes, as the median of some calls."""
    start = time.perf_counter()
    while time.perf_counter() - start < to_wake:
        make(shape, dtype, seed)
    times = []
    for call in range(calls):
        start = time.perf_counter()
        make(shape, dtype, seed + call)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def inspect(make: Make, shape: tuple[int, ...], dtype: str, std_of: Any) -> dict[str, Any]:
    """Peak memory of one call beyond the array, how far the samples go, and how many values there are."""
    make(shape, dtype, 0)
    gc.collect()
    before = reset_peak()
    array = as_numpy(make(shape, dtype, 1))
    peak = None if before is None else (status("VmHWM") - before - array.nbytes) / 2**20
    farthest = max(abs(float(array.max())), abs(float(array.min())))
    two_sigma = float(np.asarray(2 * std_of(shape)).astype(DTYPES[dtype]))
    bits = array.view(f"u{array.dtype.itemsize}")
    return {
        "peak_extra_mib": peak,
        "beyond_two_sigma": farthest > two_sigma * (1 + 1e-6),
        "farthest_in_sigmas": farthest / std_of(shape),
        "distinct_values": int(np.count_nonzero(np.bincount(bits.reshape(-1))))
        if dtype == "bfloat16"
        else None,
    }


def in_new_process(target: Callable[..., None], *arguments: Any) -> Any:
    """What a function sends through the connection that it is given last, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def peak_beyond(call: Callable[[], Any]) -> int | None:
    """The peak memory of a call beyond what is there, in bytes; None where it cannot be told."""
    gc.collect()
    before = reset_peak()
    call()
    return None if before is None else max(0, status("VmHWM") - before)


def reset_peak() -> int | None:
    """The memory that this process holds, once its peak is set to that; None where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except OSError:
        return None


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{field}:\s+(\d+) kB", lines, re.MULTILINE)[0])


def as_numpy(array: Any) -> Any:
    if hasattr(array, "detach"):  # torch, whose NumPy knows no bfloat16
        import torch

        array = array.detach()
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    return np.asarray(array)


# In the process that measures


class Worker:
    """The process of a peer."""

    def __init__(self, table: str, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, table, name), daemon=True)
        self.process.start()
        other.close()
        self.missing = self.connection.recv()

    def ask(self, *question: Any) -> Any:
        self.connection.send(question)
        return self.connection.recv()

    def stop(self) -> None:
        if self.missing is None:
            self.connection.send(None)
        self.process.join()


def measure(
    table: str, shapes: list[tuple[int, ...]], dtypes: list[str], rounds: int, budget: float, progress: Any
) -> list[dict[str, Any]]:
    workers = {name: Worker(table, name) for name in TABLES[table]}
    for name in [name for name, worker in workers.items() if worker.missing]:
        progress.write(f"left out: {name} ({workers.pop(name).missing})")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc raises it by itself unless it is set
    inspected = {name: Worker(table, name) for name in workers}
    del os.environ["MALLOC_MMAP_THRESHOLD_"]  # not for what is timed in the next table
    rows: list[dict[str, Any]] = []
    progress.reset(len(shapes) * len(dtypes) * len(workers) * (rounds + 2))
    for shape in shapes:
        for dtype in dtypes:
            progress.set_description(f"{table} {shape[0]}x{shape[1]} {dtype}")
            calls, runs, to_wake = {}, {}, {}
            times: dict[str, list[float]] = {name: [] for name in workers}
            for name, worker in workers.items():
                once = worker.ask("seconds", shape, dtype, 0, 1, 0)
                if once < budget:  # more than that is not compiling
                    once = worker.ask("seconds", shape, dtype, 1, 1, 0)
                calls[name] = max(1, math.ceil(SECONDS_A_ROUND / once))
                runs[name] = max(1, min(rounds, int(budget / once)))
                to_wake[name] = SECONDS_TO_WAKE if once < LONG else 0
                progress.update()
            busy = busy_share()
            for turn in range(rounds):
                for name, worker in workers.items():
                    if turn < runs[name]:
                        time.sleep(PAUSE)
                        question = ("seconds", shape, dtype, turn, calls[name], to_wake[name])
                        times[name].append(worker.ask(*question))
                    progress.update()
            for name in workers:
                row: dict[str, Any] = {"table": table, "peer": name, "shape": shape, "dtype": dtype}
                row |= {"truncated": TABLES[table][name][1], "busy_before": busy}
                row |= {"seconds": statistics.median(times[name]), "all_seconds": times[name]}
                rows.append(row | inspected[name].ask("inspect", shape, dtype))
                progress.update()
    for worker in (*workers.values(), *inspected.values()):
        worker.stop()
    for row in rows:
        group = [r for r in rows if (r["shape"], r["dtype"]) == (row["shape"], row["dtype"])]
        ours = next((r for r in group if r["peer"] == OURS), group[0])
        row["ratio"] = row["seconds"] / ours["seconds"]
        row["samples_per_second"] = math.prod(row["shape"]) / row["seconds"]
    return rows


def busy_share(wait: float = 0.3) -> float | None:
    """The share of the machine's cores that is busy while nothing is asked of the peers."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    before = np.array(stat.read_text().split("\n", 1)[0].split()[1:9], float)
    time.sleep(wait)
    passed = np.array(stat.read_text().split("\n", 1)[0].split()[1:9], float) - before
    return float(1 - (passed[3] + passed[4]) / max(passed.sum(), 1))  # idle and waiting for a disk


FIRST_CALL = """
import time
start = time.perf_counter()
import gpuinit
imported = time.perf_counter()
from gpuinit.backends import cpu
gpuinit.he_normal((64, 64), seed=0, dtype={dtype!r}, device="cpu")
print(imported - start, time.perf_counter() - imported)
"""


def first_calls(repeats: int = 5) -> dict[str, float]:
    """Milliseconds of `import gpuinit` and of a process's first he_normal((64, 64)), medians."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for repeat in range(repeats):
            for engine, dtype, label in (
                ("numpy", "float32", "first call, NumPy engine"),
                ("numba", "float32", "first call, Numba engine, float32"),
                ("numba", "bfloat16", "first call, Numba engine, bfloat16"),
            ):
                kinds = ["compiling", "from the cache"] if engine == "numba" else [""]
                for kind in kinds:
                    folder = Path(cache) / f"{dtype}-{repeat}"
                    environment = os.environ | {"GPUINIT_CPU_ENGINE": engine, "NUMBA_CACHE_DIR": str(folder)}
                    environment["PYTHONPATH"] = str(CHECKOUT)
                    command = [sys.executable, "-c", FIRST_CALL.format(dtype=dtype)]
                    run = subprocess.run(
                        command, env=environment, capture_output=True, text=True, check=False
                    )
                    if run.returncode:
                        continue  # no Numba
                    imported, first = map(float, run.stdout.split())
                    found.setdefault("import gpuinit", []).append(imported * 1e3)
                    found.setdefault(f"{label}, {kind}".rstrip(", "), []).append(first * 1e3)
    return {label: statistics.median(times) for label, times in found.items()}


def describe_machine() -> dict[str, Any]:
    names = re.findall(r"^model name\s*: (.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def table(report: dict[str, Any]) -> str:
    """The report for a person, in 80 columns."""
    machine = report["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    groups = dict.fromkeys((row["table"], row["shape"], row["dtype"]) for row in report["rows"])
    before = None
    for name, shape, dtype in groups:
        rows = [r for r in report["rows"] if (r["table"], r["shape"], r["dtype"]) == (name, shape, dtype)]
        title = f"{shape[0]}x{shape[1]} {dtype}"
        if name != before:
            lines += ["", f"[{name}]"]
            before = name
        lines += ["", f"{title:24}{'ms':>10}{'G/s':>7}{'ratio':>8}{'+MiB':>8}{'cut':>5}{'>2sd':>6}"]
        lines[-1] += f"{'values':>9}" if dtype == "bfloat16" else ""
        for row in rows:
            mark = "*" if len(row["all_seconds"]) < report["rounds"] else " "
            lines.append(
                f"{row['peer']:24}{row['seconds'] * 1e3:10.3f}{row['samples_per_second'] / 1e9:7.3f}"
                f"{row['ratio']:8.2f}{number(row['peak_extra_mib']):>8}"
                f"{yes(row['truncated']):>5}{yes(row['beyond_two_sigma'], row['truncated']):>6}"
                + (f"{row['distinct_values']:9}" if dtype == "bfloat16" else "")
                + mark
            )
            lines[-1] = lines[-1].rstrip()
        if rows[0]["busy_before"] is not None and rows[0]["busy_before"] > QUIET:
            lines.append(f"the cores were {rows[0]['busy_before']:.0%} busy with other work: run it again")
    lines += ["", f"medians of {report['rounds']} rounds (*fewer: a slow peer); ratio: time over ours"]
    lines += ["+MiB: peak memory beyond the array; cut: truncated at two standard deviations"]
    lines += [">2sd: a sample lies beyond them; values: how many distinct ones"]
    if report["first_calls_ms"]:
        lines += ["", "once a process (ms)"]
        lines += [f"{label:52}{time:10.1f}" for label, time in report["first_calls_ms"].items()]
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{max(value, 0):.1f}"


def yes(value: bool | None, known: bool | None = True) -> str:
    return "-" if value is None or known is None else "yes" if value else "no"


def chart(report: dict[str, Any], shape: tuple[int, ...], path: Path) -> None:
    """Bars of the time that every peer of the first table takes for one shape."""
    import matplotlib.pyplot as plt

    machine = report["machine"]
    figure, axes = plt.subplots(1, len(report["dtypes"]), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, dtype in zip(np.atleast_1d(axes), report["dtypes"], strict=True):
        shown = report["rows"][0]["table"], shape, dtype
        rows = [r for r in report["rows"] if (r["table"], r["shape"], r["dtype"]) == shown][::-1]
        names = [
            row["peer"] + ("" if row["truncated"] in (True, None) else " (not truncated)") for row in rows
        ]
        times = [row["seconds"] * 1e3 for row in rows]
        colors = ["#d9480f" if row["peer"].startswith("gpuinit") else "#868e96" for row in rows]
        bars = axis.barh(names, times, color=colors)
        axis.bar_label(bars, [f"{t:,.{0 if t >= 100 else 1}f} ms" for t in times], padding=3)
        axis.set_xscale("log")
        axis.set_xlim(right=max(times) * 8)
        axis.set_title(f"{shape[0]} x {shape[1]} {dtype}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("milliseconds, logarithmic")
    figure.suptitle(f"One array of weights: {machine['cpu']}, {machine['cores']} cores, {machine['date']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="gpuinit beside its peers on the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=10, help="seconds for one peer, shape and dtype")
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="MxN")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file and chart")
    options = parser.parse_args()
    from tqdm import tqdm

    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    machine = describe_machine()
    rows = []
    for name in options.tables:
        with tqdm(total=1) as progress:
            rows += measure(name, shapes, options.dtypes, options.rounds, options.budget, progress)
    report = {"machine": machine, "rounds": options.rounds, "dtypes": options.dtypes}
    report |= {"rows": rows, "first_calls_ms": first_calls()}
    print(table(report))
    slug = re.sub(r"\W+", "-", f"{machine['cpu']} {machine['cores']} cores").strip("-").lower()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"cpu-{slug}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    chart(report, (4096, 4096) if (4096, 4096) in shapes else shapes[-1], path.with_suffix(".png"))
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
