"""Seed and name to key and stream; shape and index to runs of global elements (stream format 2)."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cache, lru_cache
from math import prod
from types import EllipsisType
from typing import Any, NamedTuple, SupportsIndex

from gpuinit import loading

Index = SupportsIndex | slice | EllipsisType | tuple[SupportsIndex | slice | EllipsisType, ...]

STREAM_FORMAT = 2  # docs/stream-format.md

MAX_AXES = 64  # NumPy's own limit
MAX_SIZE = 2**63 - 1  # the largest count a signed 64-bit index can address


class Run(NamedTuple):
    """`rows` rows of `length` elements; row r starts at global element offset + r * row_stride.

    With outer axes, (length, stride) each, innermost first, all of that comes once for every step along them,
    the offset being so much further.
    """

    offset: int
    length: int
    rows: int
    row_stride: int
    outer: tuple[tuple[int, int], ...] = ()


def as_integer(value: object, wanted: str, got: object) -> int:
    """An integer of any library as an int, 0-d arrays too; truth values, arrays with axes and all else raise
    a TypeError: wanted, got.

    The message is put together only then: repr takes longer than the rest of a call.
    """
    if type(value) is int:
        return value
    is_array = hasattr(value, "dtype")
    if is_scalar(value, "int|uint") if is_array else not isinstance(value, bool):
        try:
            # By item, as torch's own index ends at 2**63.
            return operator.index(value.item() if is_array and hasattr(value, "item") else value)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):  # an array without a value, as under jit or on meta, too
            pass
    raise TypeError(f"{wanted}, got {got!r}")


def is_scalar(array: Any, kinds: str) -> bool:
    """Whether it is a 0-d array of one of these kinds of numbers, of any library.

    By the name of its dtype, which every library has: float32, torch.float32, bfloat16, int8.
    """
    try:
        if getattr(array, "shape", None) != ():
            return False
    except RuntimeError:  # a nested tensor of torch, which has none
        return False
    dtype = getattr(array, "dtype", None)
    name = getattr(dtype, "name", str(dtype)).rpartition(".")[2]
    return re.match(rf"({kinds})\d", name) is not None


def as_integers(value: object, wanted: str) -> tuple[int, ...]:
    """An integer, or a sequence of them, as a tuple of ints; all else raises a TypeError: wanted, got."""
    if type(value) is int:
        return (value,)
    if type(value) is not tuple:
        if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set):
            raise TypeError(f"{wanted}, got {value!r}")
        if not (isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0):
            return (as_integer(value, wanted, value),)
    return tuple([as_integer(item, wanted, value) for item in value])


def parse_seed(seed: SupportsIndex | None) -> int:
    """The Philox key: the seed itself, or 64 fresh bits from the system for None."""
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    wanted = "seed must be None or an integer in [0, 2**64)"
    key = as_integer(seed, wanted, seed)
    if not 0 <= key < 2**64:
        raise ValueError(f"{wanted}, got {seed!r}")
    return key


def parse_name(name: str | None) -> int:
    """The stream: 0 for None, else the first 8 bytes, little-endian, of BLAKE2b of the UTF-8 name."""
    if name is None:
        return 0
    if not isinstance(name, str):
        raise TypeError(f"name must be None or a string, got {name!r}")
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"name must be encodable as UTF-8, got {name!r}") from None
    return int.from_bytes(blake2b()(encoded, digest_size=8).digest(), "little")


@cache
def blake2b() -> Any:
    with loading.brief:
        from hashlib import blake2b  # here, as it loads OpenSSL, a tenth of the time to import this package

    return blake2b


def parse_shape(shape: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    """The shape as a tuple of ints."""
    wanted = "shape must be an integer or a sequence of integers >= 0"
    parsed = as_integers(shape, wanted)
    if min(parsed, default=0) < 0:
        raise ValueError(f"{wanted}, got {shape!r}")
    if len(parsed) > MAX_AXES:
        raise ValueError(f"shape must have at most {MAX_AXES} axes, got {len(parsed)}")
    if prod(filter(None, parsed)) > MAX_SIZE:  # however many there are of axes of length 0
        raise ValueError(f"shape must have fewer than 2**63 elements, got {shape!r}")
    return parsed


def parse_index(
    index: Index | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Start and length along every axis of the part that index selects, and the shape of that part."""
    if index is None:
        return (0,) * len(shape), shape, shape
    items = index if isinstance(index, tuple) else (index,)
    wanted = "index must hold integers, slices and at most one Ellipsis"
    kinds = list(map(type, items))
    ellipses = kinds.count(EllipsisType)
    if ellipses > 1:
        raise ValueError(f"{wanted}, got {index!r}")
    missing = len(shape) - len(items) + ellipses
    if missing < 0:
        raise ValueError(f"index must have at most {len(shape)} entries for shape {shape}, got {index!r}")
    if ellipses or missing:
        at = kinds.index(EllipsisType) if ellipses else len(items)
        items = items[:at] + (slice(None),) * missing + items[at + 1 :]

    starts, lengths, part = [], [], []
    for item, length in zip(items, shape, strict=True):
        if isinstance(item, slice):
            if item.step is not None and as_integer(item.step, wanted, index) != 1:
                raise ValueError(f"index must hold slices of step 1, got {index!r}")
            bounds = (
                None if bound is None else as_integer(bound, wanted, index)
                for bound in (item.start, item.stop)
            )
            start, stop, _ = slice(*bounds).indices(length)
            count = stop - start if stop > start else 0
            starts.append(start)
            lengths.append(count)
            part.append(count)
        else:
            position = as_integer(item, wanted, index)
            if not -length <= position < length:
                raise ValueError(f"index must lie inside the shape {shape}, got {index!r}")
            starts.append(position % length)
            lengths.append(1)
    return tuple(starts), tuple(lengths), tuple(part)


@lru_cache(maxsize=256)  # tensors of one model share their shapes
def runs(shape: tuple[int, ...], starts: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Run, ...]:
    """The run of global elements that makes the part, in the part's own order; none for an empty part.

    Neighbouring axes join into one where the part has the inner one whole.
    """
    if 0 in lengths:
        return ()
    strides = row_major(shape)
    return (join(lengths, strides)._replace(offset=sum(map(operator.mul, starts, strides))),)


def strided_runs(offset: int, lengths: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Run, ...]:
    """The same for a part whose element i is the global element offset + sum(i * strides)."""
    return () if 0 in lengths else (join(lengths, strides)._replace(offset=offset),)


@lru_cache(maxsize=256)
def join(lengths: tuple[int, ...], strides: tuple[int, ...]) -> Run:
    """That of a part at offset 0."""
    joined: list[tuple[int, int]] = []  # (length, stride), innermost first
    for count, stride in zip(lengths[::-1], strides[::-1], strict=True):
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = (joined[-1][0] * count, joined[-1][1])
        elif count > 1:
            joined.append((count, stride))
    if not joined or joined[0][1] != 1:  # single elements, a stride apart
        joined.insert(0, (1, 1))
    if len(joined) == 1:
        joined.append((1, 0))
    (count, _), (rows, row_stride), *outer = joined
    return Run(0, count, rows, row_stride, tuple(outer))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Steps of the linear index along every axis."""
    strides = [1]
    for length in shape[:0:-1]:
        strides.append(strides[-1] * length)
    return tuple(strides[: len(shape)][::-1])


def walk(axes: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The places that these axes, (length, stride), innermost first, lead to, in row-major order."""
    if not axes:
        yield 0
        return
    *inner, (length, stride) = axes
    for i in range(length):
        for further in walk(inner):
            yield i * stride + further
