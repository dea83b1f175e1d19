"""CuPy arrays, filled by kernels/fill.cu on the current CuPy stream of their device.

CuPy checks neither the number nor the type of a RawKernel's arguments: each scalar is given as the NumPy
type of its C parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from gpuinit import devices
from gpuinit.backends import Request
from gpuinit.kernel_files import read
from gpuinit.quantile import NORMAL
from gpuinit.stream import Run, walk

# --fmad=false: no product and sum become one operation, or the bits differ from NumPy's. The kernel spells
# every operation as an intrinsic that is never fused; this guards what someone may add.
OPTIONS = ("--fmad=false", "-std=c++17")

OFFLINE_ARCHITECTURE = 80  # that every NVRTC of CUDA 12 and 13 knows

OUTER_AXES = 4  # of a run that one launch walks along, as Strides in the kernel

THREADS_PER_BLOCK = 256  # BLOCK_SIZE in the kernel
MAX_GRID_Y = 65535


def empty(shape: tuple[int, ...], dtype: np.dtype, device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype)


def fill(out: Any, runs: Iterable[Run], request: Request) -> None:
    key, stream, distribution, numbers = request
    device, dtype = out.device, name(out.dtype)
    lanes = 16 // out.dtype.itemsize
    shifted = distribution >= NORMAL
    position = 0
    with device:
        # A key that is an array is read by the kernel when it runs.
        given, in_memory = (uint64(key), False) if type(key) is int else (key, True)
        shared = (given, uint64(stream), np.uint32(distribution), *numbers)
        for run, rows, strides in launches(runs):
            part, size = out, rows * run.length
            if size < out.size:
                part = out.reshape(-1)[position : position + size]
                position += size
            variant = dtype, shifted, in_memory, len(strides) > 1
            grid, block = launch_shape(run.length, rows, lanes, resident_blocks(device.id, *variant))
            numbers_of_run = map(uint64, (run.offset, run.length, rows, *strides))
            kernel(*variant)(grid, block, (part, *numbers_of_run, *shared))


def launches(runs: Iterable[Run]) -> Iterator[tuple[Run, int, tuple[int, ...]]]:
    """Each with the rows that one launch makes, and the kernel's Strides."""
    for run in runs:
        if not run.outer:
            yield run, run.rows, (run.row_stride,)
            continue
        inner, outer = run.outer[:OUTER_AXES], run.outer[OUTER_AXES:]
        inner += ((1, 0),) * (OUTER_AXES - len(inner))
        rows = run.rows * prod(length for length, _ in inner)
        for further in walk(outer):  # once, but for parts of seven axes and more
            at = run._replace(offset=run.offset + further)
            yield at, rows, (run.row_stride, run.rows, *chain.from_iterable(inner))


@lru_cache(maxsize=256)
def launch_shape(length: int, rows: int, lanes: int, most: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block: x over the packets of a row, y over the rows, at most `most` blocks."""
    packets = (length + 2 * lanes - 2) // lanes  # wherever the first one starts
    x = min(THREADS_PER_BLOCK, 1 << (packets.bit_length() - 1))
    y = THREADS_PER_BLOCK // x
    grid_x = min(packets // x, most)  # the few packets left over take a second turn
    grid_y = min(-(-rows // y), max(1, most // grid_x), MAX_GRID_Y)
    return (grid_x, grid_y), (x, y)


uint64 = lru_cache(maxsize=256)(np.uint64)  # the same few numbers in call after call


@cache
def kernel(dtype: str, shifted: bool = False, key_in_memory: bool = False, outer_axes: bool = False) -> Any:
    """The kernel for a dtype. CuPy compiles a source once for a device, for all of them."""
    import cupy

    return cupy.RawKernel(source(shifted, key_in_memory, outer_axes), f"fill_{dtype}", options=OPTIONS)


@cache
def name(dtype: np.dtype) -> str:
    """NumPy puts it together at every call."""
    return dtype.name


@cache
def resident_blocks(device: int, *variant: Any) -> int:
    """How many blocks of the kernel the device, which is current, holds at once.

    Blocks do equal work: were the grid any larger, the last of them would leave the device half idle.
    """
    import cupy

    loaded = kernel(*variant)
    try:
        loaded.compile()
    except Exception as error:  # of another compilation: devices.py has tried the first
        devices.refuse_passing(error)
        raise RuntimeError(devices.explain_kernel_error(error)) from error
    attributes = cupy.cuda.Device(device).attributes
    registers = -(-loaded.num_regs // 8) * 8 * THREADS_PER_BLOCK  # a thread gets them by eights
    on_one = min(
        attributes["MaxThreadsPerMultiProcessor"] // THREADS_PER_BLOCK,
        attributes["MaxRegistersPerMultiprocessor"] // registers,
    )
    return int(max(1, on_one) * attributes["MultiProcessorCount"])


@cache
def source(shifted: bool = False, key_in_memory: bool = False, outer_axes: bool = False) -> str:
    """kernels/fill.cu, for the distributions round 0, or for those that have more numbers and tables.

    With the key as a number, or where the kernel finds it in the device's memory; for runs without outer axes
    or with some.
    """
    code = read("fill.cu")
    if shifted:
        code = f"#define SHIFTED\n{read('normal_tables.cuh')}{code}"
    if outer_axes:
        code = f"#define OUTER_AXES\n{code}"
    return f"#define KEY_IN_MEMORY\n{code}" if key_in_memory else code


def compiler_options(architecture: int) -> tuple[str, ...]:
    """The options that CuPy gives to NVRTC for a RawKernel: OPTIONS, then its own, folders of headers first.

    RuntimeError where CuPy finds no headers of CUDA: this kernel needs none, but then CuPy compiles nothing.
    """
    from cupy._core import core

    options = (*OPTIONS, f"-arch=sm_{architecture}")
    # CuPy's own function, which it may rename.
    assemble = getattr(core, "assemble_cupy_compiler_options", lambda options: options)
    return (*assemble(options), "-ftz=true")


def compile_offline(code: str, options: tuple[str, ...]) -> tuple[bytes, str, str]:
    """The image, the PTX and the compiler's log of a kernel's source. NVRTC needs neither GPU nor driver."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(code, "fill.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            lines = nvrtc.getProgramLog(program).strip("\0\n ").splitlines()
            cause = next((line for line in lines if "error" in line), str(error))
            raise RuntimeError(cause) from error
        ptx = nvrtc.getPTX(program)
        log = nvrtc.getProgramLog(program).strip("\0\n ")
        return nvrtc.getCUBIN(program), ptx if isinstance(ptx, str) else ptx.decode(), log
    finally:
        nvrtc.destroyProgram(program)
