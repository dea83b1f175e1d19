"""Which device: the one place that tries CuPy, and the fallback where CUDA cannot be used.

A device is None for the CPU, or the number of a CUDA device.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from functools import cache
from typing import Any

import numpy as np

from gpuinit import tensors
from gpuinit.limits import free_address_space
from gpuinit.loading import can_load, loading, place_of

CPU = None

INSTALL = 'pip install "gpuinit[cuda12]" (or "gpuinit[cuda13]")'

# cudaError_t values that getDeviceCount returns on hosts without a usable device.
INITIALIZATION_ERROR = 3
INSUFFICIENT_DRIVER = 35
NO_DEVICE = 100

# Address space, in bytes: twice what importing CuPy 14 takes (871 MiB of VmPeak on x86-64 Linux), so
# that a limit leaves as much for the weights. Otherwise a process that never asked for CUDA ran out of it.
ROOM_FOR_CUPY = 2**31

# DLDeviceType (dlpack.h).
DLPACK_CPU = (1, 3)  # host memory, pinned host memory
DLPACK_CUDA = (2, 13)  # device memory, managed memory
NOT_ADOPTED = (TypeError, ValueError, AttributeError, BufferError, RuntimeError)  # what libraries raise

fallback_warned = False


class FallbackWarning(UserWarning):
    """CUDA was asked for and cannot be used here; the same weights are made on the CPU."""


def resolve(device: object) -> int | None:
    """The device to use; with a FallbackWarning, once a process, where CUDA was asked for in vain."""
    if device is None:
        return current_cuda_device() if cuda_problem() is None else CPU
    if isinstance(device, str) and device == "cpu":
        return CPU
    number = parse_cuda_device(device)
    problem = cuda_problem()
    if problem is not None:
        warn_of_fallback(problem)
        return CPU
    if number is None:
        return current_cuda_device()
    count = cuda_device_count()
    if number >= count:
        raise ValueError(f"device must be one of cuda:0 to cuda:{count - 1}, got {device!r}")
    return number


def parse_cuda_device(device: object) -> int | None:
    """The number of the CUDA device named, None for the current one."""
    if isinstance(device, str):
        if device == "cuda":
            return None
        match = re.fullmatch(r"cuda(?::(\d+))?", device, re.ASCII)
        if match:
            return None if match[1] is None else int(match[1])
        raise ValueError(f'device must be None, "cpu", "cuda" or "cuda:N", got {device!r}')
    if isinstance(device, cupy_device_type()):
        return int(device.id)
    raise TypeError(f'device must be None, "cpu", "cuda", "cuda:N" or a cupy.cuda.Device, got {device!r}')


def cupy_device_type() -> Any:
    """() before CuPy is imported. What is imported may be another module of the name, or None."""
    kind = getattr(getattr(sys.modules.get("cupy"), "cuda", None), "Device", None)
    return kind if isinstance(kind, type) else ()


def warn_of_fallback(problem: str) -> None:
    global fallback_warned
    if not fallback_warned:
        warnings.warn(
            f"CUDA cannot be used, so the same weights are made on the CPU: {problem}",
            FallbackWarning,
            stacklevel=find_stack_level(),
        )
        fallback_warned = True  # not reached where the warning is an error: it stays one


def find_stack_level() -> int:
    """The stack level, for warnings.warn in the caller, of the first frame outside this package."""
    level = 1
    frame = sys._getframe(1)
    ours = ("gpuinit.", "torch._dynamo.")  # that keeps us out of graphs
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(ours):
        frame = frame.f_back
        level += 1
    return level


def cuda_problem() -> str | None:
    """Why CUDA cannot be used in this process, with the remedy; None where it can."""
    try:
        return find_cuda_problem(os.getpid())  # a forked child must look anew
    except NotNowError as error:
        return str(error)


class NotNowError(Exception):
    """Why CUDA cannot be looked for now: another time it may, so that this is not remembered."""


@cache
def find_cuda_problem(process: int) -> str | None:
    if not can_load("cupy"):
        raise NotNowError(
            "an import that another thread had begun as this process was forked, or that a signal stopped, "
            'is not over, so importing CuPy may never end. Use the "spawn" start method of multiprocessing, '
            "or fork before or after"
        )
    free = free_address_space()
    if "cupy" not in sys.modules and free < ROOM_FOR_CUPY:
        raise NotNowError(
            f"CuPy needs {ROOM_FOR_CUPY >> 20} MiB of address space, and the limit of this process leaves "
            f"{max(0, int(free)) >> 20}. Raise the limit (ulimit -v, ulimit -d)"
        )
    with loading("cupy"):
        try:
            import cupy
        except ImportError as error:
            if error.name == "cupy":
                return f"CuPy is not installed. To install it: {INSTALL}"
            return f"importing CuPy failed ({describe(error)}). To reinstall it: {INSTALL}"
        except OSError as error:  # CuPy makes its cache directory when imported
            return (
                f"importing CuPy failed ({describe(error)}). "
                "Set CUPY_CACHE_DIR to a directory that can be written"
            )
        except Exception as error:
            return f"importing CuPy failed ({describe(error)}). To reinstall it: {INSTALL}"
        if not is_cupy(cupy):
            return (
                f"the cupy that Python finds is not CuPy ({place_of(cupy)}). "
                f"To use CUDA, rename that, and install CuPy: {INSTALL}"
            )
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return explain_runtime_error(cupy, error)
        except Exception as error:
            return f"CuPy does not answer ({describe(error)}). To reinstall it: {INSTALL}"
        if count == 0:
            return "there is no CUDA device. Check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return find_kernel_problem(cupy)


def is_cupy(module: Any) -> bool:
    """Whether it has what tells about CUDA: not so a folder of this name, or what is left of a CuPy."""
    runtime = getattr(getattr(module, "cuda", None), "runtime", None)
    return isinstance(getattr(runtime, "CUDARuntimeError", None), type)


def explain_runtime_error(cupy: Any, error: Any) -> str:
    status = error.status
    if status == INSUFFICIENT_DRIVER and cupy.cuda.runtime.driverGetVersion() == 0:
        return "there is no NVIDIA driver. Install one, or run the container with --gpus all"
    if status == INSUFFICIENT_DRIVER:
        driver = cupy.cuda.runtime.driverGetVersion()
        return (
            f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10} only, "
            "too old for this CuPy. Update the driver, or install a CuPy for an older CUDA"
        )
    if status == NO_DEVICE:
        return "there is no CUDA device. Check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if status == INITIALIZATION_ERROR:
        return (
            "CUDA does not start. In a process forked from one that uses CUDA it never does: "
            'use the "spawn" start method of multiprocessing. Elsewhere check nvidia-smi'
        )
    return f"CUDA does not start ({describe(error)}). Check nvidia-smi"


def find_kernel_problem(cupy: Any) -> str | None:
    """Compile and load the kernel, so that whatever is missing for it shows here and not in a fill."""
    from gpuinit.backends import cuda

    try:
        cuda.kernel("float32").compile()
    except Exception as error:
        refuse_passing(error)
        return explain_kernel_error(error)
    return None


def refuse_passing(error: Exception) -> None:
    """Raise what passes, and must not be remembered."""
    if "out of memory" in str(error).lower():
        raise MemoryError(f"the CUDA device has no memory left for the kernel ({describe(error)})") from error
    if "captur" in str(error).lower():
        raise RuntimeError(
            f"the kernel cannot be loaded while a CUDA graph is captured ({describe(error)}). "
            "Make an array of this distribution on the device before the capture"
        ) from error


def explain_kernel_error(error: Exception) -> str:
    """Why the kernel cannot be compiled or loaded, with the remedy."""
    if "headers" in str(error) or "nvrtc" in str(error).lower():
        return f"CUDA's compiler or headers are missing ({describe(error)}). To install: {INSTALL}"
    if isinstance(error, OSError):
        return (
            f"the kernel cannot be cached ({describe(error)}). "
            "Set CUPY_CACHE_DIR to a directory that can be written"
        )
    return (
        f"the kernel does not compile or load ({describe(error)}). "
        f"The CUDA version of CuPy may not fit this device: {INSTALL}"
    )


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def current_cuda_device() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def cuda_device_count() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def adopt(out: Any) -> tuple[Any, int | None, bool]:
    """out as a NumPy or CuPy array on the same memory, its device, and whether it may be written."""
    if tensors.is_tensor(out):
        tensors.check_out(out)
    try:
        if isinstance(out, np.ndarray):
            return host(np.asarray(out))  # the data of a subclass, whatever it masks
        if tensors.is_tensor(out) and out.device.type == "cpu":  # its DLPack has no bfloat16 for NumPy
            return host(tensors.as_numpy(out))
        if hasattr(out, "__dlpack__"):  # first, as the CUDA array interface has no bfloat16
            kind, number = out.__dlpack_device__()
            if kind in DLPACK_CPU:
                return host(np.from_dlpack(out))
            on_cuda = kind in DLPACK_CUDA
        else:
            on_cuda, number = hasattr(out, "__cuda_array_interface__"), None
        if not on_cuda:
            return host(np.asarray(memoryview(out)))
    except NOT_ADOPTED as error:
        raise not_an_array(out, error) from error
    problem = cuda_problem()
    if problem is not None:
        raise RuntimeError(f"out is on a CUDA device, but CUDA cannot be used: {problem}")
    try:
        return adopt_cuda(out, number)
    except NOT_ADOPTED as error:
        raise not_an_array(out, error) from error


def not_an_array(out: Any, error: Exception) -> TypeError:
    return TypeError(
        "out must be a NumPy or CuPy array, or offer DLPack, __cuda_array_interface__ or the "
        f"buffer protocol, got {type(out).__name__} ({describe(error)})"
    )


def host(array: np.ndarray) -> tuple[np.ndarray, None, bool]:
    return array, CPU, array.flags.writeable


def adopt_cuda(out: Any, number: int | None) -> tuple[Any, int, bool]:
    """The same for out on a CUDA device: that of this number, where DLPack has told.

    CuPy takes an array of another library as one on the current device, and copies where it is on another.
    CuPy does not heed that memory is read-only.
    """
    import cupy

    interface: dict[str, Any] | None = getattr(out, "__cuda_array_interface__", None)
    if isinstance(out, cupy.ndarray):
        array = out
    elif number is not None:
        with cupy.cuda.Device(number):
            array = cupy.from_dlpack(out)
    else:
        pointer = out.__cuda_array_interface__["data"][0]
        number = cupy.cuda.runtime.pointerGetAttributes(pointer).device if pointer else None
        with cupy.cuda.Device(number):
            array = cupy.asarray(out, copy=False)
    return array, int(array.device.id), interface is None or not interface["data"][1]


def describe_device(device: int | None) -> str:
    """The device as users write it."""
    return "cpu" if device is CPU else f"cuda:{device}"


def agree(asked: object, device: int | None) -> bool:
    """Whether an array on device is where it was asked for; "cuda" is any CUDA device."""
    resolved = resolve(asked)
    return resolved == device or (asked == "cuda" and CPU not in (resolved, device))
