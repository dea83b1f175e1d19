"""A checked request to the memory of a tensor: its layout, its device, its shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from operator import mul
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import nn

from gpuinit import devices
from gpuinit.backends import Request, cpu, cuda
from gpuinit.distributions import Draw, find_sampling
from gpuinit.initializers import DTYPES
from gpuinit.stream import Run, parse_name, parse_seed, row_major, strided_runs
from gpuinit.tensors import (
    GATHER,
    as_numpy,
    is_fake,
    is_wrapper,
    overlaps,
    refuse_missing_memory,
    refuse_placeholder,
    refuse_traced,
)
from gpuinit.torch.shards import is_dtensor, memory, parts

SCRATCH = 2**21  # elements, for what cannot be written where it lies

# initialize_ reads here the standard deviation that an initialiser gave, for its report.
recorded_stds: ContextVar[list[float] | None] = ContextVar("recorded_stds", default=None)

# initialize_ has all checked by what it calls, before anything is written.
checking: ContextVar[bool] = ContextVar("checking", default=False)

# A recipe that runs in `streams`: what is filled without a seed takes its stream from there.
within: ContextVar[Any] = ContextVar("within", default=None)

TORCH_DTYPES = {getattr(torch, name): dtype for name, dtype in DTYPES.items()}


def check(tensor: Any) -> None:
    """Raise unless it is a tensor, or a DTensor of such, that can be filled and keeps what is filled in."""
    check_fillable(tensor)
    refuse_computed(tensor)


def check_fillable(tensor: Any) -> None:
    """Raise unless it is a tensor, or a DTensor of such, that can be filled."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    refuse_traced(tensor)
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise TypeError(
            "tensor must have a shape; run the lazy module once before, got an uninitialized parameter"
        )
    refuse_placeholder(tensor)
    tensor = memory(tensor)
    if is_wrapper(tensor):
        raise TypeError(f"tensor must be a plain tensor or a DTensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"tensor must be dense, got layout {tensor.layout}")
    if tensor.is_nested:
        raise TypeError("tensor must be dense, got a nested one")
    if tensor.dtype not in TORCH_DTYPES:
        raise TypeError(f"tensor must have dtype {', '.join(DTYPES)}, got {tensor.dtype}")
    if overlaps(tensor):
        raise ValueError(
            "tensor must not hold elements that share memory, as an expanded one does; fill it before, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    refuse_missing_memory(tensor)


def refuse_computed(tensor: torch.Tensor) -> None:
    """Raise where autograd knows that it is computed from others, and will be again without the fill.

    What was computed under no_grad looks like any other tensor.
    """
    owner = tensor if tensor._base is None else tensor._base
    if not (tensor.is_leaf or owner.is_leaf):
        raise ValueError(
            "tensor must be a leaf or a view of one, as what is computed from others is computed anew; fill "
            "these (weight_g and weight_v, weight_orig, parametrizations.weight.original), got the result of "
            f"{owner.grad_fn.name()}"
        )


# What a module of torch makes the shapes of its parameters from.
SIZES = {
    nn.Linear: ("out_features", "in_features"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
    nn.modules.conv._ConvNd: ("out_channels", "in_channels", "kernel_size"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
    nn.MultiheadAttention: ("embed_dim",),
    nn.RNNBase: ("input_size", "hidden_size"),
    nn.RNNCellBase: ("input_size", "hidden_size"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.LayerNorm: ("normalized_shape",),
    nn.RMSNorm: ("normalized_shape",),
    nn.PReLU: ("num_parameters",),
}


# What torch calls them, plain, pruned or normalised by a hook: a class derived from its own may add others.
NAMES = re.compile(r"((in|q|k|v)_proj_)?(weight|bias)(_(ih|hh|hr)(_l\d+(_reverse)?)?|_k|_v)?(_g|_v|_orig)?")


def check_owned(parameter: Any, owner: nn.Module, name: str) -> None:
    """Raise where a parameter of a model has no memory for what it should hold, whatever would fill it.

    Under ZeRO-3 it is of shape (0,), whether or not it still has DeepSpeed's attributes: then its module
    tells that it has elements.
    """
    refuse_traced(parameter)
    refuse_placeholder(parameter)
    own = name.rpartition("parametrizations.")[2].partition(".")[0]
    own = own if ".parametrizations." in f".{name}" else name.rpartition(".")[2]
    if tuple(parameter.shape) == (0,) and NAMES.fullmatch(own):
        sizes = [
            size
            for kind, words in SIZES.items()
            if isinstance(owner, kind)
            for word in words
            for size in np.ravel(getattr(owner, word, 0))
        ]
        if sizes and all(sizes):
            raise ValueError(f"module must hold whole parameters; {GATHER}, got shape (0,)")
    if memory(parameter).layout is torch.strided:
        refuse_missing_memory(memory(parameter))


def fill(
    tensor: torch.Tensor,
    draw: Draw,
    seed: SupportsIndex | None,
    name: str | None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Check what is left to check, then fill a tensor that passed `check`."""
    stream = parse_name(name)
    recipe = within.get()
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be None or a torch.Generator, got {generator!r}")
    if seed is not None:
        parse_seed(seed)
        if generator is not None:
            raise ValueError(f"generator must be None where a seed is given, got {generator!r}")
    elif recipe is not None and not checking.get():
        return recipe.draw_given(tensor, draw)
    elif is_dtensor(tensor):
        raise ValueError("seed must be given for a DTensor, the same on every rank, got None")
    sampling = find_sampling(draw, TORCH_DTYPES[tensor.dtype])
    stds = recorded_stds.get()
    if stds is not None:
        stds.append(draw.std())
    with torch.no_grad():
        local, places = parts(tensor)
        if local.numel() == 0 or is_fake(local):
            return tensor
        has_kernel(local.device)  # where its warning is an error, nothing is written yet
        if checking.get():
            return tensor
        if recipe is not None:
            recipe.expect_given(tensor)
        key = parse_seed(draw_seed(generator) if seed is None else seed)
        strides = row_major(tuple(tensor.shape))
        for part, starts in places:
            fill_part(part, sum(map(mul, starts, strides)), strides, (key, stream, *sampling))
        torch.autograd.graph.increment_version([tensor, local])
        if recipe is not None:
            recipe.note_given(tensor, draw)
    return tensor


def draw_seed(generator: torch.Generator | None = None) -> int:
    """64 bits from a generator, or from torch's default CPU generator."""
    device = "cpu" if generator is None else generator.device
    halves = torch.randint(2**32, (2,), dtype=torch.int64, device=device, generator=generator)
    low, high = halves.tolist()
    return int(low | high << 32)


def fill_part(
    tensor: torch.Tensor,
    offset: int,
    strides: tuple[int, ...],
    request: Request,
    dtype: torch.dtype | None = None,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Fill a tensor whose element i is element offset + sum(i * strides) of the whole.

    With finish, from what it makes of weights of another dtype.
    """
    here = has_kernel(tensor.device)
    if here and finish is None and tensor.is_contiguous() and not tensor.is_neg():
        write(tensor, strided_runs(offset, tuple(tensor.shape), strides), request)
        return
    size, dtype = min(SCRATCH, tensor.numel()), dtype or tensor.dtype
    scratch = tensor.new_empty(size, dtype=dtype) if here else torch.empty(size, dtype=dtype, device="cpu")
    for piece, place in pieces(tensor, offset, strides):
        made = scratch[: piece.numel()]
        write(made, strided_runs(place, tuple(piece.shape), strides), request)
        # From the host it waits, so that what is sent is not made anew meanwhile.
        piece.copy_((made if finish is None else finish(made)).view(piece.shape))


def pieces(tensor: torch.Tensor, offset: int, strides: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, int]]:
    """Cut a tensor across its axes, the outermost first, into pieces that fit the scratch."""
    if tensor.numel() <= SCRATCH:
        yield tensor, offset
        return
    axis, length = next((axis, length) for axis, length in enumerate(tensor.shape) if length > 1)
    step = max(1, SCRATCH * length // tensor.numel())
    for first in range(0, length, step):
        piece = tensor.narrow(axis, first, min(step, length - first))
        yield from pieces(piece, offset + first * strides[axis], strides)


def has_kernel(device: torch.device) -> bool:
    """Whether a tensor is written where it lies. Any other device is sent what the CPU made."""
    if device.type == "cpu":
        return True
    if (
        device.type != "cuda" or torch.version.hip is not None
    ):  # the kernel's bits are promised for CUDA alone
        return False  # no warning, as there is no remedy
    problem = devices.cuda_problem()
    if problem is not None:
        devices.warn_of_fallback(problem)
    return problem is None


def write(tensor: torch.Tensor, elements: Iterable[Run], request: Request) -> None:
    """Fill a C-contiguous tensor on a device that has a kernel, on torch's stream."""
    flat = tensor.view(-1)
    if tensor.device.type == "cpu":
        cpu.fill(as_numpy(flat), elements, request)
        return
    import cupy

    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(tensor.device))
    with cupy.cuda.Device(tensor.device.index), stream:
        cuda.fill(cupy_array(flat), elements, request)


def cupy_array(flat: torch.Tensor) -> Any:
    """The same memory as a CuPy array, which keeps the tensor alive."""
    import cupy

    size = flat.numel() * flat.element_size()
    memory = cupy.cuda.UnownedMemory(flat.data_ptr(), size, flat, flat.device.index)
    return cupy.ndarray((flat.numel(),), TORCH_DTYPES[flat.dtype], cupy.cuda.MemoryPointer(memory, 0))
