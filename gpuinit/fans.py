"""Shape and axes to fans."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import SupportsIndex

from gpuinit.stream import as_integers

Axes = SupportsIndex | Sequence[SupportsIndex]

DEFAULT_AXES = ((-2,), (-1,), ())


def fans(shape: tuple[int, ...], in_axis: Axes, out_axis: Axes, batch_axis: Axes) -> tuple[int, int]:
    """fan_in and fan_out of a weight.

        fan_in  = product of the lengths of in_axis  * receptive field
        fan_out = product of the lengths of out_axis * receptive field

    The receptive field is the product of all axes that are none of in_axis, out_axis and batch_axis, so that
    a fan is the product of all axes but those of the other and of the batch. This is
    the rule of `jax.nn.initializers.variance_scaling`; with the default axes it is Keras's for kernels of
    Dense (in, out) and Conv (..., in, out). With the default axes a 0-D shape has fans 1 and a 1-D shape
    (n,) fans n, as in Keras.
    """
    ndim = len(shape)
    axes = (in_axis, out_axis, batch_axis)
    if ndim > 1 and [type(axis) for axis in axes] == [int, int, tuple] and axes == (-2, -1, ()):
        receptive_field = prod(shape[:-2])  # nearly every call, so without the checks below
        return shape[-2] * receptive_field, shape[-1] * receptive_field
    wanted = f"must be an axis or a sequence of axes in [-{ndim}, {ndim})"
    inputs = as_integers(in_axis, f"in_axis {wanted}")
    outputs = as_integers(out_axis, f"out_axis {wanted}")
    batch = as_integers(batch_axis, f"batch_axis {wanted}")
    if ndim < 2 and (inputs, outputs, batch) == DEFAULT_AXES:
        return (shape[0], shape[0]) if shape else (1, 1)
    named = inputs + outputs + batch
    if named and not -ndim <= min(named) <= max(named) < ndim:
        given = {
            "in_axis": (in_axis, inputs),
            "out_axis": (out_axis, outputs),
            "batch_axis": (batch_axis, batch),
        }
        for argument, (asked, found) in given.items():
            if not all(-ndim <= axis < ndim for axis in found):
                raise ValueError(f"{argument} {wanted}, got {asked!r}")
    if len({axis % ndim for axis in named}) < len(named):
        raise ValueError(
            "in_axis, out_axis and batch_axis must not name an axis twice, "
            f"got {in_axis!r}, {out_axis!r} and {batch_axis!r} for shape {shape}"
        )
    return size_without(shape, outputs + batch), size_without(shape, inputs + batch)


def size_without(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    left_out = {axis % len(shape) for axis in axes}
    return prod([length for axis, length in enumerate(shape) if axis not in left_out])
