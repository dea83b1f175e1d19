"""Compile CUDA C source for the host with g++, and run its kernels through ctypes."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

# -mfma where the machine can fuse: contraction must be off because the flag says so, not for want of it.
FUSING = ("-mfma",) if platform.machine() == "x86_64" else ()
CONTRACTION_OFF = "-ffp-contract=off"
CONTRACTION_ON = "-ffp-contract=fast"
FLUSH_TO_ZERO = "-DFLUSH_TO_ZERO"

KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\(\w+\))?\s*(\w+)\(')


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def build(source: str, *flags: str) -> ctypes.CDLL:
    """A shared library with launch_K and signature_K for every kernel K of the source."""
    exports = "\n".join(f"EXPORT({name})" for name in KERNEL.findall(source))
    unit = f'#include "host_cuda.h"\n{source}\n#include "host_launch.h"\n{exports}\n'
    folder = Path(tempfile.mkdtemp(prefix="gpuinit-host-"))
    (folder / "kernel.cpp").write_text(unit)
    command = [compiler(), "-std=c++17", "-O2", "-shared", "-fPIC", "-w", *FUSING]
    command += [CONTRACTION_OFF, *flags, "-I", str(HERE), "kernel.cpp", "-o", "kernel.so"]
    subprocess.run(command, check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    return library


def signature(library: ctypes.CDLL, name: str) -> str:
    """A letter each parameter: p pointer, v pointer to vectors of 16 bytes, I and Q unsigned 32 and 64 bits,
    i and q signed, f and d floats.
    """
    letters = ctypes.create_string_buffer(64)
    library[f"signature_{name}"](letters)
    return letters.value.decode()


def launch(
    library: ctypes.CDLL, name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: list
) -> None:
    """Run every thread. Arguments are ctypes values of the types in the signature."""
    three = ctypes.c_uint * 3
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    library[f"launch_{name}"](
        three(*grid, *(1,) * (3 - len(grid))), three(*block, *(1,) * (3 - len(block))), pointers
    )
