"""he_normal and its family: arguments in, one request to a backend out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpuinit import devices
from gpuinit.backends import cpu, cuda
from gpuinit.distributions import (
    GLOROT_NORMAL,
    GLOROT_UNIFORM,
    HE_NORMAL,
    HE_UNIFORM,
    LECUN_NORMAL,
    LECUN_UNIFORM,
    Draw,
    Recipe,
    draw_of,
    find_sampling,
    parse_normal,
    parse_recipe,
    parse_uniform,
)
from gpuinit.fans import Axes, fans
from gpuinit.stream import MAX_SIZE, Index, parse_index, parse_name, parse_seed, parse_shape, runs
from gpuinit.tensors import outside_graphs

Shape = SupportsIndex | Sequence[SupportsIndex]

DTYPES = {
    dtype.name: dtype for dtype in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))
}
UNMADE = object()  # as `out`: check everything, make nothing and return what would be drawn


@outside_graphs
def he_normal(
    shape: Shape,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Truncated He-normal weights, for layers followed by ReLU.

        std = sqrt(2 / fan_in)
        weight = (std / 0.87962566103423976) * z,  z from the unit normal truncated to [-2, 2]

    so that the weights themselves, after truncation, have mean 0 and standard deviation std. No weight is
    beyond +-bound, bound = 2 * std / 0.8796..., in the dtype's arithmetic; both ends can be reached (one
    weight in 3e7 in float32). The same draw as Keras's `HeNormal` and JAX's `he_normal`, not the same bits.

    A weight is a function of seed, name and its row-major index in `shape` alone. The same arguments give
    the same bits on every device, however the array is cut by `index`, in any order of calls.

    Args:
        shape: Shape of the whole array: an integer, or a sequence of integers >= 0, with fewer than 2**63
            elements.
        seed: An integer in [0, 2**64), or None for 64 fresh bits from the system. There is no global state:
            the same seed gives the same weights every time.
        name: Different names under one seed give independent weights; give each parameter of a model its
            own. None is a stream of its own.
        dtype: "float32", "float16", "bfloat16", "float64" or what `numpy.dtype` takes for them. None is the
            dtype of `out`, else float32. float16 and bfloat16 weights are the float32 ones rounded to
            nearest even.
        device: "cpu", "cuda", "cuda:1", a `cupy.cuda.Device`, or None for CUDA where it can be used and the
            CPU elsewhere. Where CUDA was asked for and cannot be used, the same weights are made on the CPU,
            with a `FallbackWarning` once a process.
        out: Array to fill and return instead of a new one: NumPy, CuPy, or anything that offers
            `__cuda_array_interface__`, DLPack or the buffer protocol. C-contiguous, writable, in the shape
            of the part made. On CUDA it is filled on CuPy's current stream.
        index: The part to make, as one basic index into `shape`: integers, slices of step 1, an Ellipsis.
            None is all of it. `he_normal(shape, index=i)` equals `he_normal(shape)[i]` and takes the memory
            of the part, and its time; rows of few elements take longer. Fans are those of the whole shape.
        in_axis: Axis or axes of the inputs, whose lengths make fan_in.
        out_axis: Axis or axes of the outputs, whose lengths make fan_out.
        batch_axis: Axis or axes that count for neither fan. Axes not named at all are the receptive field
            and multiply both. The defaults give Keras's fans: fan_in = shape[-2] * (product of the axes
            before it), and fan_in = n for shape (n,), 1 for shape (). A fan of 0 counts as 1.

    Returns:
        `numpy.ndarray` or `cupy.ndarray`, C-ordered, on the device; or `out`.

    Raises:
        TypeError, ValueError: An argument that cannot be used, before anything is made or written. So is a
            width with which a weight could be infinite in the dtype, or every weight would be 0.
        RuntimeError: `out` is on a CUDA device and CUDA cannot be used, or a tensor of torch in what traces.

    References:
        He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015, https://arxiv.org/abs/1502.01852;
        `keras.initializers.HeNormal`; the fans of `jax.nn.initializers.variance_scaling`.
    """
    return scaled(shape, HE_NORMAL, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def he_uniform(
    shape: Shape,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Uniform He weights, for layers followed by ReLU: standard deviation sqrt(2 / fan_in).

        limit = sqrt(6 / fan_in), uniform in [-limit, limit]; both ends can be reached

    The arguments, the result and the errors are those of `he_normal`.

    References: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015;
    `keras.initializers.HeUniform`.
    """
    return scaled(shape, HE_UNIFORM, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def glorot_normal(
    shape: Shape,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Truncated Glorot-normal weights, also called Xavier-normal.

        std = sqrt(2 / (fan_in + fan_out)), cut at +-2 * std / 0.87962566103423976

    The arguments, the result and the errors are those of `he_normal`.

    References: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010; `keras.initializers.GlorotNormal`.
    """
    return scaled(shape, GLOROT_NORMAL, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def glorot_uniform(
    shape: Shape,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Uniform Glorot weights, also called Xavier-uniform; the default of Keras's Dense and Conv layers.

        limit = sqrt(6 / (fan_in + fan_out)), uniform in [-limit, limit]; both ends can be reached

    The arguments, the result and the errors are those of `he_normal`.

    References: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010; `keras.initializers.GlorotUniform`.
    """
    return scaled(shape, GLOROT_UNIFORM, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def lecun_normal(
    shape: Shape,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Truncated LeCun-normal weights, for layers followed by SELU.

        std = sqrt(1 / fan_in), cut at +-2 * std / 0.87962566103423976

    The arguments, the result and the errors are those of `he_normal`.

    References: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998;
    `keras.initializers.LecunNormal`.
    """
    return scaled(shape, LECUN_NORMAL, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def lecun_uniform(
    shape: Shape,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Uniform LeCun weights.

        limit = sqrt(3 / fan_in), uniform in [-limit, limit]; both ends can be reached

    The arguments, the result and the errors are those of `he_normal`.

    References: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998;
    `keras.initializers.LecunUniform`.
    """
    return scaled(shape, LECUN_UNIFORM, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def variance_scaling(
    shape: Shape,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
) -> Any:
    """Weights of variance scale / fan: the general case of the six above.

        "truncated_normal"    std = sqrt(scale / fan), cut at +-2 * std / 0.87962566103423976
        "untruncated_normal"  std = sqrt(scale / fan)
        "uniform"             limit = sqrt(3 * scale / fan), in [-limit, limit]

    Args:
        scale: A finite number > 0.
        mode: "fan_in", "fan_out", "fan_avg", the mean of the two, or "fan_geo_avg", their geometric mean.
        distribution: One of the three above.

    The other arguments, the result and the errors are those of `he_normal`.

    References: `keras.initializers.VarianceScaling`, `jax.nn.initializers.variance_scaling`, whose "normal"
    is "untruncated_normal" here.
    """
    recipe = parse_recipe(scale, mode, distribution)
    return scaled(shape, recipe, seed, name, dtype, device, out, index, in_axis, out_axis, batch_axis)


@outside_graphs
def normal(
    shape: Shape,
    stddev: float = 0.05,
    mean: float = 0.0,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
) -> Any:
    """Weights of a normal distribution that is not cut, whatever the fans.

        weight = mean + stddev * z,  z from the unit normal

    The largest z is 6.34 in float32, where a weight comes of 32 random bits, and 9.16 in float64.

    Args:
        stddev: A finite number >= 0, or a 0-d array of any library; the default is Keras's. Where it is 0, or
            so small that the dtype has no other number between, all weights are the mean.
        mean: A finite number, likewise.

    The other arguments, the result and the errors are those of `he_normal`.

    References: `keras.initializers.RandomNormal`, `jax.nn.initializers.normal`, `torch.nn.init.normal_`.
    """
    return make(parse_shape(shape), parse_normal(stddev, mean), seed, name, dtype, device, out, index)


@outside_graphs
def truncated_normal(
    shape: Shape,
    stddev: float = 0.05,
    mean: float = 0.0,
    lower: float = -2.0,
    upper: float = 2.0,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
) -> Any:
    """Weights of a normal distribution that is cut at two bounds, whatever the fans.

        weight = mean + stddev * z,  z from the unit normal truncated to [lower, upper]

    stddev is that of the normal before it is cut, as in Keras and JAX; that of the weights is 0.8796 times as
    large with the default bounds. No weight is beyond mean + lower * stddev or mean + upper * stddev, in
    float32 before it is rounded to 16 bits. Bounds that are equal give the constant. Where no number of
    float32 (float64 for float64) lies between the two, all weights are the number nearest to their middle;
    where few do, there are few different weights.

    Args:
        stddev: A finite number >= 0, or a 0-d array of any library; the default is Keras's.
        mean: A finite number, likewise.
        lower: The lower bound in standard deviations from the mean, as in JAX; -infinity for none.
        upper: The upper bound, at least lower; infinity for none. Bounds of +-6.34 and more (9.16 in
            float64) cut nothing, and give the bits of `normal`.

    The other arguments, the result and the errors are those of `he_normal`, and

    Raises:
        ValueError: Bounds with less than 2**-93 of the normal's probability between them, or further out than
            its tail of 2**-64: some 6.2 standard deviations where one of them is infinite, 9.1 elsewhere.

    References: `keras.initializers.TruncatedNormal`, `jax.nn.initializers.truncated_normal`.
    """
    draw = parse_normal(stddev, mean, lower, upper)
    return make(parse_shape(shape), draw, seed, name, dtype, device, out, index)


@outside_graphs
def uniform(
    shape: Shape,
    *ends: float,
    low: float | None = None,
    high: float | None = None,
    limit: float | None = None,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
) -> Any:
    """Weights of a uniform distribution, whatever the fans. Both ends can be reached, or the number before.

        uniform(shape, limit)      in [-limit, limit]
        uniform(shape, low, high)  in [low, high]

    Args:
        *ends: One limit, or two ends; these have names too.
        low: A finite number, or a 0-d array of any library.
        high: A finite number >= low, likewise.
        limit: A finite number >= 0, likewise; the default is 0.05, that of Keras's `RandomUniform`.

    The other arguments, the result and the errors are those of `he_normal`.

    References: `keras.initializers.RandomUniform`, `torch.nn.init.uniform_`.
    """
    draw = parse_uniform(ends, low, high, limit)
    return make(parse_shape(shape), draw, seed, name, dtype, device, out, index)


def scaled(
    shape: Shape,
    recipe: Recipe,
    seed: SupportsIndex | None,
    name: str | None,
    dtype: npt.DTypeLike | None,
    device: object,
    out: Any,
    index: Index | None,
    in_axis: Axes,
    out_axis: Axes,
    batch_axis: Axes,
) -> Any:
    """What variance_scaling and the six above have in common. By place, as a keyword is slow to hand on."""
    parsed = parse_shape(shape)
    draw = draw_of(recipe, *fans(parsed, in_axis, out_axis, batch_axis))
    return make(parsed, draw, seed, name, dtype, device, out, index)


def make(
    shape: tuple[int, ...],
    draw: Draw,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    dtype: npt.DTypeLike | None = None,
    device: object = None,
    out: Any = None,
    index: Index | None = None,
) -> Any:
    """Check what is left to check, then fill one array."""
    key, stream = parse_seed(seed), parse_name(name)
    starts, lengths, part = parse_index(index, shape)
    wanted = None if dtype is None else parse_dtype(dtype)
    if out is None:
        made_of = DTYPES["float32"] if wanted is None else wanted
        sampling = find_sampling(draw, made_of)
        number = devices.resolve(device)
        if math.prod(part) * made_of.itemsize > MAX_SIZE:
            raise ValueError(f"shape must leave fewer than 2**63 bytes to make, got {shape}")
        backend = cpu if number is devices.CPU else cuda
        result = filled = backend.empty(part, made_of, number)
    elif out is UNMADE:
        find_sampling(draw, DTYPES["float32"] if wanted is None else wanted)
        return draw
    else:
        filled, number = adopt_out(out, part, wanted, device)
        sampling = find_sampling(draw, filled.dtype)
        backend = cpu if number is devices.CPU else cuda
        result = out
    if filled.size:
        backend.fill(filled, runs(shape, starts, lengths), (key, stream, *sampling))
    return result


def find_draw(function: Callable[..., Any], shape: Shape, **arguments: Any) -> Draw:
    """What a function of gpuinit, or a partial of one, would draw. Nothing is made, and all but
    device and out is checked as in the call.
    """
    draw: Draw = function(shape, out=UNMADE, **arguments)
    return draw


def parse_dtype(dtype: npt.DTypeLike) -> np.dtype:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    wanted = f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
    try:
        parsed = np.dtype(dtype)
    except Exception:  # it evaluates parts of strings, as that of "(1,", and what an object has as its dtype
        raise TypeError(wanted) from None
    if parsed not in DTYPES.values():
        raise ValueError(wanted)
    return parsed


def adopt_out(
    out: Any, part: tuple[int, ...], dtype: np.dtype | None, device: object
) -> tuple[Any, int | None]:
    """out as a NumPy or CuPy array, and its device, once it is known to suit."""
    array, number, writable = devices.adopt(out)
    if tuple(array.shape) != part:
        raise ValueError(f"out must have shape {part}, got {tuple(array.shape)}")
    if array.dtype not in DTYPES.values():
        raise ValueError(f"out must have dtype {', '.join(DTYPES)}, got {array.dtype}")
    if dtype is not None and array.dtype != dtype:
        raise ValueError(f"out must have dtype {dtype.name}, as asked, got {array.dtype.name}")
    if device is not None and not devices.agree(device, number):
        raise ValueError(
            f"out must be on {device!r}, as asked, got an array on {devices.describe_device(number)}"
        )
    if not array.flags.c_contiguous:
        raise ValueError("out must be C-contiguous, got an array with gaps or in another order")
    if not writable:
        raise ValueError("out must be writable, got a read-only array")
    if number is not devices.CPU and array.data.ptr % array.dtype.itemsize:
        raise ValueError(
            f"out must be aligned to its items on a CUDA device, got address {array.data.ptr:#x}"
        )
    return array, number
