"""The commands of the extra `cli`: checkpoint, verify, fingerprint and plot, with progress on a terminal."""

from __future__ import annotations

import itertools
import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
from click.shell_completion import shell_complete
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import TransferSpeedColumn as SpeedColumn

from gpuinit import checkpoint as checkpoints
from gpuinit import safetensors_file
from gpuinit.checkpoint import in_units
from gpuinit.disk import check_regular
from gpuinit.messages import COMMANDS, ERROR, readable, say, stop
from gpuinit.safetensors_file import Advance, Watch
from gpuinit.stream import parse_seed

LEAST_COLUMNS = 40
GAP = " " * 3  # between two columns
ROWS = 8  # of what differs, so that all is on one screen: a wrong seed makes every tensor differ

PLOTTED = tuple(name for name in checkpoints.INITIALIZERS if name != "variance_scaling")

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

PathArgument = click.Path(path_type=Path)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="From 0 to 2**64 - 1."
)
device_option = click.option(
    "--device", metavar="NAME", help="cpu, cuda or cuda:N; by default the best there is."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
def commands() -> None:
    pass


for name in ("sample", "doctor"):  # gpuinit/__main__.py runs them; here they are completed by the shell
    commands.add_command(click.Command(name, help=COMMANDS[name], add_help_option=False))


def run(given: list[str]) -> None:
    try:
        with commands.make_context("gpuinit", given) as context:
            commands.invoke(context)
    except click.exceptions.Exit as done:  # after its help
        sys.exit(done.exit_code)
    except click.ClickException as error:
        stop(f"{error.format_message().rstrip('.')}. See gpuinit {given[0]} -h", ERROR)
    sys.exit(0)


def complete(asked: str, variable: str) -> None:
    """What a shell asks for to complete a command."""
    try:
        unknown = shell_complete(commands, {}, "gpuinit", variable, asked)
    except KeyError as error:
        raise ValueError(
            f"{variable}={asked} must come with COMP_WORDS and COMP_CWORD, got no {error}"
        ) from None
    if unknown:
        raise ValueError(
            f"{variable} must be bash, zsh or fish with _source or _complete behind it, got {asked!r}"
        )
    sys.exit(0)


@commands.command()
@click.argument("manifest", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, metavar="FILE", help="*.safetensors")
@seed_option
@device_option
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Above it, several files."
)
@json_option
def checkpoint(
    manifest: Path, output: Path, seed: int, device: str | None, max_shard_size: str, as_json: bool
) -> None:
    """Make a whole model's initial weights.

    MANIFEST is a JSON or TOML file of names and shapes (docs/checkpoints.md), or a .safetensors file or
    index whose names, shapes and dtypes are taken.
    """
    parse_seed(seed)
    with reading() as watch:
        entries = checkpoints.read_manifest(manifest, watch)
    most = parse_size(max_shard_size)
    start = time.perf_counter()
    with progress("making", entries) as advance:
        files = checkpoints.write(entries, seed, output, most, device, advance)
    seconds = time.perf_counter() - start
    report = {
        "files": [str(file) for file in files],
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "seed": seed,
        "seconds": seconds,
    }
    if as_json:
        say(json.dumps(report))
        return
    say(f"{files[-1]}: {counted(report)}")
    if len(files) > 1:
        say(f"in {len(files) - 1} files, {files[0].name} to {files[-2].name}")


@commands.command()
@click.argument("file", type=PathArgument)
@click.argument("manifest", type=PathArgument)
@seed_option
@device_option
@json_option
def verify(file: Path, manifest: Path, seed: int, device: str | None, as_json: bool) -> None:
    """Make the weights again and compare them, tensor by tensor.

    Exit status 1, and the first element that differs, if the names, shapes, dtypes and bytes in FILE are
    not what MANIFEST and the seed make, or FILE tells of another seed or size. Other metadata is not
    compared.
    """
    parse_seed(seed)
    with reading() as watch:
        entries = checkpoints.read_manifest(manifest, watch)
        start = time.perf_counter()
        model = safetensors_file.read_model(file, watch=watch)
    with progress("comparing", entries) as advance:
        found = checkpoints.verify(model, entries, seed, device, advance)
    seconds = time.perf_counter() - start
    report = {
        "equal": not found,
        "differences": [{"tensor": name, "problem": problem} for name, problem in found],
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "seed": seed,
        "seconds": seconds,
    }
    if as_json:
        say(json.dumps(report))
    elif found:
        show(("differs", "how"), found[:ROWS])
        if len(found) > ROWS:
            say(f"and {len(found) - ROWS} more; --json has them all")
        say(f"{file}: not what {manifest} makes with seed {seed}")
    else:
        say(f"{file}: names, shapes, dtypes and all bytes of the tensors are equal", counted(report))
    if found:
        sys.exit(1)


@commands.command()
@click.argument("file", type=PathArgument)
@json_option
def fingerprint(file: Path, as_json: bool) -> None:
    """Print a digest of all weights, whatever files they are in, and one of each tensor."""
    with reading() as watch:
        stored = safetensors_file.read_model(file, watch=watch).tensors
    with progress("reading", [tensor.stop - tensor.start for tensor in stored.values()]) as advance:
        total, digests = safetensors_file.fingerprint(stored, advance)
    if as_json:
        say(json.dumps({"sha256": total, "tensors": digests}))
        return
    rows = [
        (name, stored[name].code, " ".join(map(str, stored[name].shape)), digest[:16])
        for name, digest in digests.items()
    ]
    show(("tensor", "dtype", "shape", "sha256 begins"), rows)
    say(f"{total}  {file}")


@commands.command()
@click.argument("initializers", nargs=-1, type=click.Choice(PLOTTED), metavar="[INITIALIZER]...")
@click.option(
    "-o", "--output", type=PathArgument, required=True, metavar="FILE", help="*.png, *.svg or *.pdf"
)
@seed_option
@device_option
def plot(initializers: tuple[str, ...], output: Path, seed: int, device: str | None) -> None:
    """Draw histograms of weights over the exact densities.

    INITIALIZER is he_normal by default; several are drawn side by side on one scale.
    """
    try:
        from gpuinit.plot import draw
    except ImportError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise ValueError('matplotlib is not installed. To install it: pip install "gpuinit[plot]"') from None
    if not output.suffix:  # the library would add one
        raise ValueError(f"the output must be named *.png, *.svg or *.pdf, got {output}")
    if output.exists():
        check_regular(output, output.stat())
    draw(initializers or ("he_normal",), seed, device, output)
    say(str(output))


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS or Fraction(match[1]) == 0:
        raise ValueError(f"--max-shard-size must be a size such as 5GB, 500MB or 2GiB, got {text!r}")
    return int(Fraction(match[1]) * UNITS[match[2].upper()])


def counted(report: dict[str, Any]) -> str:
    rate = in_units(report["bytes"] / report["seconds"])
    return (
        f"{report['tensors']} tensors, {in_units(report['bytes'])}, "
        f"{report['seconds']:.1f} s, {rate}/s, seed {report['seed']}"
    )


def show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal, 80 columns elsewhere; rich's takes half a millisecond for a row."""
    console = Console()
    cells = [[readable(cell, console.encoding) for cell in row] for row in rows]
    natural = [max(map(width_of, column)) for column in zip(heads, *cells, strict=True)]
    widths = narrow(natural, max(console.width, LEAST_COLUMNS) - len(GAP) * (len(heads) - 1))
    line = "─" if console.encoding.startswith("utf") else "-"
    say(*in_columns(heads, widths), line * (sum(widths) + len(GAP) * (len(heads) - 1)))
    for start in range(0, len(cells), 1000):
        say(*(line for row in cells[start : start + 1000] for line in in_columns(row, widths)))


def width_of(text: str) -> int:
    """The columns of a terminal that a text takes."""
    return len(text) if text.isascii() else cell_len(text)


def narrow(widths: list[int], room: int) -> list[int]:
    """The widths, the widest of them made narrower until there is room for all."""
    widths = [min(width, room) for width in widths]
    while sum(widths) > room:
        widths[widths.index(max(widths))] -= 1
    return widths


def in_columns(cells: Sequence[str], widths: list[int]) -> list[str]:
    """The lines of a row; what is wider than its column goes on in the next."""
    folded = [fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return [
        GAP.join(
            part + " " * (width - width_of(part)) for part, width in zip(parts, widths, strict=True)
        ).rstrip()
        for parts in itertools.zip_longest(*folded, fillvalue="")
    ]


def fold(text: str, width: int) -> list[str]:
    if width_of(text) <= width:
        return [text]
    return textwrap.wrap(text, width) if text.isascii() else chop_cells(text, width)


@contextmanager
def progress(verb: str, sizes: list[Any]) -> Iterator[Advance]:
    """A bar with rate and time left on a terminal, nothing elsewhere."""
    total = sum(size if isinstance(size, int) else size.nbytes for size in sizes)
    with bar_of(DownloadColumn(), SpeedColumn()) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def reading() -> Iterator[Watch]:
    """A bar of what is read, and how much of it, on a terminal, nothing elsewhere."""
    with bar_of(TaskProgressColumn()) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)


def bar_of(*columns: ProgressColumn) -> Progress:
    on_terminal = bool(sys.stderr and sys.stderr.isatty())
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not on_terminal,
    )
