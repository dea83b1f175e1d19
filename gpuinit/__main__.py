"""The `gpuinit` command, also `python -m gpuinit`. Without a command it fills one array and shows it:

gpuinit
gpuinit sample 1024 1024 --dtype bfloat16 --device cpu --seed 7 --json
gpuinit doctor

These two run without the extra `cli`; gpuinit/cli.py has the other commands.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import gpuinit
from gpuinit import devices
from gpuinit.backends import cpu
from gpuinit.distributions import find_sampling
from gpuinit.initializers import DTYPES, find_draw
from gpuinit.messages import COMMANDS, ERROR, Parser, explained, say, stop

# Fourth standardised moment of the normal truncated at +-2 (tests/test_distribution.py derives it).
EXPECTED_KURTOSIS = 2.3655367172

COMPLETE = "_GPUINIT_COMPLETE"  # by which a shell asks click for completions

HELP = (
    "Initial weights of neural networks: one seed, the same bits everywhere.",
    "",
    "gpuinit [COMMAND] [ARGUMENTS]",
    "",
    *(f"  {name:<13}{summary}" for name, summary in COMMANDS.items()),
    "",
    "Without a command: sample. gpuinit COMMAND -h tells of one, gpuinit -V the version.",
    'All but sample and doctor need an extra: pip install "gpuinit[cli]", or "gpuinit[plot]".',
    "",
    "Exit status: 0; 1 where verify finds a difference, and nowhere else; 2 after an error;",
    "128 + its number after a signal; 141 if the reader of the output stops, as `head -1`.",
)

ELEMENTS_AT_ONCE = 2**20  # of the array, when it is read for its statistics


def main(arguments: Sequence[str] | None = None) -> None:
    with explained():
        run(list(sys.argv[1:] if arguments is None else arguments))


def run(given: list[str]) -> None:
    first = given[0] if given else "sample"
    if os.environ.get(COMPLETE):
        run_cli(given)
    elif first == "sample":
        sample_main(given[1:])
    elif first == "doctor":
        from gpuinit import doctor

        doctor.main(given[1:])
    elif first in ("-h", "--help"):
        say(*HELP)
        sys.exit(0)
    elif first in ("-V", "--version"):
        say(f"gpuinit, version {gpuinit.__version__}")
        sys.exit(0)
    elif first in COMMANDS:
        run_cli(given)
    elif re.match(r"[-+\d]", first):  # the options or the shape of the default command
        sample_main(given)
    else:
        raise ValueError(f"the command must be {', '.join(COMMANDS)}, or the shape of sample, got {first!r}")


def run_cli(given: list[str]) -> None:
    """The commands of gpuinit/cli.py, where the extra is installed."""
    try:
        from gpuinit import cli
    except ImportError as error:
        if error.name not in ("click", "rich"):
            raise
        what = f"`{given[0]}`" if given else "completion"
        stop(
            f"{what} needs click and rich, and {error.name} is not installed. "
            'To install them: pip install "gpuinit[cli]"',
            ERROR,
        )
    asked = os.environ.get(COMPLETE)
    if asked:
        cli.complete(asked, COMPLETE)
    cli.run(given)


def sample_main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="gpuinit sample",
        description="Fill one array with He-normal weights and compare it with theory.",
        epilog="The other commands: gpuinit -h.",
    )
    parser.add_argument("sizes", type=int, nargs="*", metavar="SHAPE", help="by default 4096 4096")
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help="the same, as an option")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default the best there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    if options.shape and options.sizes:
        parser.error(f"the shape must be given once, got {options.sizes} and --shape {options.shape}")
    shape = tuple(options.shape or options.sizes or (4096, 4096))
    report = sample(shape, options.dtype, options.device, options.seed)
    say(*[json.dumps(report)] if options.json else table(report).split("\n"))


def sample(shape: tuple[int, ...], dtype: str, device: str | None, seed: int) -> dict[str, Any]:
    """Make the weights, timed, and report on them."""
    keywords: dict[str, Any] = {"seed": seed, "dtype": dtype, "device": device}
    if math.prod(shape) == 0:
        raise ValueError(f"shape must have at least one element, got {shape}")
    # The first time pays for what is paid once: compiling, and the memory of the array.
    weights = gpuinit.he_normal(shape, **keywords)
    number = synchronize(weights)
    engine = cpu.engine(math.prod(shape), DTYPES[dtype]) if number is devices.CPU else "cuda"
    start = time.perf_counter()
    gpuinit.he_normal(shape, seed=seed, out=weights)
    synchronize(weights)
    seconds = time.perf_counter() - start

    draw = find_draw(gpuinit.he_normal, shape)
    _, (limit,) = find_sampling(draw, DTYPES[dtype])
    return {
        "device": devices.describe_device(number),
        "engine": engine,
        "shape": list(shape),
        "dtype": dtype,
        "seed": seed,
        "seconds": seconds,
        **statistics(weights),
        "expected_std": draw.std(),
        "bound": float(np.asarray(limit).astype(DTYPES[dtype])),
    }


def synchronize(weights: Any) -> int | None:
    """Wait until the weights are made; returns their device."""
    if isinstance(weights, np.ndarray):
        return devices.CPU
    weights.device.synchronize()
    return int(weights.device.id)


def statistics(weights: Any) -> dict[str, Any]:
    """Moments, extremes and digest, read piece by piece."""
    total = np.zeros(4)
    low, high = math.inf, -math.inf
    digest = hashlib.sha256()
    for piece in pieces(weights):
        digest.update(piece.tobytes())
        values = piece.astype(np.float64)
        total += [np.sum(values**power) for power in (1, 2, 3, 4)]
        low, high = min(low, values.min()), max(high, values.max())
    m1, m2, m3, m4 = (float(moment) for moment in total / weights.size)
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return {
        "mean": m1,
        "std": math.sqrt(max(variance, 0)),
        "kurtosis": fourth / variance**2 if variance > 0 else None,
        "min": float(low),
        "max": float(high),
        "sha256": digest.hexdigest(),
    }


def pieces(weights: Any) -> Iterator[np.ndarray]:
    """The weights in order, on the host."""
    flat = weights.reshape(-1)
    for start in range(0, flat.size, ELEMENTS_AT_ONCE):
        piece = flat[start : start + ELEMENTS_AT_ONCE]
        yield piece if isinstance(piece, np.ndarray) else piece.get()


def table(report: dict[str, Any]) -> str:
    """The report for a person, in 80 columns."""
    count = math.prod(report["shape"])
    rate = count / report["seconds"]
    bandwidth = rate * DTYPES[report["dtype"]].itemsize
    kurtosis = "-" if report["kurtosis"] is None else f"{report['kurtosis']:.6f}"
    bound = report["bound"]
    rows = [
        ("device", f"{report['device']} ({report['engine']})"),
        ("array", f"he_normal {tuple(report['shape'])} {report['dtype']}, seed {report['seed']}"),
        ("time", f"{report['seconds'] * 1e3:.3f} ms"),
        ("rate", f"{rate / 1e9:.3f} billion samples/s, {bandwidth / 1e9:.2f} GB/s"),
        (),
        ("", "measured", "theory"),
        ("mean", f"{report['mean']:+.3e}", "0"),
        ("std", f"{report['std']:.8f}", f"{report['expected_std']:.8f}"),
        ("kurtosis", kurtosis, f"{EXPECTED_KURTOSIS:.6f}"),
        ("min", f"{report['min']:+.8f}", f">= {-bound:+.8f}"),
        ("max", f"{report['max']:+.8f}", f"<= {bound:+.8f}"),
        (),
        ("sha256", report["sha256"]),
    ]
    lines = []
    for row in rows:
        if len(row) == 3:
            lines.append(f"  {row[0]:<10}{row[1]:>14}{row[2]:>18}")
        else:
            lines.append(f"  {row[0]:<10}{row[1]}" if row else "")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
