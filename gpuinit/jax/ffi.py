"""What XLA calls in the middle of a compiled program, to fill its own buffer: a typed FFI handler in Python.

One operand, uint32 words of shape (*batch, 4): the key, high word first, and the number of the part's first
element in the whole array, likewise. One result, of shape (*batch, *part). One attribute, `request`, a text
that says the rest (`Spec`), so that a program that was exported or cached runs in any process that has
imported gpuinit.jax. On a CPU the engine of that size writes the buffer. On CUDA the kernel is launched on
XLA's stream and reads the words from the device, so that nothing waits and nothing is copied.

XLA is not told that the call may be captured in a CUDA graph: the first one compiles the kernel.

The structures are those of XLA's C API, xla/ffi/api/c_api.h, which jaxlib ships. XLA promises to support a
version of it for at least twelve months.
"""

from __future__ import annotations

import atexit
import ctypes
import dis
import json
import os
from collections.abc import Callable
from contextlib import suppress
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache, lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from gpuinit.backends import cpu, cuda
from gpuinit.initializers import DTYPES
from gpuinit.memory import ask_for_huge_pages
from gpuinit.quantile import Numbers
from gpuinit.stream import STREAM_FORMAT, row_major, strided_runs

TARGET = "gpuinit_fill"

# Versions of XLA's API whose structures, as far as they are read here, are those below.
VERSIONS = ((0, 2), (0, 3))
METADATA = 1  # XLA_FFI_Extension_Metadata: asked what the handler is, not to run
NO_TRAITS = 0
CANCELLED, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, INTERNAL = 1, 3, 8, 13  # XLA_FFI_Error_Code
ELEMENTS = {10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}  # XLA_FFI_DataType


class Extension(Structure):
    """XLA_FFI_Extension_Base."""

    _fields_ = (("size", c_size_t), ("kind", c_int), ("next", c_void_p))


class Version(Structure):
    """XLA_FFI_Api_Version."""

    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class Metadata(Structure):
    """XLA_FFI_Metadata, but for its end."""

    _fields_ = (("size", c_size_t), ("version", Version), ("traits", c_uint32))


class MetadataExtension(Structure):
    """XLA_FFI_Metadata_Extension."""

    _fields_ = (("base", Extension), ("metadata", POINTER(Metadata)))


class ErrorArguments(Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


class StreamArguments(Structure):
    """XLA_FFI_Stream_Get_Args."""

    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("context", c_void_p), ("stream", c_void_p))


class Api(Structure):
    """The start of XLA_FFI_Api: the functions that are not called have no names."""

    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("version", Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorArguments))),
        ("others", c_void_p * 3),
        ("get_stream", ctypes.CFUNCTYPE(c_void_p, POINTER(StreamArguments))),
    )


class Buffer(Structure):
    """XLA_FFI_Buffer."""

    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class Text(Structure):
    """XLA_FFI_ByteSpan."""

    _fields_ = (("start", c_void_p), ("length", c_size_t))


class Buffers(Structure):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("count", c_int64),
        ("kinds", c_void_p),
        ("buffers", POINTER(POINTER(Buffer))),
    )


class Attributes(Structure):
    """XLA_FFI_Attrs, all of them texts."""

    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("count", c_int64),
        ("kinds", c_void_p),
        ("names", c_void_p),
        ("texts", POINTER(POINTER(Text))),
    )


class CallFrame(Structure):
    """XLA_FFI_CallFrame, but for its end."""

    _fields_ = (
        ("size", c_size_t),
        ("extension", POINTER(MetadataExtension)),
        ("api", POINTER(Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("operands", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    )


class Spec(NamedTuple):
    """All that is known when a program is traced: what a request is but for its key, and of which array."""

    shape: tuple[int, ...]  # of the whole array
    stream: int
    distribution: int
    numbers: Numbers


def write_spec(spec: Spec) -> str:
    """As a text, which has every number exactly."""
    numbers = [number.item() for number in spec.numbers]
    return json.dumps({"format": STREAM_FORMAT, **spec._asdict(), "numbers": numbers})


@lru_cache(maxsize=4096)  # one for each weight of a large model
def read_spec(text: bytes, dtype: np.dtype) -> Spec:
    """The spec of a text, for a result of this dtype."""
    fields = json.loads(text)
    made_for = fields.pop("format")
    if made_for != STREAM_FORMAT:
        raise ValueError(
            f"the program must be made by a gpuinit of stream format {STREAM_FORMAT}, got {made_for}"
        )
    real, whole = (np.float64, np.int64) if dtype == np.float64 else (np.float32, np.int32)
    numbers = tuple(whole(n) if isinstance(n, int) else real(n) for n in fields.pop("numbers"))
    return Spec(**{**fields, "shape": tuple(fields["shape"])}, numbers=numbers)


# What is filled


def fill_host(text: bytes, words: np.ndarray, out: np.ndarray) -> None:
    """Fill out, of shape (*batch, *part), on the host."""
    spec = read_spec(text, out.dtype)
    words, arrays, part = in_a_row(words, out)
    strides = row_major(spec.shape)
    for i, (key_high, key_low, first_high, first_low) in enumerate(words.tolist()):
        elements = strided_runs(first_high << 32 | first_low, part, strides)
        cpu.fill(arrays[i], elements, (key_high << 32 | key_low, *spec[1:]))


def fill_cuda(text: bytes, words: Any, out: Any) -> None:
    """The same for arrays of CuPy, on its current stream. What the words are is known on the device alone."""
    spec = read_spec(text, out.dtype)
    words, arrays, part = in_a_row(words, out)
    strides = row_major(spec.shape)
    for i in range(words.shape[0]):
        cuda.fill(arrays[i], strided_runs(0, part, strides), (words[i], *spec[1:]))


def in_a_row(words: Any, out: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """Words and results of a batch one after another, each of one axis, and the shape that a result has."""
    part = out.shape[len(words.shape) - 1 :]
    count = words.size // 4
    return words.reshape(count, 4), out.reshape(count, prod(part)), part


def run_on_cpu(frame: CallFrame) -> None:
    wait_at_exit()
    text, words, out = read(frame)
    if prod(out[1]):
        array = host_array(*out)
        ask_for_huge_pages(out[0], array.nbytes)
        fill_host(text, host_array(*words), array)


def run_on_cuda(frame: CallFrame) -> None:
    text, words, out = read(frame)
    if not prod(out[1]):
        return
    import cupy

    device = int(cupy.cuda.runtime.pointerGetAttributes(out[0]).device)
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream_of(frame), device):
        fill_cuda(text, cuda_array(*words, device), cuda_array(*out, device))


Place = tuple[int, list[int], np.dtype]  # address, shape and dtype of what is there


def read(frame: CallFrame) -> tuple[bytes, Place, Place]:
    """The request, and where the words and the result are."""
    text = frame.attributes.texts[0].contents
    words, out = frame.operands.buffers[0].contents, frame.results.buffers[0].contents
    return (
        ctypes.string_at(text.start, text.length),
        (words.data, words.dims[: words.rank], np.dtype(np.uint32)),
        (out.data, out.dims[: out.rank], DTYPES[ELEMENTS[out.dtype]]),
    )


def host_array(address: int, shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = prod(shape) * dtype.itemsize
    return np.frombuffer(memory_at(address, size, WRITABLE), dtype).reshape(shape)


WRITABLE = 0x200  # PyBUF_WRITE
memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
memory_at.restype = ctypes.py_object
memory_at.argtypes = (c_void_p, ctypes.c_ssize_t, c_int)


def cuda_array(address: int, shape: list[int], dtype: np.dtype, device: int) -> Any:
    import cupy

    memory = cupy.cuda.UnownedMemory(address, prod(shape) * dtype.itemsize, None, device)
    return cupy.ndarray(tuple(shape), dtype, cupy.cuda.MemoryPointer(memory, 0))


def stream_of(frame: CallFrame) -> int:
    """The CUDA stream on which XLA runs what it calls."""
    arguments = StreamArguments(ctypes.sizeof(StreamArguments), None, frame.context, None)
    if frame.api.contents.get_stream(ctypes.byref(arguments)):
        raise RuntimeError("XLA has no stream for the call")
    return arguments.stream or 0


# The handler


def without_signals_at_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """CPython handles signals as a function begins, before its first `try`. This one lets them wait.

    The instruction RESUME does so unless its argument is 2 or more (Python/bytecodes.c).
    """
    code = bytearray(function.__code__.co_code)
    resume = next(at for at in range(0, len(code), 2) if code[at] == dis.opmap["RESUME"])
    code[resume + 1] = 2
    function.__code__ = function.__code__.replace(co_code=bytes(code))
    return function


@without_signals_at_first
def handle(run: Callable[[CallFrame], None], address: int) -> int | None:
    """Do what a call frame asks for; return None, or the address of an XLA error. It must not raise.

    If it did, XLA would take the array, unwritten, for filled. The second try is for what comes while the
    first error is told, as a Ctrl-C, or for want of stack; no Python function is called then.
    """
    try:
        try:
            answer(run, CallFrame.from_address(address))
        except BaseException as error:
            text = f"gpuinit: {type(error).__name__}: {error}"
            return make_error(CallFrame.from_address(address), text, code_of(error))
    except BaseException:
        made: int = CallFrame.from_address(address).api.contents.create_error(LAST_ERROR)
        return made
    return None


def answer(run: Callable[[CallFrame], None], frame: CallFrame) -> None:
    if frame.extension and frame.extension.contents.base.kind == METADATA:
        describe(frame)
    elif problems:
        raise RuntimeError(problems[0])
    else:
        run(frame)


def describe(frame: CallFrame) -> None:
    """Answer which version of XLA's API the handler is for.

    It is always XLA's own: JAX would start no backend otherwise. If it is not known, `problem` says so.
    """
    theirs = frame.api.contents.version
    metadata = frame.extension.contents.metadata.contents
    metadata.version.major, metadata.version.minor = theirs.major, theirs.minor
    metadata.traits = NO_TRAITS
    if (theirs.major, theirs.minor) not in VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in VERSIONS)
        problems.append(
            f"XLA's foreign function interface must have version {known}, got {theirs.major}.{theirs.minor}"
        )


def problem() -> str | None:
    """Why XLA cannot call the handler; None where it can. It is known when a backend has started."""
    return problems[0] if problems else None


problems: list[str] = []


def code_of(error: BaseException) -> int:
    if isinstance(error, TypeError | ValueError):
        return INVALID_ARGUMENT
    if isinstance(error, MemoryError):
        return RESOURCE_EXHAUSTED
    return INTERNAL if isinstance(error, Exception) else CANCELLED


def make_error(frame: CallFrame, text: str, code: int) -> int | None:
    """An error that XLA owns; it copies the text."""
    made: int | None = frame.api.contents.create_error(ctypes.byref(error_arguments(text, code)))
    return made


def error_arguments(text: str, code: int) -> ErrorArguments:
    message = text.replace("\0", " ").encode(errors="backslashreplace")
    return ErrorArguments(ctypes.sizeof(ErrorArguments), None, message, code)


LAST_ERROR = ctypes.pointer(
    error_arguments("gpuinit: it was interrupted, or cannot tell its error", CANCELLED)
)


@cache
def wait_at_exit() -> None:
    """Let programs that run on a CPU end before Python does: one that calls Python afterwards never ends.

    It is asked of whoever makes or runs such a program, as there may be nothing to wait for, and no backend.
    """
    atexit.register(wait_for_programs, os.getpid())


def wait_for_programs(process: int) -> None:
    if os.getpid() != process:  # a forked child has none of XLA's threads
        return
    with jax.transfer_guard("allow"):
        for array in jax.live_arrays("cpu"):
            with suppress(Exception):  # it may be deleted, or its program have failed
                array.block_until_ready()
        # What nobody holds: the programs of one thread begin in turn, so that this one is the last to.
        for device in jax.local_devices(backend="cpu"):
            (jax.device_put(np.int32(0), device) + 1).block_until_ready()


HANDLER = ctypes.CFUNCTYPE(c_void_p, c_void_p)
HANDLERS = {"cpu": HANDLER(partial(handle, run_on_cpu)), "CUDA": HANDLER(partial(handle, run_on_cuda))}
# XLA keeps their addresses for as long as the process lives, longer than Python keeps its modules.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(HANDLERS))


# At import, as a program that was made in another process asks for the handler by its name. JAX passes it on
# to XLA when it starts a backend.
try:
    for platform, handler in HANDLERS.items():
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform=platform)
except Exception as error:
    problems.append(str(error))
