"""A stand-in for the parts of CuPy that gpuinit uses, for machines without a GPU.

Arrays live in host memory and kernels run in a host build of their own source. RawKernel refuses what the
real one would misread in silence: a Python number, a scalar of another type than its parameter's, a wrong
count, an array of another device or with gaps, or not aligned as the kernel reads it. Small launches run a
second time with subnormal numbers flushed, as on a device under CuPy's -ftz=true, and must give the same
bytes. There are two devices, so that choosing between them can be tested.
"""

from __future__ import annotations

import collections
import ctypes
import re
import types
from typing import Any, Self

import host_build
import numpy as np

__version__ = "0.0"  # of this stand-in

COUNT = 2
TWICE_UP_TO = 2**18  # bytes
MULTIPROCESSORS = 3  # odd and small: grids wrap round even in small tests

current = [0]
allocations: collections.deque[tuple[int, int, int]] = collections.deque(maxlen=1000)
current_stream: dict[int, list[ExternalStream]] = {}  # of every device, as in CuPy
launches: list[tuple[int, ExternalStream | None]] = []  # device and stream of every one


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class Device:
    attributes = {  # noqa: RUF012
        "MultiProcessorCount": MULTIPROCESSORS,
        "MaxThreadsPerMultiProcessor": 2048,
        "MaxRegistersPerMultiprocessor": 65536,
    }

    def __init__(self, number: int | None = None) -> None:
        self.id = current[-1] if number is None else int(number)

    def __enter__(self) -> Device:
        if not 0 <= self.id < COUNT:
            raise CUDARuntimeError(101)
        current.append(self.id)
        return self

    def __exit__(self, *error: object) -> None:
        current.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def synchronize(self) -> None:
        pass


class ExternalStream:
    """A stream of another library, by its address."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr, self.device_id = ptr, device_id  # -1: not known

    def __enter__(self) -> Self:
        self.device = current[-1]
        if self.device_id not in (-1, self.device):
            raise RuntimeError(f"the stream is of device {self.device_id}, device {self.device} is current")
        current_stream.setdefault(self.device, []).append(self)
        return self

    def __exit__(self, *error: object) -> None:
        current_stream[self.device].pop()


class Stream(ExternalStream):
    """The same, by the object that owns it."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        _, pointer = owner.__cuda_stream__()
        super().__init__(pointer)

    @classmethod
    def from_external(cls, owner: Any) -> Stream:
        return cls(owner)


class UnownedMemory:
    def __init__(self, ptr: int, size: int, owner: object, device_id: int) -> None:
        self.ptr, self.size, self.owner, self.device = ptr, size, owner, Device(device_id)


class MemoryPointer:
    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        assert offset == 0
        self.mem, self.device = mem, mem.device

    def as_host(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        memory = (ctypes.c_char * self.mem.size).from_address(self.mem.ptr)
        return np.frombuffer(memory, dtype).reshape(shape)


class ndarray:  # noqa: N801
    """A NumPy array that pretends to be on a device: it never turns into one by itself."""

    def __init__(self, host: Any, device: Any = None, memptr: MemoryPointer | None = None) -> None:
        if memptr is not None:  # as CuPy's own: shape, dtype, memory
            host, device = memptr.as_host(host, device), memptr.device
            self.memory = memptr.mem
        self.host = host
        self.device = device or Device()
        self.shape, self.dtype, self.size = host.shape, host.dtype, host.size
        self.flags = types.SimpleNamespace(c_contiguous=host.flags.c_contiguous)
        self.data = types.SimpleNamespace(ptr=host.ctypes.data)

    def reshape(self, *shape: int) -> ndarray:
        return ndarray(self.host.reshape(*shape), self.device)

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(self.host[index], self.device)

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self.host.view(dtype), self.device)

    def __dlpack__(self, **kwargs: Any) -> Any:
        """A capsule of its host memory, unversioned where the other library names no version, as CuPy's."""
        kwargs.pop("stream", None)
        return self.host.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device.id)  # kDLCUDA

    def __eq__(self, other: object) -> Any:
        return self.host == other.host if isinstance(other, ndarray) else NotImplemented

    @property
    def T(self) -> ndarray:  # noqa: N802
        return ndarray(self.host.T, self.device)

    def get(self) -> np.ndarray:
        return self.host.copy()

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self.host.__array_interface__, version=3, device=self.device.id)


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    host = np.empty(shape, dtype)
    host.reshape(-1).view(np.uint8).fill(0xCA)  # so that what is never written shows
    array = ndarray(host)
    allocations.append((host.ctypes.data, host.ctypes.data + max(host.nbytes, 1), array.device.id))
    return array


def asarray(array: Any, copy: bool | None = None) -> ndarray:
    """An array on the current device, as CuPy has it: one that is on another is copied."""
    interface = array.__cuda_array_interface__
    pointer, _ = interface["data"]
    interface = dict(interface, data=(pointer, False))  # CuPy does not heed that memory is read-only
    if pointerGetAttributes(pointer).device == current[-1]:
        return ndarray(np.asarray(types.SimpleNamespace(__array_interface__=interface, keep=array)))
    if copy is False:
        raise ValueError("Unable to avoid copy")
    return ndarray(np.array(types.SimpleNamespace(__array_interface__=interface, keep=array)))


def from_dlpack(array: Any) -> ndarray:
    """An array that shares the memory of another library's, on the current device."""
    assert array.device.id == current[-1]
    return ndarray(array.host, array.device)


def pointerGetAttributes(pointer: int) -> Any:  # noqa: N802
    for start, stop, device in reversed(allocations):
        if start <= pointer < stop:
            return types.SimpleNamespace(device=device)
    raise CUDARuntimeError(1)


SCALARS = {
    "I": (np.uint32, ctypes.c_uint32),
    "Q": (np.uint64, ctypes.c_uint64),
    "i": (np.int32, ctypes.c_int32),
    "q": (np.int64, ctypes.c_int64),
    "f": (np.float32, ctypes.c_float),
    "d": (np.float64, ctypes.c_double),
}


class RawKernel:
    num_regs = 46

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        self.code, self.name, self.options = code, name, options

    def compile(self) -> None:
        assert "--fmad=false" in self.options
        self.library = host_build.build(self.code)
        self.flushing = host_build.build(self.code, host_build.FLUSH_TO_ZERO)
        self.signature = host_build.signature(self.library, self.name)
        bounds = re.search(r"#define BLOCK_SIZE (\d+)", self.code)
        self.most_threads = int(bounds[1]) if bounds else 1024

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple) -> None:
        if not hasattr(self, "library"):
            self.compile()
        if not all(1 <= size < 2**31 for size in grid) or any(size > 65535 for size in grid[1:]):
            raise ValueError(f"a grid that no device takes: {grid}")
        if not all(size >= 1 for size in block) or np.prod(block) > self.most_threads:
            raise ValueError(f"a block that the kernel's launch bounds forbid: {block}")
        if len(arguments) != len(self.signature):
            raise TypeError(f"{self.name} takes {len(self.signature)} arguments, got {len(arguments)}")
        values = [self.convert(*pair) for pair in enumerate(zip(self.signature, arguments, strict=True))]
        launches.append((current[-1], (current_stream.get(current[-1]) or [None])[-1]))
        host_build.launch(self.library, self.name, grid, block, values)
        arrays = [argument.host for argument in arguments if isinstance(argument, ndarray)]
        if sum(array.nbytes for array in arrays) <= TWICE_UP_TO:
            before = [array.tobytes() for array in arrays]
            host_build.launch(self.flushing, self.name, grid, block, values)
            assert before == [array.tobytes() for array in arrays], "flushing changes the result"

    def convert(self, position: int, pair: tuple[str, Any]) -> Any:
        letter, argument = pair
        if letter in "pv":
            if not isinstance(argument, ndarray):
                raise TypeError(f"argument {position} must be an array, got {type(argument)}")
            if argument.device.id != current[-1]:
                raise ValueError("the array is not on the current device")
            if not argument.flags.c_contiguous:
                raise ValueError("the array has strides, which RawKernel ignores")
            if letter == "v" and argument.data.ptr % 16:
                raise ValueError("the array is not aligned to the 16 bytes that are read at once")
            return ctypes.c_void_p(argument.host.ctypes.data)
        numpy_type, ctypes_type = SCALARS[letter]
        if type(argument) is not numpy_type:
            raise TypeError(f"argument {position} must be {numpy_type}, got {type(argument)}")
        return ctypes_type(argument.item())


runtime = types.SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=lambda: COUNT,
    getDevice=lambda: current[-1],
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 13000,
    getDeviceProperties=lambda number: {
        "name": b"Simulated",
        "major": 9,
        "minor": 0,
        "totalGlobalMem": 2**30 * (number + 1),
    },
    pointerGetAttributes=pointerGetAttributes,
)
nvrtc = types.SimpleNamespace(getVersion=lambda: (13, 0))
cuda = types.SimpleNamespace(
    Device=Device,
    ExternalStream=ExternalStream,
    MemoryPointer=MemoryPointer,
    Stream=Stream,
    UnownedMemory=UnownedMemory,
    get_cuda_path=lambda: None,
    nvrtc=nvrtc,
    runtime=runtime,
)
