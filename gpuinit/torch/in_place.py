"""he_normal_ and its family: a tensor and arguments in, the tensor filled."""

from __future__ import annotations

from typing import SupportsIndex

import torch

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
    parse_normal,
    parse_recipe,
    parse_uniform,
)
from gpuinit.fans import DEFAULT_AXES, Axes, fans
from gpuinit.tensors import outside_graphs
from gpuinit.torch.fill import check, fill

TORCH_AXES = (1, 0, ())


@outside_graphs
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
    gets the same value at the same index, through a scratch of at most 2**21 elements. On any other device
    that torch has (mps, xpu, ROCm, ...) it gets the same bits from the CPU, through such a scratch there; on
    a CUDA device too where CuPy or what it needs is missing, with a `gpuinit.FallbackWarning` once a process.
    A DTensor is filled from its place in the whole tensor, and with the fans of the whole tensor: each rank
    makes its own shard and no collective is called. Tensors on the meta device, and fake ones, are left
    alone. torch.compile breaks its graph at a fill.

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
            quantised, complex or integer tensor, one whose elements share memory or have none (storage
            that FSDP has freed, a placeholder of ZeRO-3), a Partial DTensor; and what autograd has computed
            from other tensors, as weight norm and pruning do, since it is computed anew without the fill.
        RuntimeError: make_fx, torch.export, torch.func, torch.jit.trace or torch.fx is at work: a fill is
            none of torch's operations, and they would miss it (vmap alone takes a tensor that all of its
            batch share); or a FakeTensorMode, on a real tensor.

    References: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015; `gpuinit.he_normal`.
    `torch.nn.init.kaiming_normal_` is not truncated.
    """
    return fill(tensor, scaled(tensor, HE_NORMAL, in_axis, out_axis, batch_axis), seed, name)


@outside_graphs
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
    return fill(tensor, scaled(tensor, HE_UNIFORM, in_axis, out_axis, batch_axis), seed, name)


@outside_graphs
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
    return fill(tensor, scaled(tensor, GLOROT_NORMAL, in_axis, out_axis, batch_axis), seed, name)


@outside_graphs
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
    return fill(tensor, scaled(tensor, GLOROT_UNIFORM, in_axis, out_axis, batch_axis), seed, name)


@outside_graphs
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
    return fill(tensor, scaled(tensor, LECUN_NORMAL, in_axis, out_axis, batch_axis), seed, name)


@outside_graphs
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
    return fill(tensor, scaled(tensor, LECUN_UNIFORM, in_axis, out_axis, batch_axis), seed, name)


@outside_graphs
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

        "truncated_normal"    std = sqrt(scale / fan), cut at +-2 * std / 0.87962566103423976
        "untruncated_normal"  std = sqrt(scale / fan)
        "uniform"             limit = sqrt(3 * scale / fan), in [-limit, limit]

    Args:
        scale: A finite number > 0.
        mode: "fan_in", "fan_out", "fan_avg", the mean of the two, or "fan_geo_avg", their geometric mean.
        distribution: One of the three above.

    The other arguments, the result and the errors are those of `he_normal_`.

    References: `gpuinit.variance_scaling`.
    """
    recipe = parse_recipe(scale, mode, distribution)
    return fill(tensor, scaled(tensor, recipe, in_axis, out_axis, batch_axis), seed, name)


def scaled(tensor: torch.Tensor, recipe: Recipe, *axes: Axes) -> Draw:
    """What variance_scaling_ and the six above draw."""
    check(tensor)
    if tensor.ndim < 2 and axes == TORCH_AXES:
        axes = DEFAULT_AXES
    return draw_of(recipe, *fans(tuple(tensor.shape), *axes))


@outside_graphs
def normal_(
    tensor: torch.Tensor,
    stddev: float = 0.05,
    mean: float = 0.0,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from a normal distribution that is not cut, whatever the fans.

        weight = mean + stddev * z,  z from the unit normal

    Args:
        stddev: A finite number >= 0, or a 0-d tensor.
        mean: A finite number, likewise.

    The other arguments, the result and the errors are those of `he_normal_`.

    References: `gpuinit.normal`. `torch.nn.init.normal_` takes the mean first.
    """
    check(tensor)
    return fill(tensor, parse_normal(stddev, mean), seed, name)


@outside_graphs
def truncated_normal_(
    tensor: torch.Tensor,
    stddev: float = 0.05,
    mean: float = 0.0,
    lower: float = -2.0,
    upper: float = 2.0,
    *,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from a normal distribution that is cut at two bounds, whatever the fans.

        weight = mean + stddev * z,  z from the unit normal truncated to [lower, upper]

    stddev is that of the normal before it is cut, as in `gpuinit.truncated_normal`; that of the weights is
    0.8796 times as large with the default bounds. `torch.nn.init.trunc_normal_` takes its bounds as absolute
    numbers instead, as does `gpuinit.torch.init.trunc_normal_`: with std=0.02 its default ones are a hundred
    standard deviations away and cut nothing.

    Args:
        stddev: A finite number >= 0, or a 0-d tensor.
        mean: A finite number, likewise.
        lower: The lower bound in standard deviations from the mean; -infinity for none.
        upper: The upper bound, at least lower; infinity for none.

    The other arguments, the result and the errors are those of `he_normal_`; bounds too close or too far out
    are a ValueError, as in `gpuinit.truncated_normal`.
    """
    check(tensor)
    return fill(tensor, parse_normal(stddev, mean, lower, upper), seed, name)


@outside_graphs
def uniform_(
    tensor: torch.Tensor,
    *ends: float,
    a: float | None = None,
    b: float | None = None,
    limit: float | None = None,
    seed: SupportsIndex | None = None,
    name: str | None = None,
) -> torch.Tensor:
    """Fill a tensor from a uniform distribution, whatever the fans, as `gpuinit.uniform` does.

        uniform_(tensor, limit)  in [-limit, limit]
        uniform_(tensor, a, b)   in [a, b]

    Args:
        *ends: One limit, or two ends; these have names too.
        a: A finite number, or a 0-d tensor.
        b: A finite number >= a, likewise.
        limit: A finite number >= 0, likewise; the default is 0.05.

    The other arguments, the result and the errors are those of `he_normal_`.

    References: `gpuinit.uniform`, whose ends are called low and high; `torch.nn.init.uniform_`.
    """
    check(tensor)
    return fill(tensor, parse_uniform(ends, a, b, limit, names=("a", "b")), seed, name)
