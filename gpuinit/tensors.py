"""What a tensor of torch must be for its memory to be filled, whichever door it comes by: a function of
gpuinit.torch, or `out` of the core. And how all doors keep out of graphs.

torch is not imported here before there is a tensor of its.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")


def compiler_is_loaded() -> bool:
    return "torch._dynamo" in sys.modules


# torch.compile breaks its graph here, as at what it disables. It would walk, and guard, all of the modules.
compiler_is_loaded.__dict__.update(
    _torchdynamo_disable=True, _torchdynamo_disable_msg="a fill is in no graph"
)


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Let torch.compile break its graph at a function, and run it as it is, with all that it calls."""
    disabled: list[Callable[P, T]] = []

    @wraps(function)
    def call(*args: P.args, **words: P.kwargs) -> T:
        if not compiler_is_loaded():  # nor loaded by us
            return function(*args, **words)
        if not disabled:
            disabled.append(sys.modules["torch"].compiler.disable(function, reason="a fill is in no graph"))
        return disabled[0](*args, **words)

    return call


def is_tensor(value: object) -> bool:
    """Whether it is a tensor of torch, which is imported then."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def refuse_traced(value: Any, argument: str = "tensor") -> None:
    """Raise where the graph or the transform that is made would miss the fill, in silence."""
    import torch
    from torch.fx import _symbolic_trace
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    functorch = torch._C._functorch
    if (
        get_proxy_mode() is not None
        or torch.jit.is_tracing()
        or _symbolic_trace._is_fx_tracing_flag
        or misses_plain(value)
        or (is_tensor(value) and functorch.is_functorch_wrapped_tensor(value))
        # The tensors of XLA are functional ones always.
        or (is_tensor(value) and torch._is_functional_tensor(value) and is_addressed(value))
    ):
        raise RuntimeError(
            f"{argument} must be filled outside of what make_fx, torch.export, torch.func, torch.jit or "
            f"torch.fx traces, as a fill is no operation of torch's, got a traced {type(value).__name__}"
        )


def misses_plain(value: Any) -> bool:
    """Whether a transform of torch.func may miss what is written to a tensor that it has not wrapped.

    vmap alone does not: such a tensor is what all of the batch share.
    """
    import torch

    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        return False
    only_vmap = all(
        level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack()
    )
    return not (only_vmap and is_tensor(value))


def is_fake(tensor: Any) -> bool:
    """Whether it has no memory by design."""
    from torch._subclasses import FakeTensor

    return bool(tensor.is_meta) or isinstance(tensor, FakeTensor)


def is_wrapper(tensor: Any) -> bool:
    """Whether its values are what its class makes of operations, and not what memory of its own holds.

    On the devices that are filled by operations a class may be the device.
    """
    import torch

    if is_fake(tensor):
        return False
    kind = type(tensor)
    if hasattr(kind, "__tensor_flatten__"):
        return True
    if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or not is_addressed(tensor):
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # it has no memory, or a storage in name only
        return True
    return False


def is_addressed(tensor: Any) -> bool:
    """Whether it is written by its address, if at all."""
    return tensor.device.type in ("cpu", "cuda")


def refuse_placeholder(tensor: Any, argument: str = "tensor") -> None:
    """Raise where DeepSpeed's ZeRO-3 has taken a parameter's values apart, and left it empty."""
    whole = getattr(tensor, "ds_shape", None)
    if whole is not None and tensor.numel() < math.prod(whole):
        raise ValueError(
            f"{argument} must hold the whole parameter; {GATHER}, got shape {tuple(tensor.shape)} for "
            f"{tuple(whole)}"
        )


GATHER = "under ZeRO-3 fill it in deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)"


def refuse_missing_memory(tensor: Any, argument: str = "tensor") -> None:
    """Raise where there is no memory for all the elements: its storage was freed, or cut shorter, or all
    operations are faked.
    """
    import torch

    if tensor.numel() == 0 or is_fake(tensor) or is_wrapper(tensor) or not torch._C._has_storage(tensor):
        return  # a device without storages has operations of its own
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError(
            f"{argument} must be filled outside of a FakeTensorMode, or be made in it, got a real one inside"
        )
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held >= needed and is_addressed(tensor) and tensor.data_ptr() == 0:
        held = 0
    if held < needed:
        raise ValueError(
            f"{argument} must have memory for its elements; materialise it first (FSDP: unshard; offloaded: "
            f"load it), got {held} of {needed} bytes"
        )


def overlaps(tensor: Any) -> bool:
    """Whether two elements share memory."""
    if tensor.numel() < 2:
        return False
    axes = [axis for axis in zip(tensor.stride(), tensor.shape, strict=True) if axis[1] > 1]
    axes.sort()
    reach = 0
    for stride, length in axes:
        if stride <= reach:
            break
        reach += (length - 1) * stride
    else:
        return False  # each axis steps over all that those inside it reach
    if axes[0][0] == 0:
        return True
    # NumPy solves the rest exactly. Two elements differ first on some axis: of these two parts the one has 0
    # there, the other more, and the axes after it are free in both. Nothing is read.
    strides, lengths = zip(*axes[::-1], strict=True)
    places = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), lengths, strides)
    return any(
        np.shares_memory(places[(0,) * axis][:1], places[(0,) * axis][1:]) for axis in range(places.ndim)
    )


class Memory:
    """A tensor for NumPy, of any of its dtypes. torch's own array would bar its storage from being freed."""

    def __init__(self, tensor: Any, dtype: np.dtype) -> None:
        self.tensor = tensor  # kept as long as the array is
        size = dtype.itemsize
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), False),
        }


def as_numpy(tensor: Any) -> np.ndarray:
    """The same memory as a NumPy array."""
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    if tensor.numel() == 0:
        return np.empty(tuple(tensor.shape), dtype)
    return np.asarray(Memory(tensor, dtype)).view(dtype)


def check_out(tensor: Any) -> None:
    """Raise unless a fill of its memory, in one piece, is one of the tensor: for `out`."""
    refuse_traced(tensor, "out")
    refuse_placeholder(tensor, "out")
    if is_wrapper(tensor) or is_fake(tensor) or tensor.is_nested or str(tensor.layout) != "torch.strided":
        raise TypeError(
            "out must be a plain dense tensor with memory of its own; gpuinit.torch fills DTensors too, got "
            f"{type(tensor).__name__} of {tensor.layout} on {tensor.device}"
        )
    if tensor.is_quantized:
        raise TypeError(f"out must not be quantised, got {tensor.dtype}")
    if not is_addressed(tensor):
        raise TypeError(f"out must be on the CPU or a CUDA device; {ELSE}, got one on {tensor.device}")
    if tensor.requires_grad:
        raise TypeError(f"out must not require grad; {ELSE}, or give out.detach(), got a tensor that does")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(f"out must hold its values as they are; {ELSE}, got a view that negates them")
    refuse_missing_memory(tensor, "out")


ELSE = "use the functions of gpuinit.torch"
