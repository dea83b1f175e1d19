"""Whole checkpoints: read a manifest, write safetensors files, verify them.

Every tensor passes through a window of WINDOW_BYTES, so memory is the same for any size.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import inspect
import itertools
import json
import math
import os
import re
import secrets
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import gpuinit
from gpuinit import devices
from gpuinit.disk import FULL, exists, named, read_text, sync, sync_folder
from gpuinit.initializers import DTYPES, find_draw, parse_dtype
from gpuinit.safetensors_file import (
    MOST_HEADER_BYTES,
    STEP,
    Advance,
    Model,
    Stored,
    Watch,
    open_data,
    read_model,
    say_nothing,
    shown,
    unique,
)
from gpuinit.stream import parse_name, parse_shape

WINDOW_BYTES = 64 * 2**20

# How safetensors writes the dtypes of weights.
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
NAMES = {code: dtype for dtype, code in CODES.items()}

INITIALIZERS = tuple(name for name in gpuinit.__all__ if name != "FallbackWarning")
CONSTANTS = {"zeros": 0, "ones": 1}
SKIP = "skip"  # of a model that the manifest is like: this tensor is left out
DRAW = ("scale", "mode", "distribution", "stddev", "mean", "lower", "upper", "limit", "low", "high")
ARGUMENTS = (*DRAW, "in_axis", "out_axis", "batch_axis")
SETTINGS = ("dtype", "initializer", *ARGUMENTS)

MOST_TENSORS = 10**6  # that one name of a manifest stands for


class Entry(NamedTuple):
    """A tensor to make."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    initializer: str
    arguments: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class File(NamedTuple):
    """A file that was made: which one it is, once that is known, and the bytes that were written."""

    status: os.stat_result | None = None
    size: int = 0


Made = dict[Path, File]


def read_manifest(path: Path, watch: Watch = say_nothing) -> list[Entry]:
    """The tensors that a manifest, or the header of a safetensors file or index, asks for, checked."""
    manifest = read_object(path)
    if "weight_map" in manifest:
        manifest = {"like": path.name}
    unknown = set(manifest) - {"like", "defaults", "patterns", "tensors"}
    if unknown:
        raise ValueError(
            f"{path}: the keys must be like, defaults, patterns and tensors, got {', '.join(sorted(unknown))}"
        )
    defaults = as_table(path, "defaults", manifest.get("defaults", {}))
    patterns = as_table(path, "patterns", manifest.get("patterns", {}))
    check_settings(f"{path}: defaults", defaults)
    for pattern, settings in patterns.items():
        check_settings(f"{path}: pattern {pattern!r}", settings)
    tensors = as_table(path, "tensors", manifest.get("tensors", {}))
    tensors = {**read_like(path, manifest, watch), **expand_names(path, tensors)}
    if not tensors:
        raise ValueError(
            f"{path}: a manifest must name a tensor under tensors, or a file under like, got none"
        )
    entries = []
    unmatched, match = dict.fromkeys(patterns), matcher(patterns)
    parsed: dict[tuple[str, ...], Entry] = {}  # by what is given; models have few kinds of tensors
    for number, (name, given) in enumerate(tensors.items()):
        matching = match(name)
        for pattern in matching:
            unmatched.pop(pattern, None)
        key = (repr(given), *matching)
        if key not in parsed:
            general = [defaults, *(patterns[pattern] for pattern in matching)]
            parsed[key] = parse_entry(path, name, given, general)
        if parsed[key].initializer != SKIP:
            check_name(path, name)
            entries.append(parsed[key]._replace(name=name))
        if number % STEP == 0:
            watch("checking", number, len(tensors))
    for pattern in unmatched:
        raise ValueError(
            f"{path}: pattern {pattern!r} must match a tensor, got none that it does. "
            "Correct it, or take it out"
        )
    return entries


def matcher(patterns: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that finds the patterns that a name matches, in their order."""
    order = {pattern: number for number, pattern in enumerate(patterns)}
    # Those without a wildcard are looked up, as there may be one for every tensor.
    wild = [pattern for pattern in order if not {"*", "?", "["}.isdisjoint(pattern)]
    matches = [(pattern, re.compile(fnmatch.translate(pattern)).match) for pattern in wild]

    def find(name: str) -> list[str]:
        found = [pattern for pattern, match in matches if match(name)]
        if name in order and name not in found:
            found = sorted([*found, name], key=order.__getitem__)
        return found

    return find


def read_object(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {"like": path.name}
    try:
        text = read_text(path)
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # of JSON, TOML and UTF-8
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ValueError(f"{path}: the manifest must be {kind}, got {error}") from None
    return as_table(path, "the manifest", found)


def as_table(path: Path, what: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} must be a table of keys and values, got {value!r}")
    return value


def check_settings(where: str, settings: object) -> None:
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a table of settings, got {settings!r}")
    for key in settings:
        if key not in SETTINGS:
            raise ValueError(f"{where}: a setting must be one of {', '.join(SETTINGS)}, got {key!r}")
    if "initializer" in settings:
        check_arguments(where, settings["initializer"], settings)


def check_arguments(where: str, initializer: object, settings: Iterable[str]) -> None:
    """That the initializer is known and takes those of the settings that are arguments."""
    known = (*INITIALIZERS, *CONSTANTS, SKIP)
    if initializer not in known:
        raise ValueError(f"{where}: initializer must be one of {', '.join(known)}, got {initializer!r}")
    taken = taken_by(str(initializer))
    for key in settings:
        if key in ARGUMENTS and key not in taken:
            raise ValueError(
                f"{where}: {initializer} takes {', '.join(taken) or 'no arguments'}, got {key!r}. Take it out"
            )


@functools.cache
def taken_by(initializer: str) -> tuple[str, ...]:
    if initializer not in INITIALIZERS:
        return ()
    parameters = inspect.signature(getattr(gpuinit, initializer)).parameters
    return tuple(key for key in ARGUMENTS if key in parameters)


def read_like(path: Path, manifest: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """The tensors of the file that the manifest is like; of a safetensors file only the header is read."""
    if "like" not in manifest:
        return {}
    if not isinstance(manifest["like"], str) or not Path(manifest["like"]).name:
        raise ValueError(f"{path}: like must be the path of a file, got {manifest['like']!r}")
    stored = read_model(path.parent / manifest["like"], whole=False, watch=watch).tensors
    # A dtype that holds no weights is left as it is, for the message, unless the tensor is skipped.
    return {
        name: {"shape": tensor.shape, "dtype": NAMES.get(tensor.code, tensor.code)}
        for name, tensor in stored.items()
    }


def expand_names(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """layers.{0..3}.weight stands for layers.0.weight to layers.3.weight."""
    found: dict[str, Any] = {}
    for name, given in tensors.items():
        parts = re.split(r"\{(\d+)\.\.(\d+)\}", name, flags=re.ASCII)
        choices: list[Iterable[str]] = [[parts[0]]]
        count = 1
        for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if int(first) > int(last):
                raise ValueError(f"{path}: tensor {name!r}: a range must not fall, got {first}..{last}")
            count *= int(last) + 1 - int(first)
            choices += [map(str, range(int(first), int(last) + 1)), [text]]
        if count > MOST_TENSORS:  # before they fill the memory
            raise ValueError(f"{path}: tensor {name!r}: must be at most {MOST_TENSORS} tensors, got {count}")
        for one in map("".join, itertools.product(*choices)):
            if one in found:
                raise ValueError(f"{path}: tensor {one!r} must be given once, got it again in {name!r}")
            found[one] = given
    return found


def parse_entry(path: Path, name: str, given: Any, general: list[dict[str, Any]]) -> Entry:
    """The settings of a tensor: the general ones, in order, then its own."""
    where = f"{path}: tensor {name!r}"
    own = dict(given) if isinstance(given, dict) else {"shape": given}
    if "shape" not in own:
        hint = ". In TOML a name with dots must be quoted" if path.suffix == ".toml" else ""
        raise ValueError(f"{where}: must have a shape, got {given!r}{hint}")
    shape = own.pop("shape")
    check_settings(where, own)
    # A file that the manifest is like decides the dtype of what it has, unless the manifest does.
    settings = {"dtype": "float32", "initializer": "he_normal"}
    for layer in (own, *general) if isinstance(shape, tuple) else (*general, own):
        settings.update(layer)
    initializer = settings["initializer"]
    check_arguments(where, initializer, own)
    arguments = {key: settings[key] for key in taken_by(initializer) if key in settings}
    entry = Entry(name, (), settings["dtype"], initializer, arguments)
    if initializer == SKIP:
        return entry
    try:
        if settings["dtype"] is None:  # which NumPy takes for float64
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got None")
        entry = entry._replace(shape=parse_shape(shape), dtype=parse_dtype(settings["dtype"]).name)
        if initializer in INITIALIZERS:
            find_draw(getattr(gpuinit, initializer), entry.shape, dtype=entry.dtype, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}. Set it for this tensor, or for a pattern that matches") from None
    return entry


def check_name(path: Path, name: str) -> None:
    try:
        if name == "__metadata__":
            raise ValueError("this name must not be used, as safetensors keeps it for itself, got it")
        parse_name(name)
    except ValueError as error:
        raise ValueError(f"{path}: tensor {name!r}: {error}") from None


def windows(entry: Entry, seed: int, device: str | None, held: int = 1) -> Iterator[np.ndarray]:
    """The tensor in row-major order, in pieces of at most WINDOW_BYTES; the last `held` are valid."""
    dtype = DTYPES[entry.dtype]
    most = WINDOW_BYTES // dtype.itemsize
    on_host = devices.resolve(device) is devices.CPU
    buffers = [np.empty(min(math.prod(entry.shape), most), dtype) for _ in range(held)]
    if entry.initializer in CONSTANTS:
        for buffer in buffers:
            buffer.fill(CONSTANTS[entry.initializer])
    for (index, part), buffer in zip(cut(entry.shape, most), itertools.cycle(buffers), strict=False):
        window = buffer[: math.prod(part)].reshape(part)
        if entry.initializer not in CONSTANTS:
            where = {"out": window} if on_host else {"device": device, "dtype": entry.dtype}
            make = getattr(gpuinit, entry.initializer)
            made = make(entry.shape, seed=seed, name=entry.name, index=index, **where, **entry.arguments)
            window = window if on_host else made.get()
        yield window


def cut(shape: tuple[int, ...], most: int) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Basic indices that cut a shape into pieces of at most so many elements, in order, and their shapes."""
    if 0 in shape:
        return
    if not shape:
        yield (), ()
        return
    axis = 0
    while math.prod(shape[axis + 1 :]) > most:
        axis += 1
    inner = shape[axis + 1 :]
    step = most // math.prod(inner)
    for outer in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            yield (*outer, slice(start, stop)), (stop - start, *inner)


def write(
    entries: list[Entry],
    seed: int,
    path: Path,
    max_shard_bytes: int,
    device: str | None = None,
    advance: Advance = lambda count: None,
) -> list[Path]:
    """Write the model, in shards with an index where it is larger than one may be; returns the files.

    What the disk must offer in the end is tried first. Everything is written to temporary names, and moved
    into place once all of it is on the disk. Whatever stops it before, nothing that it made stays behind, and
    whatever fails then, all of it does: a note on the error says which. Only a process that is killed leaves
    .partial files and says nothing.
    """

    def make(check: Callable[[], None]) -> list[Path]:
        def went_on(count: int) -> None:
            check()
            advance(count)

        return write_all(entries, seed, path, max_shard_bytes, device, went_on)

    return uninterrupted(make, f"{path} is complete")


def uninterrupted(make: Callable[[Callable[[], None]], list[Path]], complete: str) -> list[Path]:
    """What a thread of its own makes, or the error that ended it.

    Python raises Ctrl-C in the main thread, at any point: between the opening of a file and the next step, or
    in the middle of cleaning up. In another thread it raises nothing. That one is given a function to call
    between its steps, which raises once nobody waits any more; it then cleans up, and is waited for.
    """
    # Locks, as they are taken and let go of in C: what waits in Python an interrupt may leave half done.
    waiting, running = threading.Lock(), threading.Lock()
    made: Future[list[Path]] = Future()

    def check() -> None:
        if not waiting.locked():
            raise RuntimeError("nobody waits")

    def run() -> None:
        try:
            check()
            made.set_result(make(check))
        except BaseException as error:
            made.set_exception(error)
        finally:
            running.release()

    thread = threading.Thread(target=run, name="gpuinit checkpoint")
    running.acquire()
    try:
        with waiting:
            thread.start()
            while not running.acquire(timeout=1):  # on Windows, Ctrl-C comes in between
                pass
            return made.result()
    except BaseException as stopped:
        while thread.is_alive():
            with suppress(KeyboardInterrupt):
                thread.join(1)
        if made.done() and made.exception() is not stopped:
            error = made.exception()
            for note in getattr(error, "__notes__", []) if error else [complete]:
                stopped.add_note(note)
        raise


def write_all(
    entries: list[Entry], seed: int, path: Path, max_shard_bytes: int, device: str | None, advance: Advance
) -> list[Path]:
    shards = split(entries, max_shard_bytes)
    check_output(path, len(shards))
    index = path.with_name(path.name + ".index.json")
    files = [path]
    if len(shards) > 1:
        names = [f"{path.stem}-{i + 1:05}-of-{len(shards):05}{path.suffix}" for i in range(len(shards))]
        files = [path.with_name(name) for name in names]
    check_place(path, [path, index, *files], sum(entry.nbytes for entry in entries))

    made: Made = {}
    try:
        rehearse(path.parent, made)
        if len(shards) > 1:  # first, so that it does not fail when all else is made
            with create(index, made) as out:
                put(out, index_of(files, shards))
        for file, shard in zip(files, shards, strict=True):
            with create(file, made) as out:
                write_shard(out, shard, seed, device, advance)
    except BaseException as error:
        error.add_note(remove(made))
        raise
    if len(shards) > 1:
        files.append(index)  # last, so that there is no index before all shards are in place
    try:
        check_free([path, index, *files])  # that took a while
        for file in files:
            place(file, made)
        sync_folder(path.parent)
    except OSError as error:
        error.add_note(kept(files, made))
        raise
    except BaseException as error:
        error.add_note(remove(made))
        raise
    return files


def rehearse(folder: Path, made: Made) -> None:
    """Do with one byte what the end takes: an object store that is mounted may have no rename."""
    file = folder / f".gpuinit-{secrets.token_hex(8)}"  # nobody else's
    try:
        with create(file, made) as out:
            put(out, b"0")
        place(file, made)
        sync_folder(folder)
        file.unlink()
        del made[file]
    except OSError as error:
        words = (
            f"{error.strerror or error}, when one byte was written and renamed there, as the model will be"
        )
        advice = "" if error.errno in FULL else ". Choose another folder"
        raise OSError(error.errno, words + advice, str(folder)) from None


def remove(made: Made) -> str:
    """Remove the files that are still those that were made; in words, what is left."""
    left = []
    for file, (status, _) in made.items():
        try:
            if status is None or same_file(file, status):
                file.unlink(missing_ok=True)
            elif exists(file):
                left.append(f"{file}, which may be another's")
        except OSError as error:
            left.append(f"{file} ({error.strerror})")
    return f"Left behind: {enumerated(left)}. To be deleted by hand" if left else "Nothing was left behind"


def same_file(file: Path, status: os.stat_result) -> bool:
    return exists(file) and os.path.samestat(file.lstat(), status)


def kept(files: list[Path], made: Made) -> str:
    """In words, where files are that could not all be moved into place, and what is to be done."""
    placed = [file for file in files if file in made]
    if len(placed) == len(files):
        return "All files are in place"
    waiting = [partial(file) for file in files if file not in made and os.path.lexists(partial(file))]
    if len(placed) + len(waiting) == len(files):
        return f"All is written: to finish, take .partial off the name of {enumerated(waiting)}"
    left = enumerated([*placed, *waiting])
    return f"Left behind: {left}. The rest is gone" if left else "Nothing was left behind"


def enumerated(names: Sequence[object]) -> str:
    """The names, or so many that one message holds them."""
    shown = [str(name) for name in names]
    return ", ".join(shown) if len(shown) < 5 else f"{shown[0]} to {shown[-1]}, {len(shown)} files"


def split(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Shards in the order of the entries, as Hugging Face's tools fill them: the next where one is full."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def check_output(path: Path, shards: int) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"the output must be named *.safetensors, got {path}")
    try:
        path.name.encode()
    except UnicodeEncodeError:
        if shards > 1:
            raise ValueError(
                f"the output must be named in UTF-8, as an index names its {shards} files, got {path}"
            ) from None


def check_place(path: Path, files: list[Path], size: int) -> None:
    """That nothing is overwritten, and that there is room as far as the disk tells."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder. Make it first, or choose another place")
    check_free(files)
    for file in files:
        if exists(partial(file)):
            raise FileExistsError(
                f"{partial(file)} exists: another gpuinit is writing it, or one did not finish. "
                "If none is running, delete it"
            )
    try:
        disk = shutil.disk_usage(path.parent)
    except OSError:
        return  # it does not tell
    if 0 < disk.free < size and disk.total:  # object stores say 0
        raise OSError(f"{path.parent} has {in_units(disk.free)} free, and {path.name} takes {in_units(size)}")


def check_free(files: list[Path]) -> None:
    for file in files:
        if exists(file):  # a link that leads nowhere would be replaced as well
            raise FileExistsError(f"{file} exists already. Delete it, or choose another name")


@contextmanager
def create(file: Path, made: Made) -> Iterator[BinaryIO]:
    """Open the temporary file of a new one, which is noted in made; on the disk when it is closed."""
    temporary = partial(file)
    made[temporary] = File()  # before it is there, so that it is never there without
    try:
        out = temporary.open("xb")
    except OSError:
        del made[temporary]  # another's, if it is there
        raise
    try:
        status = os.fstat(out.fileno())
        made[temporary] = File(status)
        yield out
        sync(out, temporary)
        made[temporary] = File(status, out.tell())
        if not same_file(temporary, status):  # some file systems number a file anew once it is closed
            raise OSError(errno.ENOENT, "another process has deleted or replaced it", str(temporary))
    except BaseException:
        with suppress(OSError):
            out.close()
        raise
    with named(temporary):
        out.close()


def place(file: Path, made: Made) -> None:
    """Move a file that was made to its name."""
    temporary = partial(file)
    with named(temporary):
        size = temporary.stat().st_size
        if size != made[temporary].size:  # lost, or another's that has taken its place
            wanted = made[temporary].size
            raise OSError(errno.EIO, f"{wanted} bytes were written, and {size} are there", str(temporary))
        check_free([file])
        temporary.rename(file)
    made[file] = made.pop(temporary)


def write_shard(out: BinaryIO, shard: list[Entry], seed: int, device: str | None, advance: Advance) -> None:
    # The widest dtypes first, then by name, as the safetensors library lays them out: all are aligned.
    shard = sorted(shard, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.name))
    put(out, header_of(shard, seed))
    with ThreadPoolExecutor(1) as writer:  # writes one window while the next is made
        pending: Future[int] | None = None
        for entry in shard:
            for window in windows(entry, seed, device, held=2):
                if pending is not None:
                    advance(pending.result())
                pending = writer.submit(put, out, window.reshape(-1).view(np.uint8).data)
        if pending is not None:
            advance(pending.result())


def put(out: BinaryIO, data: bytes | memoryview) -> int:
    with named(getattr(out, "name", None)):
        return out.write(data)


def header_of(shard: list[Entry], seed: int) -> bytes:
    # Transformers reads no file whose format it does not know; the data of all frameworks are the same.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "gpuinit.seed": str(seed)}}
    stop = 0
    for entry in shard:
        start, stop = stop, stop + entry.nbytes
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER_BYTES:
        raise ValueError(
            f"the header of a file must have at most {MOST_HEADER_BYTES} bytes, got {len(text)}. "
            "Choose a smaller --max-shard-size"
        )
    return len(text).to_bytes(8, "little") + text


def index_of(files: list[Path], shards: list[list[Entry]]) -> bytes:
    total = sum(entry.nbytes for shard in shards for entry in shard)
    places = {entry.name: file.name for file, shard in zip(files, shards, strict=True) for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def in_units(size: float) -> str:
    """Bytes for a person, in the units of --max-shard-size."""
    units = ["TB", "GB", "MB", "kB"]
    if size < 1000:
        return f"{size:.0f} B"
    size /= 1000
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop()
    return f"{size:.2f} {units[-1]}"


def verify(
    model: Model,
    entries: list[Entry],
    seed: int,
    device: str | None = None,
    advance: Advance = lambda count: None,
) -> list[tuple[str, str]]:
    """Make every tensor again and compare: the tensors that differ, and how.

    Compared are the names, and the shape, the dtype and every byte of each; and where the files tell of
    their seed, and an index of the size of all tensors, whether that is so. Other metadata and the blanks
    of a header are not.
    """
    wanted = {entry.name for entry in entries}
    found = find_false_claims(model, seed)
    found += [
        (name, "is in the file and not in the manifest") for name in model.tensors if name not in wanted
    ]
    with open_data() as open_at:
        for entry in entries:
            problem = compare(entry, model.tensors.get(entry.name), seed, device, open_at, advance)
            if problem is not None:
                found.append((entry.name, problem))
    return found


def find_false_claims(model: Model, seed: int) -> list[tuple[str, str]]:
    """What the files say of themselves that is not so."""
    claims: dict[str, list[str]] = {}
    for file, metadata in model.metadata.items():
        claims.setdefault(metadata.get("gpuinit.seed", str(seed)), []).append(file.name)
    found = []
    for claimed, files in claims.items():
        if claimed != str(seed):
            teller = "the file" if len(model.metadata) == 1 else files[0]
            others = f", as {len(files) - 1} more say" if len(files) > 1 else ""
            claimed = claimed if claimed.isascii() and claimed.isdecimal() else repr(claimed)
            found.append(("--seed", f"{teller} says that it was made with {claimed:.30}, not {seed}{others}"))
    size = sum(tensor.stop - tensor.start for tensor in model.tensors.values())
    if model.claimed_size not in (None, size):
        found.append(("total_size", f"is {model.claimed_size!r:.30} in the index, and {size} in its files"))
    return found


def compare(
    entry: Entry,
    tensor: Stored | None,
    seed: int,
    device: str | None,
    open_at: Callable[[Stored], BinaryIO],
    advance: Advance,
) -> str | None:
    """What differs in one tensor: the first element, if shape and dtype do not."""
    if tensor is None:
        return "is in the manifest and not in the file"
    if (tensor.shape, tensor.code) != (entry.shape, CODES[entry.dtype]):
        there = f"{NAMES.get(tensor.code, tensor.code)} {shown(tensor.shape)}"
        return f"is {there} in the file, and {entry.dtype} {entry.shape} in the manifest"
    dtype = DTYPES[entry.dtype]
    bits = f"<u{dtype.itemsize}"
    buffer = np.empty(min(math.prod(entry.shape), WINDOW_BYTES // dtype.itemsize), dtype)
    position = 0
    file = open_at(tensor)
    for window in windows(entry, seed, device):
        read = buffer[: window.size]
        read_into(file, read.view(np.uint8))
        made = window.reshape(-1)
        different = made.view(bits) != read.view(bits)
        first = int(different.argmax())
        if different[first]:
            place = tuple(map(int, np.unravel_index(position + first, entry.shape)))
            values = f"{float(read[first])!r} in the file, {float(made[first])!r} made"
            advance(entry.nbytes - position * dtype.itemsize)
            return f"first differs at {list(place)}: {values}"
        position += window.size
        advance(window.nbytes)
    return None


def read_into(file: Any, memory: np.ndarray) -> None:
    position = 0
    while position < memory.size:
        count = file.readinto(memory[position:])
        if not count:
            raise OSError(f"{file.name} became shorter while it was read")
        position += count
