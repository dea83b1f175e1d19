"""The handler that XLA calls, called with frames made up here: on the CPU and, by the stand-in, on CUDA."""

from __future__ import annotations

import ctypes
import json
import operator
import signal
import subprocess
from functools import partial

import host_build
import numpy as np
import pytest

import gpuinit
from gpuinit.distributions import HE_NORMAL, draw_of, find_sampling, parse_normal, parse_uniform
from gpuinit.initializers import DTYPES

jax = pytest.importorskip("jax", reason='JAX is not installed: pip install "gpuinit[jax]"')

from gpuinit.jax import ffi, traced  # noqa: E402

KINDS = {name: number for number, name in ffi.ELEMENTS.items()} | {"uint32": 8}
STREAM = 0xABCD00
SEED = 0xFEDCBA98_76543210
CONTEXT = 0x1234

# Structures here, and their names in XLA's header.
STRUCTURES = {
    ffi.Extension: ("XLA_FFI_Extension_Base", "struct_size type next"),
    ffi.Version: ("XLA_FFI_Api_Version", "struct_size extension_start major_version minor_version"),
    ffi.Metadata: ("XLA_FFI_Metadata", "struct_size api_version traits"),
    ffi.MetadataExtension: ("XLA_FFI_Metadata_Extension", "extension_base metadata"),
    ffi.ErrorArguments: ("XLA_FFI_Error_Create_Args", "struct_size extension_start message errc"),
    ffi.StreamArguments: ("XLA_FFI_Stream_Get_Args", "struct_size extension_start ctx stream"),
    ffi.Api: (
        "XLA_FFI_Api",
        "struct_size extension_start api_version internal_api XLA_FFI_Error_Create XLA_FFI_Error_GetMessage "
        "XLA_FFI_Stream_Get",
    ),
    ffi.Buffer: ("XLA_FFI_Buffer", "struct_size extension_start dtype data rank dims"),
    ffi.Text: ("XLA_FFI_ByteSpan", "ptr len"),
    ffi.Attributes: ("XLA_FFI_Attrs", "struct_size extension_start size types names attrs"),
    ffi.CallFrame: ("XLA_FFI_CallFrame", "struct_size extension_start api ctx stage args rets attrs"),
}


def test_the_structures_are_those_of_the_header(tmp_path):
    """Compiled with the header that jaxlib ships: where each field begins, and XLA's numbers."""
    if host_build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    theirs = [("XLA_FFI_Args", "struct_size extension_start size types args", ffi.Buffers)]
    theirs += [("XLA_FFI_Rets", "struct_size extension_start size types rets", ffi.Buffers)]
    theirs += [(name, fields, structure) for structure, (name, fields) in STRUCTURES.items()]
    lines = [
        f'printf("%zu\\n", offsetof({name}, {field}));'
        for name, fields, _ in theirs
        for field in fields.split()
    ]
    numbers = {
        "XLA_FFI_Extension_Metadata": ffi.METADATA,
        "XLA_FFI_Error_Code_CANCELLED": ffi.CANCELLED,
        "XLA_FFI_Error_Code_INVALID_ARGUMENT": ffi.INVALID_ARGUMENT,
        "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED": ffi.RESOURCE_EXHAUSTED,
        "XLA_FFI_Error_Code_INTERNAL": ffi.INTERNAL,
        "XLA_FFI_DataType_F16": KINDS["float16"],
        "XLA_FFI_DataType_BF16": KINDS["bfloat16"],
        "XLA_FFI_DataType_F32": KINDS["float32"],
        "XLA_FFI_DataType_F64": KINDS["float64"],
        "sizeof(XLA_FFI_DataType)": ctypes.sizeof(ctypes.c_int),
        "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE": 1,
    }
    version = ("XLA_FFI_API_MAJOR", "XLA_FFI_API_MINOR")
    lines += [f'printf("%zu\\n", (size_t){name});' for name in (*numbers, *version)]
    source = tmp_path / "offsets.cpp"
    header = '#include <cstddef>\n#include <cstdio>\n#include "xla/ffi/api/c_api.h"\n'
    source.write_text(f"{header}int main() {{\n{chr(10).join(lines)}\n}}\n")
    program = tmp_path / "offsets"
    command = [host_build.compiler(), "-std=c++17", "-w", "-I", jax.ffi.include_dir(), source, "-o", program]
    subprocess.run(command, check=True)
    found = list(map(int, subprocess.run(program, capture_output=True, check=True).stdout.split()))
    ours = []
    for _, fields, structure in theirs:
        names = [field for field, _ in structure._fields_]
        if structure is ffi.Api:
            names = [*names[:5], "others", "get_stream"]
        assert len(names) == len(fields.split())
        ours += [getattr(structure, name).offset for name in names]
    assert found[:-2] == [*ours, *numbers.values()]
    assert tuple(found[-2:]) in ffi.VERSIONS
    assert ffi.NO_TRAITS & 1 == 0  # the first launch compiles, which may not be captured


class Call:
    """A call frame, its memory, and what XLA would see of it."""

    def __init__(self, words, out, request):
        self.errors, self.kept = [], []
        fields = dict(ffi.Api._fields_)
        self.api = ffi.Api(
            create_error=fields["create_error"](self.create_error),
            get_stream=fields["get_stream"](self.get_stream),
        )
        self.api.version.major, self.api.version.minor = 0, 3
        text = ctypes.create_string_buffer(request.encode())
        self.frame = ffi.CallFrame(api=ctypes.pointer(self.api), context=CONTEXT, stage=3)
        self.frame.operands.buffers = self.pointers(self.buffer(words))
        self.frame.results.buffers = self.pointers(self.buffer(out))
        self.frame.attributes.texts = self.pointers(ffi.Text(ctypes.addressof(text), len(text) - 1))
        self.kept.append(text)

    def buffer(self, array):
        """Of an array of NumPy, or of the stand-in for CuPy."""
        dims = (ctypes.c_int64 * len(array.shape))(*array.shape)
        self.kept.append((array, dims))
        address = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
        return ffi.Buffer(dtype=KINDS[array.dtype.name], data=address, rank=len(array.shape), dims=dims)

    def pointers(self, structure):
        array = (ctypes.POINTER(type(structure)) * 1)(ctypes.pointer(structure))
        self.kept.append((array, structure))
        return array

    def create_error(self, arguments):
        self.errors.append((arguments.contents.code, arguments.contents.message.decode()))
        return 0xE

    def get_stream(self, arguments):
        assert arguments.contents.context == CONTEXT
        arguments.contents.stream = STREAM
        return

    def run(self, platform):
        """By the address that XLA has; an error's, or None."""
        address = ctypes.cast(ffi.HANDLERS[platform], ctypes.c_void_p).value
        return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(self.frame))


def words_of(seeds, firsts):
    rows = [[s >> 32, s & 0xFFFFFFFF, f >> 32, f & 0xFFFFFFFF] for s, f in zip(seeds, firsts, strict=True)]
    return np.array(rows, np.uint32)


def request_of(shape, dtype, draw, stream=0):
    return ffi.write_spec(ffi.Spec(shape, stream, *find_sampling(draw, DTYPES[dtype])))


DRAWS = {
    "truncated normal": (draw_of(HE_NORMAL, 96, 40), gpuinit.he_normal),
    "uniform": (parse_uniform((0.3,)), partial(gpuinit.uniform, limit=0.3)),
    "normal": (parse_normal(0.3), partial(gpuinit.normal, stddev=0.3)),
    "uniform between": (parse_uniform((-1.0, 3.0)), partial(gpuinit.uniform, low=-1, high=3)),
    "normal between": (
        parse_normal(0.3, 1.0, -0.5, 3.0),
        partial(gpuinit.truncated_normal, stddev=0.3, mean=1, lower=-0.5, upper=3),
    ),
}
PLATFORMS = ("cpu", "CUDA")


@pytest.fixture(params=PLATFORMS)
def platform(request):
    """With functions that make memory there and read it."""
    if request.param == "cpu":
        return request.param, np.array, lambda shape, dtype: np.full(shape, 0xCA, dtype), np.asarray
    cupy = request.getfixturevalue("cupy_sim")

    def array(host):
        made = cupy.empty(host.shape, host.dtype)
        made.host[...] = host
        return made

    return request.param, array, cupy.empty, lambda made: made.host


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DRAWS)
def test_a_whole_and_a_part_and_a_batch(platform, name, dtype):
    where, array, empty, read = platform
    draw, fill = DRAWS[name]
    seeds = (SEED, 1, 2**64 - 1)
    request = request_of((96, 40), dtype, draw)
    whole = [fill((96, 40), seed=seed, dtype=dtype, device="cpu") for seed in seeds]
    parts = {(0, 0): (96, 40), (32, 0): (32, 40), (3, 7): (5, 11), (95, 39): (1, 1)}
    for (row, column), part in parts.items():
        for count in (None, 3):
            chosen = seeds[: count or 1]
            words = words_of(chosen, [row * 40 + column] * len(chosen))
            out = empty(part if count is None else (count, *part), DTYPES[dtype])
            call = Call(array(words[0] if count is None else words), out, request)
            assert call.run(where) is None
            made = read(out).reshape(-1, *part)
            for weights, expected in zip(made, whole, strict=False):
                index = np.s_[row : row + part[0], column : column + part[1]]
                assert weights.tobytes() == expected[index].tobytes()


def test_an_array_of_no_element_has_no_memory(platform):
    where, array, empty, _ = platform
    call = Call(array(words_of([SEED], [0])[0]), empty((0, 3), DTYPES["float32"]), "not even a request")
    call.frame.results.buffers[0].contents.data = None
    assert call.run(where) is None


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 4, 5)])
def test_any_number_of_axes(platform, shape):
    where, array, empty, read = platform
    out = empty(shape, DTYPES["float32"])
    request = request_of(shape, "float32", parse_normal(1.0), stream=2**64 - 3)
    assert Call(array(words_of([SEED], [0])[0]), out, request).run(where) is None
    whole = np.empty(shape, np.float32)
    spec = ffi.read_spec(request.encode(), whole.dtype)
    ffi.fill_host(request.encode(), words_of([SEED], [0])[0], whole)
    assert read(out).tobytes() == whole.tobytes()
    assert (spec.stream, spec.shape) == (2**64 - 3, shape)


def test_a_part_far_inside_of_a_huge_array(platform):
    """Beyond 2**32 elements; rows a huge stride apart."""
    where, array, empty, read = platform
    shape, index = (2**20, 3, 2**15), np.s_[2**19 + 1 : 2**19 + 4, 1:3, 5:12]
    first = ((2**19 + 1) * 3 + 1) * 2**15 + 5
    out = empty((3, 2, 7), DTYPES["bfloat16"])
    request = request_of(shape, "bfloat16", DRAWS["normal"][0])
    assert Call(array(words_of([SEED], [first])[0]), out, request).run(where) is None
    expected = gpuinit.normal(shape, 0.3, seed=SEED, dtype="bfloat16", device="cpu", index=index)
    assert read(out).tobytes() == expected.tobytes()


def test_cuda_runs_on_the_stream_of_xla_and_on_the_device_of_its_memory(cupy_sim):
    for device in (0, 1):
        with cupy_sim.cuda.Device(device):
            words, out = cupy_sim.empty((2, 4), np.uint32), cupy_sim.empty((2, 5, 3), np.float32)
        words.host[...] = words_of([7, 8], [0, 0])
        cupy_sim.launches.clear()
        assert Call(words, out, request_of((5, 3), "float32", DRAWS["normal"][0])).run("CUDA") is None
        assert [(number, stream.ptr) for number, stream in cupy_sim.launches] == [(device, STREAM)] * 2
        for made, seed in zip(out.host, (7, 8), strict=True):
            assert made.tobytes() == gpuinit.normal((5, 3), 0.3, seed=seed, device="cpu").tobytes()


def test_cuda_reads_the_key_on_the_device_when_the_kernel_runs(cupy_sim, monkeypatch):
    """What the words are is asked of no one before: they may be made by the kernel before this one."""
    words, out = cupy_sim.empty((4,), np.uint32), cupy_sim.empty((5, 3), np.float32)
    launch = cupy_sim.RawKernel.__call__

    def later(kernel, grid, block, arguments):
        words.host[...] = words_of([7], [0])[0]
        launch(kernel, grid, block, arguments)

    monkeypatch.setattr(cupy_sim.RawKernel, "__call__", later)
    assert Call(words, out, request_of((5, 3), "float32", DRAWS["uniform"][0])).run("CUDA") is None
    assert out.host.tobytes() == gpuinit.uniform((5, 3), 0.3, seed=7, device="cpu").tobytes()


def test_an_error_is_told_to_xla(platform, monkeypatch):
    where, array, empty, _ = platform
    out = empty((5, 3), DTYPES["float32"])
    fields = json.loads(request_of((5, 3), "float32", DRAWS["normal"][0]))
    call = Call(array(words_of([7], [0])[0]), out, json.dumps(fields | {"format": 3}))
    assert call.run(where) == 0xE
    message = "gpuinit: ValueError: the program must be made by a gpuinit of stream format 2, got 3"
    assert call.errors == [(ffi.INVALID_ARGUMENT, message)]
    call = Call(array(words_of([7], [0])[0]), out, json.dumps(fields))
    monkeypatch.setitem(ffi.ELEMENTS, KINDS["float32"], "float8")
    assert call.run(where) == 0xE
    assert call.errors == [(ffi.INTERNAL, "gpuinit: KeyError: 'float8'")]


def test_an_interrupt_while_an_error_is_told_is_one_more_error(platform, monkeypatch):
    where, array, empty, _ = platform

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ffi, "code_of", interrupted)
    call = Call(array(words_of([7], [0])[0]), empty((5, 3), DTYPES["float32"]), "not JSON")
    assert call.run(where) == 0xE
    assert call.errors == [(ffi.CANCELLED, "gpuinit: it was interrupted, or cannot tell its error")]


def test_an_interrupt_as_the_handler_begins_is_an_error(monkeypatch):
    """SIGINT is pending when XLA calls, raised and called without a step of Python in between."""
    out = np.full(15, 7, np.float32)
    call = Call(words_of([7], [0])[0], out, request_of((15,), "float32", DRAWS["normal"][0]))
    address = ctypes.cast(ffi.HANDLERS["cpu"], ctypes.c_void_p).value
    native = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
    interrupt = partial(getattr(ctypes.PyDLL(None), "raise"), signal.SIGINT)
    calls = [interrupt, partial(native, ctypes.addressof(call.frame))]
    assert list(map(operator.call, calls)) == [0, 0xE]
    assert call.errors == [(ffi.CANCELLED, "gpuinit: KeyboardInterrupt: ")]
    assert call.run("cpu") is None
    assert (out != 7).all()


def test_an_error_that_cannot_be_told_is_one_all_the_same(platform, monkeypatch):
    where, array, empty, _ = platform

    class MuteError(Exception):
        def __str__(self):
            raise ZeroDivisionError

    def fail(*_):
        raise MuteError

    monkeypatch.setattr(ffi, "read", fail)
    call = Call(array(words_of([7], [0])[0]), empty((5, 3), DTYPES["float32"]), "")
    assert call.run(where) == 0xE
    assert call.errors == [(ffi.CANCELLED, "gpuinit: it was interrupted, or cannot tell its error")]


def test_a_text_that_no_encoding_has_is_told(platform, monkeypatch):
    where, array, empty, _ = platform

    def fail(*_):
        raise ValueError("\udcff")

    monkeypatch.setattr(ffi, "read", fail)
    call = Call(array(words_of([7], [0])[0]), empty((5, 3), DTYPES["float32"]), "")
    assert call.run(where) == 0xE
    assert call.errors == [(ffi.INVALID_ARGUMENT, r"gpuinit: ValueError: \udcff")]


def test_a_cuda_stream_that_xla_does_not_give(cupy_sim, monkeypatch):
    monkeypatch.setattr(Call, "get_stream", lambda self, arguments: 0xE)
    call = Call(cupy_sim.empty((4,), np.uint32), cupy_sim.empty((5, 3), np.float32), "{}")
    assert call.run("CUDA") == 0xE
    assert call.errors == [(ffi.INTERNAL, "gpuinit: RuntimeError: XLA has no stream for the call")]


@pytest.mark.parametrize("version", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)])
def test_the_version_told_is_that_of_xla_and_one_that_is_not_known_is_a_problem(version, monkeypatch):
    monkeypatch.setattr(ffi, "problems", [])
    out = np.full(15, 7, np.float32)
    call = Call(words_of([7], [0])[0], out, request_of((15,), "float32", DRAWS["normal"][0]))
    call.api.version.major, call.api.version.minor = version
    metadata = ffi.Metadata(traits=77)
    extension = ffi.MetadataExtension(metadata=ctypes.pointer(metadata))
    extension.base.kind = ffi.METADATA
    call.frame.extension = ctypes.pointer(extension)
    assert call.run("cpu") is None
    assert (metadata.version.major, metadata.version.minor, metadata.traits) == (*version, ffi.NO_TRAITS)
    assert (out == 7).all()
    call.frame.extension = None
    if version in ffi.VERSIONS:
        assert ffi.problem() is None
        assert call.run("cpu") is None
        assert (out != 7).all()
        return
    assert ffi.problem().endswith(f"must have version 0.2, 0.3, got {version[0]}.{version[1]}")
    assert call.run("cpu") == 0xE
    assert call.errors == [(ffi.INTERNAL, f"gpuinit: RuntimeError: {ffi.problem()}")]


def test_a_handler_that_xla_cannot_call_leaves_the_callback(monkeypatch):
    assert traced.has_handler()
    monkeypatch.setattr(ffi, "problems", ["another version"])
    assert not traced.has_handler()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DRAWS)
def test_a_request_goes_through_its_text_unchanged(name, dtype):
    spec = ffi.Spec((3, 5), 2**64 - 1, *find_sampling(DRAWS[name][0], DTYPES[dtype]))
    text = ffi.write_spec(spec)
    found = ffi.read_spec(text.encode(), DTYPES[dtype])
    assert found == spec
    assert list(map(type, found.numbers)) == list(map(type, spec.numbers))
    assert [number.tobytes() for number in found.numbers] == [number.tobytes() for number in spec.numbers]
    assert text.isascii()
