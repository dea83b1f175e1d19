"""he_normal_ and its family: a tensor and arguments in, the tensor filled."""

from __future__ import annotations

from typing import SupportsIndex

import torch

from gpuinit.fans import DEFAULT_AXES, Axes
from gpuinit.initializers import parse_number, parse_scaling
from gpuinit.torch.fill import check, fill

TORCH_AXES = (1, 0, ())


def he_normal_(
    tensor: torch.Tensor,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with truncated He-normal weights, for layers followed by ReLU.

        std = sqrt(2 / fan_in)
        weight = (std / 0.87962566103423976) * z,  z from the unit normal truncated to [-2, 2]

    so that the weights, after truncation, have standard deviation std, and none is beyond 2 * std / 0.8796...
    The bits are those of `gpuinit.he_normal` for the same shape, seed, name and axes.

    The tensor is filled where it lies, in one pass: on the CPU, or on its CUDA device on torch's current
    stream, without waiting for it. A layout that is not C-contiguous (channels last, a transpose, a slice)
    gets the same value at the same index, through a scratch of at most 2**21 elements. A DTensor is filled
    from its place in the whole tensor, and with the fans of the whole tensor: each rank makes its own shard
    and no collective is called. Tensors on the meta device, and fake ones, are left alone.

    Args:
        tensor: float32, float16, bfloat16 or float64, of any shape. May require grad: nothing is recorded,
            and the version counter is raised.
        seed: An integer in [0, 2**64). The same seed gives the same weights every time. None draws 64 bits
            from torch's default CPU generator, which `torch.manual_seed` governs; a DTensor needs a number,
            as the generators of the ranks may differ.
        name: Different names under one seed give independent weights; give each parameter of a model its
            own. None is a stream of its own.
        in_axis: Axis or axes of the inputs, whose lengths make fan_in.
        out_axis: Axis or axes of the outputs, whose lengths make fan_out.
        batch_axis: Axis or axes that count for neither fan, such as that of stacked experts. Axes not named
            at all are the receptive field and multiply both. The defaults are torch's layout, (out, in,
            *kernel), right for grouped and depthwise convolutions as well, whose axis 1 is in / groups.
            The weight of a transposed convolution is (in, out, *kernel): in_axis=0, out_axis=1. As in Keras,
            a shape (n,) has fans n, and () has fans 1. A fan of 0 counts as 1.

    Returns:
        The tensor.

    Raises:
        TypeError, ValueError: An argument that cannot be used, before anything is written: a sparse,
            quantised, complex or integer tensor, one whose elements share memory, a Partial DTensor.
        RuntimeError: The tensor is on a CUDA device, and CuPy or what it needs is missing.

    References: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015; `gpuinit.he_normal`.
    `torch.nn.init.kaiming_normal_` is not truncated.
    """
    return variance_scaling_(
        tensor,
        2.0,
        "fan_in",
        "truncated_normal",
        seed=seed,
        name=name,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
    )


def he_uniform_(
    tensor: torch.Tensor,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with uniform He weights: in [-limit, limit], limit = sqrt(6 / fan_in).

    The arguments, the result and the errors are those of `he_normal_`.

    References: He et al., ICCV 2015; `gpuinit.he_uniform`; `torch.nn.init.kaiming_uniform_` with its
    default gain.
    """
    return variance_scaling_(
        tensor,
        2.0,
        "fan_in",
        "uniform",
        seed=seed,
        name=name,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
    )


def glorot_normal_(
    tensor: torch.Tensor,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with truncated Glorot-normal weights: std = sqrt(2 / (fan_in + fan_out)).

    The arguments, the result and the errors are those of `he_normal_`.

    References: Glorot, Bengio, AISTATS 2010; `gpuinit.glorot_normal`. `torch.nn.init.xavier_normal_` is not
    truncated.
    """
    return variance_scaling_(
        tensor,
        1.0,
        "fan_avg",
        "truncated_normal",
        seed=seed,
        name=name,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
    )


def glorot_uniform_(
    tensor: torch.Tensor,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with uniform Glorot weights: limit = sqrt(6 / (fan_in + fan_out)).

    The arguments, the result and the errors are those of `he_normal_`.

    References: Glorot, Bengio, AISTATS 2010; `gpuinit.glorot_uniform`; `torch.nn.init.xavier_uniform_`.
    """
    return variance_scaling_(
        tensor,
        1.0,
        "fan_avg",
        "uniform",
        seed=seed,
        name=name,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
    )


def lecun_normal_(
    tensor: torch.Tensor,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with truncated LeCun-normal weights: std = sqrt(1 / fan_in).

    The arguments, the result and the errors are those of `he_normal_`.

    References: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998; `gpuinit.lecun_normal`.
    """
    return variance_scaling_(
        tensor,
        1.0,
        "fan_in",
        "truncated_normal",
        seed=seed,
        name=name,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
    )


def lecun_uniform_(
    tensor: torch.Tensor,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with uniform LeCun weights: limit = sqrt(3 / fan_in).

    The arguments, the result and the errors are those of `he_normal_`.

    References: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998; `gpuinit.lecun_uniform`.
    """
    return variance_scaling_(
        tensor,
        1.0,
        "fan_in",
        "uniform",
        seed=seed,
        name=name,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
    )


def variance_scaling_(
    tensor: torch.Tensor,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> torch.Tensor:
    """Fill a tensor with weights of variance scale / fan: the general case of the six above.

        "truncated_normal"  std = sqrt(scale / fan), cut at +-2 * std / 0.87962566103423976
        "uniform"           limit = sqrt(3 * scale / fan), in [-limit, limit]

    Args:
        scale: A finite number > 0.
        mode: "fan_in", "fan_out" or "fan_avg", the mean of the two.
        distribution: "truncated_normal" or "uniform".

    The other arguments, the result and the errors are those of `he_normal_`.
    """
    check(tensor)
    axes = (in_axis, out_axis, batch_axis)
    if tensor.ndim < 2 and axes == TORCH_AXES:
        axes = DEFAULT_AXES
    width = parse_scaling(tuple(tensor.shape), scale, mode, distribution, *axes)
    return fill(tensor, distribution, ("scale", scale), width, seed, name)


def truncated_normal_(
    tensor: torch.Tensor,
    stddev: float = 0.05,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from a normal distribution truncated at two standard deviations, whatever the fans.

        weight = stddev * z,  z from the unit normal truncated to [-2, 2]

    stddev is that of the normal before it is cut, as in `gpuinit.truncated_normal`; that of the weights is
    0.8796 times as large. `torch.nn.init.trunc_normal_` takes its bounds as absolute numbers instead: with
    std=0.02 its default ones are a hundred standard deviations away and cut nothing.

    Args:
        stddev: A finite number >= 0.

    The other arguments, the result and the errors are those of `he_normal_`.
    """
    check(tensor)
    width = parse_number("stddev", stddev)
    return fill(tensor, "truncated_normal", ("stddev", stddev), width, seed, name)


def uniform_(
    tensor: torch.Tensor,
    limit: float = 0.05,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from the uniform distribution on [-limit, limit]. Both ends can be reached.

    Args:
        limit: A finite number >= 0.

    The other arguments, the result and the errors are those of `he_normal_`.
    """
    check(tensor)
    width = parse_number("limit", limit)
    return fill(tensor, "uniform", ("limit", limit), width, seed, name)
