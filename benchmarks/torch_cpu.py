"""gpuinit.torch beside torch's own initialisers on the CPU: python benchmarks/torch_cpu.py

Needs the extras `cpu` and `torch`, and a checkout that is installed.
Two cases: a module of GPT-2's size and shapes, every parameter, and one embedding. The memory is there
before, and was written. Time: the contenders take turns in one process, and the medians are compared. Peak
memory: what a process of its own holds at most during one call, beyond what it held before; on Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu
import torch
from torch import nn

import gpuinit
import gpuinit.torch as gt
from gpuinit.distributions import TRUNCATED_STD

RESULTS = Path(__file__).parent / "results"
STD = 0.02
PARENT_STD = STD / TRUNCATED_STD


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Gpt2(nn.Module):  # type: ignore[misc]
    """The parameters of GPT-2 small, 124 million; the head is tied to wte."""

    def __init__(self, layers: int = 12, width: int = 768, tokens: int = 50257) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(tokens, width), nn.Embedding(1024, width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)


def written(module: nn.Module) -> nn.Module:
    """The module, built on meta, in memory that exists."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def gpt2(small: bool) -> nn.Module:
    with torch.device("meta"):
        return Gpt2(1, 64, 1000) if small else Gpt2()


def embedding(small: bool) -> nn.Module:
    return nn.Embedding(4_000 if small else 4_000_000, 64, device="meta")


def initialize_with_numba(module: nn.Module) -> None:
    os.environ["GPUINIT_CPU_ENGINE"] = "numba"
    gt.initialize_(module, seed=0)


def initialize_with_numpy(module: nn.Module) -> None:
    os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
    gt.initialize_(module, seed=0)


def reset_parameters(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def normal(module: nn.Module) -> None:
    each_weight(module, lambda weight: nn.init.normal_(weight, 0, STD))


def trunc_normal(module: nn.Module) -> None:
    each_weight(
        module, lambda weight: nn.init.trunc_normal_(weight, 0, PARENT_STD, -2 * PARENT_STD, 2 * PARENT_STD)
    )


def each_weight(module: nn.Module, fill: Callable[[torch.Tensor], Any]) -> None:
    """Weights by a function, norms 1, biases 0: as GPT-2 is usually initialised."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(part, nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                fill(parameter)


CASES = {"GPT-2, 124 M parameters": gpt2, "embedding, 4 M x 64": embedding}
OURS = "initialize_, Numba engine"
CONTENDERS = {
    OURS: initialize_with_numba,
    "initialize_, NumPy engine": initialize_with_numpy,
    "torch reset_parameters": reset_parameters,
    "torch normal_": normal,
    "torch trunc_normal_, 2 std": trunc_normal,
}


def seconds(case: str, rounds: int, small: bool) -> dict[str, list[float]]:
    module = written(CASES[case](small))
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        for name, contender in CONTENDERS.items():
            start = time.perf_counter()
            contender(module)
            if number:  # the first round is not measured
                found[name].append(time.perf_counter() - start)
    return found


def peak(case: str, name: str, small: bool, connection: Any) -> None:
    """Send the peak memory of one call beyond the module."""
    CONTENDERS[name](written(CASES["GPT-2, 124 M parameters"](True)))  # imports, compilers, thread pools
    module = written(CASES[case](small))
    connection.send(cpu.peak_beyond(lambda: CONTENDERS[name](module)))


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['cpu']}, {report['threads']} threads, {report['date']}"]
    lines += [f"torch {report['torch']}, medians of {report['rounds']} rounds in turns", ""]
    for case, rows in report["cases"].items():
        lines += [f"{case:<37}{'time':>12}{'to the first':>13}{'extra memory':>18}", "-" * 80]
        for name, row in rows.items():
            extra = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f} MiB"
            lines.append(f"{name:<37}{1e3 * row['seconds']:>9,.1f} ms{row['ratio']:>12.2f}x{extra:>18}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory beside torch's initialisers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny modules, nothing written: does it run?")
    options = parser.parse_args()

    report: dict[str, Any] = {
        "cpu": cpu.describe_machine()["cpu"],
        "threads": torch.get_num_threads(),
        "gpuinit_num_threads": os.environ.get("GPUINIT_NUM_THREADS"),
        "date": datetime.date.today().isoformat(),
        "gpuinit": gpuinit.__version__,
        "torch": torch.__version__,
        "numba": importlib.metadata.version("numba"),
        "rounds": options.rounds,
        "cases": {},
    }
    for case in CASES:
        times = seconds(case, options.rounds, options.small)
        ours = statistics.median(times[OURS])
        report["cases"][case] = {
            name: {
                "seconds": statistics.median(times[name]),
                "ratio": statistics.median(times[name]) / ours,
                "all_seconds": times[name],
                "peak_bytes": cpu.in_new_process(peak, case, name, options.small),
            }
            for name in CONTENDERS
        }
    print(table(report))
    if not options.small:
        slug = re.sub(r"\W+", "-", f"{report['cpu']} {os.cpu_count()} cores").strip("-").lower()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"torch-cpu-{slug}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
