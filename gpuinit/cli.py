"""The commands of the extra `cli`: checkpoint, verify, fingerprint and plot, with progress on a terminal."""

from __future__ import annotations

import errno
import itertools
import json
import re
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import TransferSpeedColumn as SpeedColumn

import gpuinit
from gpuinit import FallbackWarning
from gpuinit import checkpoint as checkpoints
from gpuinit.checkpoint import in_units
from gpuinit.safetensors_file import Advance, Watch, read_model
from gpuinit.safetensors_file import fingerprint as digest_all
from gpuinit.stream import parse_seed

LEAST_COLUMNS = 40
GAP = " " * 3  # between two columns
ROWS = 8  # of what differs, so that all is on one screen: a wrong seed makes every tensor differ

# Schedulers end a job with SIGTERM, and a terminal that is closed with SIGHUP, which Windows has not.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

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
@click.version_option(gpuinit.__version__, prog_name="gpuinit")
def commands() -> None:
    """Initial weights of neural networks: one seed, the same bits everywhere.

    Without a command: sample.
    """


def hand_on(name: str, main: Callable[[list[str]], None], summary: str) -> None:
    """A command with a parser of its own, as it works without the extra too."""

    @commands.command(
        name, help=summary, add_help_option=False, context_settings={"ignore_unknown_options": True}
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        main([name, *arguments])


def run_main(arguments: list[str]) -> None:
    from gpuinit.__main__ import main

    main(arguments)


hand_on("sample", run_main, "Fill one array and compare it with theory.")
hand_on("doctor", run_main, "Describe this installation and check the bytes it makes.")


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
    with explained("Nothing was left behind"):
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
        click.echo(json.dumps(report))
        return
    click.echo(f"{files[-1]}: {counted(report)}")
    if len(files) > 1:
        click.echo(f"in {len(files) - 1} files, {files[0].name} to {files[-2].name}")


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
    with explained():
        parse_seed(seed)
        with reading() as watch:
            entries = checkpoints.read_manifest(manifest, watch)
            start = time.perf_counter()
            model = read_model(file, watch=watch)
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
        click.echo(json.dumps(report))
    elif found:
        show(("differs", "how"), found[:ROWS])
        if len(found) > ROWS:
            click.echo(f"and {len(found) - ROWS} more; --json has them all")
        click.echo(f"{file}: not what {manifest} makes with seed {seed}")
    else:
        click.echo(f"{file}: names, shapes, dtypes and all bytes of the tensors are equal\n{counted(report)}")
    if found:
        sys.exit(1)


@commands.command()
@click.argument("file", type=PathArgument)
@json_option
def fingerprint(file: Path, as_json: bool) -> None:
    """Print a digest of all weights, whatever files they are in, and one of each tensor."""
    with explained():
        with reading() as watch:
            stored = read_model(file, watch=watch).tensors
        with progress("reading", [tensor.stop - tensor.start for tensor in stored.values()]) as advance:
            total, digests = digest_all(stored, advance)
    if as_json:
        click.echo(json.dumps({"sha256": total, "tensors": digests}))
        return
    rows = [
        (name, stored[name].code, " ".join(map(str, stored[name].shape)), digest[:16])
        for name, digest in digests.items()
    ]
    show(("tensor", "dtype", "shape", "sha256 begins"), rows)
    click.echo(f"{total}  {file}")


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
    with explained():
        try:
            from gpuinit.plot import draw
        except ImportError as error:
            if not (error.name or "").startswith("matplotlib"):
                raise
            raise ValueError(
                'matplotlib is not installed. To install it: pip install "gpuinit[plot]"'
            ) from None
        if not output.suffix:  # the library would add one
            raise ValueError(f"the output must be named *.png, *.svg or *.pdf, got {output}")
        draw(initializers or ("he_normal",), seed, device, output)
    click.echo(output)


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
    cells = [[printable(cell, console.encoding) for cell in row] for row in rows]
    natural = [max(map(width_of, column)) for column in zip(heads, *cells, strict=True)]
    widths = narrow(natural, max(console.width, LEAST_COLUMNS) - len(GAP) * (len(heads) - 1))
    click.secho("\n".join(in_columns(heads, widths)), bold=True)
    line = "─" if console.encoding.startswith("utf") else "-"
    click.echo(line * (sum(widths) + len(GAP) * (len(heads) - 1)))
    for start in range(0, len(cells), 1000):
        some = cells[start : start + 1000]
        click.echo("\n".join(line for row in some for line in in_columns(row, widths)))


def printable(text: str, encoding: str) -> str:
    # What a terminal would obey, or cannot show, is in few names, and the search for it takes its time.
    return text if text.isascii() and text.isprintable() else readable(text, encoding)


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


def readable(text: str, encoding: str) -> str:
    """With escapes for what cannot be printed."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def progress(verb: str, sizes: list[Any]) -> Iterator[Advance]:
    """A bar with rate and time left on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    total = sum(size if isinstance(size, int) else size.nbytes for size in sizes)
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def reading() -> Iterator[Watch]:
    """A bar of what is read, and how much of it, on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)


@contextmanager
def explained(consequence: str = "") -> Iterator[None]:
    """Errors and signals as one line on stderr, and what they leave behind."""
    handled = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in handled:
            signal.signal(number, interrupt)
        with warnings.catch_warnings():
            warnings.showwarning = tell  # type: ignore[assignment]
            yield
    except KeyboardInterrupt:
        stop("stopped", consequence, 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            stop(f"{error.strerror}. Free some of the disk, or choose another", consequence, 2)
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        stop(named, consequence, 2)
    except (TypeError, ValueError, ImportError, MemoryError, RuntimeError, FallbackWarning) as error:
        stop(str(error), consequence, 2)
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def interrupt(number: int, frame: object) -> None:
    """Clean up as after Ctrl-C."""
    raise KeyboardInterrupt


def tell(message: Warning | str, *_: object) -> None:
    """A warning as one line."""
    click.echo(f"gpuinit: {message}.", err=True)


def stop(message: str, consequence: str, status: int) -> None:
    end = f". {consequence}." if consequence else "."
    click.echo(f"gpuinit: {message.rstrip('.')}{end}", err=True)
    sys.exit(status)
