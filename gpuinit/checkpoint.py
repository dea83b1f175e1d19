"""Whole checkpoints: read a manifest, write safetensors files, verify and fingerprint them.

A safetensors file is the length of its header in 8 little-endian bytes, the header as JSON, then the data.
Here every tensor passes through a window of WINDOW_BYTES, so memory is the same for any size.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import gpuinit
from gpuinit import devices
from gpuinit.devices import describe
from gpuinit.initializers import DTYPES, find_draw, parse_dtype
from gpuinit.stream import as_integer, parse_name, parse_shape

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

MOST_HEADER_BYTES = 100_000_000  # that the safetensors library reads
MOST_TENSORS = 10**6  # that one name of a manifest stands for

Advance = Callable[[int], object]  # told of so many bytes more


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


class Stored(NamedTuple):
    """A tensor in a file: its data are the bytes from start to stop."""

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_manifest(path: Path) -> list[Entry]:
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
    tensors = {**read_like(path, manifest), **expand_names(path, tensors)}
    if not tensors:
        raise ValueError(
            f"{path}: a manifest must name a tensor under tensors, or a file under like, got none"
        )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in tensors):
            raise ValueError(
                f"{path}: pattern {pattern!r} must match a tensor, got none that it does. "
                "Correct it, or take it out"
            )
    entries = [parse_entry(path, name, given, defaults, patterns) for name, given in tensors.items()]
    return [entry for entry in entries if entry.initializer != SKIP]


def read_object(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {"like": path.name}
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # of JSON, TOML and UTF-8
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ValueError(f"{path}: the manifest must be {kind}, got {error}") from None
    return as_table(path, "the manifest", found)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys comes twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} twice")
        found[name] = value
    return found


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


def taken_by(initializer: str) -> tuple[str, ...]:
    if initializer not in INITIALIZERS:
        return ()
    parameters = inspect.signature(getattr(gpuinit, initializer)).parameters
    return tuple(key for key in ARGUMENTS if key in parameters)


def read_like(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the file that the manifest is like; of a safetensors file only the header is read."""
    if "like" not in manifest:
        return {}
    if not isinstance(manifest["like"], str) or not Path(manifest["like"]).name:
        raise ValueError(f"{path}: like must be the path of a file, got {manifest['like']!r}")
    stored, _ = read_model(path.parent / manifest["like"], whole=False)
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


def parse_entry(
    path: Path, name: str, given: Any, defaults: dict[str, Any], patterns: dict[str, Any]
) -> Entry:
    """The settings of a tensor: the defaults, then every pattern that matches, in order, then its own."""
    where = f"{path}: tensor {name!r}"
    own = dict(given) if isinstance(given, dict) else {"shape": given}
    if "shape" not in own:
        hint = ". In TOML a name with dots must be quoted" if path.suffix == ".toml" else ""
        raise ValueError(f"{where}: must have a shape, got {given!r}{hint}")
    shape = own.pop("shape")
    check_settings(where, own)
    matching = [settings for pattern, settings in patterns.items() if fnmatch.fnmatchcase(name, pattern)]
    # A file that the manifest is like decides the dtype of what it has, unless the manifest does.
    settings = {"dtype": "float32", "initializer": "he_normal"}
    for layer in (own, defaults, *matching) if isinstance(shape, tuple) else (defaults, *matching, own):
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
        if name == "__metadata__":
            raise ValueError("this name must not be used, as safetensors keeps it for itself, got it")
        parse_name(name)
        if initializer in INITIALIZERS:
            find_draw(getattr(gpuinit, initializer), entry.shape, dtype=entry.dtype, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}. Set it for this tensor, or for a pattern that matches") from None
    return entry


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

    Everything is written to temporary names, and moved into place once all of it is on the disk. Whatever
    stops it, nothing that it made stays behind; only a process that is killed leaves its .partial files.
    """
    shards = split(entries, max_shard_bytes)
    index = path.with_name(path.name + ".index.json")
    files = [path]
    if len(shards) > 1:
        names = [f"{path.stem}-{i + 1:05}-of-{len(shards):05}{path.suffix}" for i in range(len(shards))]
        files = [path.with_name(name) for name in names]
    targets = [path, index, *files]
    check_place(path, targets, sum(entry.nbytes for entry in entries))

    made: list[Path] = []
    try:
        for file, shard in zip(files, shards, strict=True):
            with create(file, made) as out:
                write_shard(out, shard, seed, device, advance)
        if len(shards) > 1:
            with create(index, made) as out:
                out.write(index_of(files, shards))
            files.append(index)  # last, so that there is no index before all shards are in place
        check_free(targets)  # that took a while
        for file in files:
            made.append(file)
            partial(file).rename(file)
        sync_folder(path.parent)
    except BaseException:
        remove(made)
        raise
    return files


def remove(files: list[Path]) -> None:
    """Remove those that are there, even if Ctrl-C is pressed once more."""
    while True:
        try:
            for file in files:
                file.unlink(missing_ok=True)
        except KeyboardInterrupt:
            continue
        return


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


def check_place(path: Path, files: list[Path], size: int) -> None:
    """That nothing is overwritten, and that there is room as far as the disk tells."""
    if path.suffix != ".safetensors":
        raise ValueError(f"the output must be named *.safetensors, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder. Make it first, or choose another place")
    check_free(files)
    for file in files:
        if os.path.lexists(partial(file)):
            raise FileExistsError(
                f"{partial(file)} exists: another gpuinit is writing it, or one was killed. "
                "If none is running, delete it"
            )
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(f"{path.parent} has {in_units(free)} free, and {path.name} takes {in_units(size)}")


def check_free(files: list[Path]) -> None:
    for file in files:
        if os.path.lexists(file):  # a link that leads nowhere would be replaced as well
            raise FileExistsError(f"{file} exists already. Delete it, or choose another name")


@contextmanager
def create(file: Path, made: list[Path]) -> Iterator[BinaryIO]:
    """Open the temporary file of a new one, which is noted in made; on the disk when it is closed."""
    with partial(file).open("xb") as out:
        made.append(partial(file))
        yield out
        out.flush()
        os.fsync(out.fileno())


def write_shard(out: BinaryIO, shard: list[Entry], seed: int, device: str | None, advance: Advance) -> None:
    # The widest dtypes first, then by name, as the safetensors library lays them out: all are aligned.
    shard = sorted(shard, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.name))
    out.write(header_of(shard, seed))
    with ThreadPoolExecutor(1) as writer:  # writes one window while the next is made
        pending: Future[int] | None = None
        for entry in shard:
            for window in windows(entry, seed, device, held=2):
                if pending is not None:
                    advance(pending.result())
                pending = writer.submit(out.write, window.reshape(-1).view(np.uint8).data)
        if pending is not None:
            advance(pending.result())


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


def sync_folder(folder: Path) -> None:
    """Make the new names survive a loss of power; Windows and some network disks have no way to."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(number)


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


def read_model(path: Path, whole: bool = True) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, or of all files of an index, and the metadata."""
    index = path.with_name(path.name + ".index.json")
    if path.suffix == ".safetensors" and not path.exists() and index.exists():
        path = index
    if path.suffix != ".json":
        return read_header(path, whole)
    try:
        places = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
        files = sorted({path.parent / file_name(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: an index must be JSON with a weight_map, got {describe(error)}") from None
    found: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, metadata = read_header(file, whole)
        twice = next((name for name in tensors if name in found), None)
        if twice is not None:
            raise ValueError(f"{path}: each tensor must be in one file, got {twice!r} in {file} again")
        found.update(tensors)
    wrong = [name for name in {**places, **found} if name not in found or name not in places]
    wrong += [name for name in found if name not in wrong and found[name].file.name != places[name]]
    if wrong:
        raise ValueError(
            f"{path}: the index and its files must name the same tensors, got {wrong[0]!r} in one"
        )
    return found, metadata


def file_name(value: object) -> str:
    if not isinstance(value, str) or Path(value).name != value or value in ("", ".."):
        raise ValueError(f"a file must be named without a folder, got {value!r}")
    return value


def read_header(path: Path, whole: bool) -> tuple[dict[str, Stored], dict[str, str]]:
    """The header of one file; where the data are wanted too, that they are all there."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"{path}: a safetensors file must begin with its header, got another file")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique)
        metadata = dict(header).pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"metadata {metadata!r}")
        tensors = {name: given for name, given in header.items() if name != "__metadata__"}
        found = {name: parse_stored(path, 8 + length, given) for name, given in tensors.items()}
        end = 8 + length
        for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start != end:  # bytes that no tensor has, or that two have
                raise ValueError(
                    f"data from {tensor.start - 8 - length} on after those to {end - 8 - length}"
                )
            end = tensor.stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: the header must be that of a safetensors file, got {describe(error)}"
        ) from None
    if whole and size != end:
        raise ValueError(
            f"{path}: the file must have the {end} bytes that its header tells of, got {size}. "
            "It is cut or damaged: make or copy it again"
        )
    return found, metadata


def parse_stored(path: Path, data: int, given: dict[str, Any]) -> Stored:
    start, stop = (
        as_integer(place, "an offset must be an integer", place) for place in given["data_offsets"]
    )
    shape = parse_shape(given["shape"])
    code = given["dtype"]
    if not isinstance(code, str):
        raise TypeError(f"dtype {code!r}")
    if not 0 <= start <= stop or (
        code in NAMES and stop - start != math.prod(shape) * DTYPES[NAMES[code]].itemsize
    ):
        raise ValueError(f"offsets {start} and {stop} for shape {shape} of {code}")
    return Stored(path, code, shape, data + start, data + stop)


def verify(
    path: Path,
    entries: list[Entry],
    seed: int,
    device: str | None = None,
    advance: Advance = lambda count: None,
) -> list[tuple[str, str]]:
    """Make every tensor again and compare: the tensors that differ, and how."""
    stored, metadata = read_model(path)
    wanted = {entry.name for entry in entries}
    found = [(name, "is in the file and not in the manifest") for name in stored if name not in wanted]
    for entry in entries:
        problem = compare(entry, stored.get(entry.name), seed, device, advance)
        if problem is not None:
            found.append((entry.name, problem))
    claimed = metadata.get("gpuinit.seed", str(seed))
    if found and claimed != str(seed):
        found.insert(0, ("--seed", f"the file says that it was made with {claimed}, not {seed}"))
    return found


def compare(
    entry: Entry, tensor: Stored | None, seed: int, device: str | None, advance: Advance
) -> str | None:
    """What differs in one tensor: the first element, if shape and dtype do not."""
    if tensor is None:
        return "is in the manifest and not in the file"
    if (tensor.shape, tensor.code) != (entry.shape, CODES[entry.dtype]):
        there = f"{NAMES.get(tensor.code, tensor.code)} {tensor.shape}"
        return f"is {there} in the file, and {entry.dtype} {entry.shape} in the manifest"
    dtype = DTYPES[entry.dtype]
    bits = f"<u{dtype.itemsize}"
    buffer = np.empty(min(math.prod(entry.shape), WINDOW_BYTES // dtype.itemsize), dtype)
    position = 0
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
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


def fingerprint(
    path: Path, advance: Advance = lambda count: None
) -> tuple[str, dict[str, tuple[Stored, str]]]:
    """A digest of all names, dtypes, shapes and bytes, however they are split into files; and those of each.

    The first is the SHA-256 of one line of JSON for each tensor, [name, dtype, shape, SHA-256 of its data],
    in the order of the names.
    """
    stored, _ = read_model(path)
    total = hashlib.sha256()
    found = {}
    for name, tensor in sorted(stored.items()):
        digest = hashlib.sha256()
        left = tensor.stop - tensor.start
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            while left:
                piece = file.read(min(left, 2**22))
                if not piece:
                    raise OSError(f"{tensor.file} became shorter while it was read")
                digest.update(piece)
                advance(len(piece))
                left -= len(piece)
        found[name] = (tensor, digest.hexdigest())
        total.update(json.dumps([name, tensor.code, tensor.shape, digest.hexdigest()]).encode() + b"\n")
    return total.hexdigest(), found
