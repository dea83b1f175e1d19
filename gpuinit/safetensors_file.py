"""Read safetensors files and their indexes, and refuse what the safetensors library refuses.

A safetensors file is the length of its header in 8 little-endian bytes, the header as JSON, then the data.

References: the format, https://github.com/huggingface/safetensors; its library, safetensors/src/tensor.rs,
whose header is read by serde_json.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gpuinit.devices import describe
from gpuinit.disk import open_file, read_text

# The bits of an element of every dtype that the safetensors library 0.8 knows.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

MOST_HEADER_BYTES = 100_000_000  # that the safetensors library reads
MOST_NESTED = 127  # objects and arrays in one another, that serde_json reads
MOST_OPEN = 16  # files at once
STEP = 1000  # tensors between two reports of progress

Advance = Callable[[int], object]  # told of so many bytes more
Watch = Callable[[str, int, int], object]  # told what is being done, how much of it, of how much


def say_nothing(doing: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


class Stored(NamedTuple):
    """A tensor in a file: its data are the bytes from start to stop."""

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Model(NamedTuple):
    """The tensors of a file, or of all files of an index, and what these say of themselves."""

    tensors: dict[str, Stored]
    metadata: dict[Path, dict[str, str]]  # of each safetensors file
    claimed_size: object = None  # the total_size of an index, of any type; None if it has none


def read_model(path: Path, whole: bool = True, watch: Watch = say_nothing) -> Model:
    """The headers of a safetensors file, or of all files of an index."""
    if path.suffix == ".safetensors" and not path.exists():
        index = path.with_name(path.name + ".index.json")
        path = index if index.exists() else path
    if path.suffix == ".json":
        return read_shards(path, whole, watch)
    total = measure_header(path)
    tensors, metadata = read_header(path, whole, functools.partial(watch_part, watch, 0, total))
    return Model(tensors, {path: metadata})


def read_shards(path: Path, whole: bool, watch: Watch) -> Model:
    """The headers of all files of an index."""
    try:
        index = json.loads(read_text(path), object_pairs_hook=unique)
        places = index["weight_map"]
        files = {name: path.parent / file_name(name) for name in dict.fromkeys(places.values())}
        about = index.get("metadata")
        claimed_size = about.get("total_size") if isinstance(about, dict) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: an index must be JSON with a weight_map, got {describe(error)}") from None
    found: dict[str, Stored] = {}
    metadata = {}
    lengths = {file: measure_header(file) for file in sorted(files.values())}
    total, before = sum(lengths.values()), 0
    for file, length in lengths.items():
        told = functools.partial(watch_part, watch, before, total)
        tensors, metadata[file] = read_header(file, whole, told)
        before += length
        twice = next((name for name in tensors if name in found), None)
        if twice is not None:
            raise ValueError(f"{path}: each tensor must be in one file, got {twice!r} in {file} again")
        found.update(tensors)
    wrong = next((name for name, file in places.items() if is_elsewhere(found.get(name), files[file])), None)
    if wrong is None:
        wrong = next((name for name in found if name not in places), None)
    if wrong is not None:
        raise ValueError(f"{path}: the index and its files must name the same tensors, got {wrong!r} in one")
    return Model(found, metadata, claimed_size)


def watch_part(watch: Watch, before: int, total: int, done: int) -> None:
    watch("reading headers", before + done, total)


def is_elsewhere(tensor: Stored | None, file: Path) -> bool:
    return tensor is None or tensor.file is not file


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys comes twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} twice")
        found[name] = value
    return found


def file_name(value: object) -> str:
    if not isinstance(value, str) or Path(value).name != value or value in ("", ".."):
        raise ValueError(f"a file must be named without a folder, got {value!r}")
    return value


def measure_header(path: Path) -> int:
    """The bytes of a file's header."""
    with open_file(path) as file:
        return header_length(path, file)


def header_length(path: Path, file: BinaryIO) -> int:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
        raise ValueError(f"{path}: a safetensors file must begin with its header, got another file")
    return length


def read_header(
    path: Path, whole: bool, advance: Callable[[int], object] = lambda done: None
) -> tuple[dict[str, Stored], dict[str, str]]:
    """The header of one file; where the data are wanted too, that they are all there."""
    with open_file(path) as file:
        length = header_length(path, file)
        text = file.read(length)
        size = os.fstat(file.fileno()).st_size
    try:
        found, metadata = parse_header(path, text, advance)
        end = check_places(found, 8 + length)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise ValueError(
            f"{path}: the header must be that of a safetensors file, got {describe(error)}"
        ) from None
    if whole and size != end:
        raise ValueError(
            f"{path}: the file must have the {end} bytes that its header tells of, got {size}. "
            "It is cut or damaged: make or copy it again"
        )
    return found, metadata


def parse_header(
    path: Path, text: bytes, advance: Callable[[int], object]
) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a header, their places unchecked, and its metadata.

    As the library reads it: of a name that comes twice, the last; of a tensor's fields, those it knows.
    """
    found: dict[str, Stored] = {}
    metadata: dict[str, str] | None = None
    data = 8 + len(text)
    decoded = text.decode("utf-8")  # here, as json would find out other encodings, and take half a surrogate
    for number, (name, value, place) in enumerate(members(decoded)):
        if name != "__metadata__":
            found[name] = parse_stored(path, data, value)
        elif metadata is None:
            metadata = parse_metadata(value)
        else:
            raise ValueError("the key '__metadata__' twice")
        if number % STEP == 0:
            advance(place)
    advance(len(text))
    return found, metadata or {}


def members(text: str) -> Iterator[tuple[str, Any, int]]:
    """The members of the JSON object that a text is, one by one: name, value, and where it ends.

    Objects inside of it are tuples of pairs, as a key may come twice. Read one by one, they take no memory
    beyond what is made of them, and it can be told how far the reading is.
    """
    half = next((match for match in ESCAPE.finditer(text) if match.lastgroup == "half"), None)
    if half is not None:
        raise ValueError(f"half of a surrogate pair, {half.group()}")
    at = expect("{", text, blank(text, 0))
    if text.startswith("}", at):
        at += 1
    else:
        while True:
            expect('"', text, at)
            name, at = DECODER.raw_decode(text, at)
            at = expect(":", text, blank(text, at))
            value, at = DECODER.raw_decode(text, at)
            at = blank(text, at)
            yield name, value, at
            if text.startswith("}", at):
                at += 1
                break
            at = expect(",", text, at)
    if blank(text, at) != len(text):
        raise ValueError(f"more after the end of its object, at character {at}")


def blank(text: str, at: int) -> int:
    """Where the blanks from there on end."""
    return BLANKS.match(text, at).end()  # type: ignore[union-attr]


def expect(wanted: str, text: str, at: int) -> int:
    """Where what comes after one character, and blanks, begins."""
    if not text.startswith(wanted, at):
        raise ValueError(f"{text[at : at + 1]!r} at character {at}, not {wanted!r}")
    return blank(text, at + 1)


BLANKS = re.compile(r"[ \t\n\r]*")

# A backslash and what it escapes; in JSON it is only in strings. A half has no other beside it.
ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F])|.)", re.DOTALL
)


def parse_integer(text: str) -> int | float:
    """An integer of 64 bits without a sign; else, as serde_json reads a number, what is no such integer."""
    if len(text) <= 20 and not text.startswith("-"):
        number = int(text)
        if number < 2**64:
            return number
    return parse_float(text)


def parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"a number that is too large, {text:.30}")
    return number


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is not JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=tuple,
    parse_int=parse_integer,
    parse_float=parse_float,
    parse_constant=refuse_constant,
)


def parse_metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, tuple) or not all(isinstance(text, str) for _, text in value):
        raise ValueError(f"metadata {shown(value)}, not an object of strings")
    return dict(value)


def parse_stored(path: Path, data: int, value: object) -> Stored:
    """A tensor as its fields say, whose data are counted from `data` on."""
    code, shape, offsets = fields(value)
    if isinstance(code, tuple) and len(code) == 1 and code[0][1] is None:  # {"F32": null}
        code = code[0][0]
    if not isinstance(code, str) or code not in BITS:
        raise ValueError(f"dtype {shown(code)}, not one of {', '.join(BITS)}")
    if not isinstance(shape, list) or not INTEGERS.issuperset(map(type, shape)):
        raise ValueError(f"shape {shown(shape)}, not integers from 0 to 2**64 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not INTEGERS.issuperset(map(type, offsets)):
        raise ValueError(f"data_offsets {shown(offsets)}, not two integers from 0 to 2**64 - 1")
    return Stored(path, sys.intern(code), tuple(shape), data + offsets[0], data + offsets[1])


FIELDS = ("dtype", "shape", "data_offsets")
INTEGERS = {int}  # without bool


def fields(value: object) -> Sequence[Any]:
    """The dtype, shape and offsets of a tensor, which serde takes from an array of the three too."""
    if isinstance(value, list) and len(value) == 3:
        return value
    if not isinstance(value, tuple):
        raise ValueError(f"the tensor {shown(value)}, not an object")
    found = dict(value)
    if len(value) > len(FIELDS):
        check_others(value)
    try:
        return found["dtype"], found["shape"], found["data_offsets"]
    except KeyError as error:
        raise ValueError(f"a tensor without {error}") from None


def check_others(pairs: tuple[tuple[str, Any], ...]) -> None:
    """That no field comes twice, and that others, which are left aside, nest no deeper than may be."""
    known = [key for key, _ in pairs if key in FIELDS]
    if len(known) > len(FIELDS):
        raise ValueError("a field of a tensor twice")
    if any(key not in FIELDS and nested(item) > MOST_NESTED - 2 for key, item in pairs):
        raise ValueError(f"more than {MOST_NESTED} objects and arrays in one another")


def nested(value: object) -> int:
    """How many objects and arrays are in one another there."""
    if isinstance(value, tuple):
        return 1 + max((nested(item) for _, item in value), default=0)
    if isinstance(value, list):
        return 1 + max(map(nested, value), default=0)
    return 0


def shown(value: object) -> str:
    """A value of a file for a message, cut."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_places(tensors: dict[str, Stored], data: int) -> int:
    """That every tensor has the bytes that it needs, and every byte one tensor; where the last one ends."""
    end = data
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor[3:]):
        count = 1
        for length in tensor.shape:
            count *= length
            if count >= 2**64:  # even if there is an axis of length 0 after it
                break
        bits = count * BITS[tensor.code]
        if bits >= 2**64 or (tensor.stop - tensor.start) * 8 != bits:
            places = f"offsets {tensor.start - data} and {tensor.stop - data}"
            raise ValueError(f"{places} for shape {shown(tensor.shape)} of {tensor.code}")
        if tensor.start != end:  # bytes that no tensor has, or that two have
            raise ValueError(f"data from {tensor.start - data} on after those to {end - data}")
        end = tensor.stop
    return end


@contextmanager
def open_data() -> Iterator[Callable[[Stored], BinaryIO]]:
    """A function that gives a tensor's file, at its data. A few files stay open, as the next is in one."""
    files: dict[Path, BinaryIO] = {}

    def open_at(tensor: Stored) -> BinaryIO:
        if tensor.file not in files:
            if len(files) == MOST_OPEN:
                files.pop(next(iter(files))).close()
            files[tensor.file] = open_file(tensor.file, buffering=0)
        files[tensor.file].seek(tensor.start)
        return files[tensor.file]

    try:
        yield open_at
    finally:
        for file in files.values():
            file.close()


def fingerprint(
    tensors: dict[str, Stored], advance: Advance = lambda count: None
) -> tuple[str, dict[str, str]]:
    """A digest of all names, dtypes, shapes and bytes, however they are split into files; and those of each.

    The first is the SHA-256 of one line of JSON for each tensor, [name, dtype, shape, SHA-256 of its data],
    in the order of the names.
    """
    total = hashlib.sha256()
    found = {}
    with open_data() as open_at:
        for name, tensor in sorted(tensors.items()):
            digest = hashlib.sha256()
            left = tensor.stop - tensor.start
            file = open_at(tensor)
            while left:
                piece = file.read(min(left, 2**22))
                if not piece:
                    raise OSError(f"{tensor.file} became shorter while it was read")
                digest.update(piece)
                advance(len(piece))
                left -= len(piece)
            found[name] = digest.hexdigest()
            total.update(json.dumps([name, tensor.code, tensor.shape, found[name]]).encode() + b"\n")
    return total.hexdigest(), found
