"""The parts of a tensor that this rank holds, and where they lie in the whole.

`torch.distributed.tensor._utils.compute_local_shape_and_global_offset` gives one offset an axis, which is
not enough: under FSDP2 with tensor parallelism on one axis (`_StridedShard`) a shard is several stretches of
it. Here every axis is a list of stretches, cut as the placements cut it, left to right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    """A box of the whole tensor."""

    tensor: torch.Tensor  # its memory
    starts: tuple[int, ...]  # the whole tensor's index of its first element


class Stretch(NamedTuple):
    """Consecutive places of one axis of the whole tensor."""

    start: int
    length: int


def is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it is not imported, nothing is a DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def memory(tensor: Any) -> torch.Tensor:
    """The tensor itself, or of a DTensor the memory of this rank, as it is."""
    local: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local


def parts(tensor: Any) -> tuple[torch.Tensor, list[Part]]:
    """The memory of this rank, and the parts of the whole tensor in it, which cover it."""
    if not is_dtensor(tensor):
        local = tensor.detach()
        return local, [Part(local, (0,) * local.ndim)]
    local = tensor.to_local().detach()
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:  # this rank has no share
        return local, []
    axes = local_stretches(tuple(tensor.shape), mesh.shape, mesh.get_coordinate(), tensor.placements)
    expected = tuple(sum(stretch.length for stretch in stretches) for stretches in axes)
    if expected != tuple(local.shape):
        raise ValueError(
            f"tensor must be cut as its placements say, here into a shard of shape {expected}, "
            f"got {tuple(local.shape)} for {tensor.placements}"
        )
    return local, [locate(local, axes, path) for path in product(*(range(len(axis)) for axis in axes))]


def locate(local: torch.Tensor, axes: list[list[Stretch]], path: tuple[int, ...]) -> Part:
    """The box that takes stretch path[i] of axis i."""
    for axis, (stretches, number) in enumerate(zip(axes, path, strict=True)):
        before = sum(stretch.length for stretch in stretches[:number])
        local = local.narrow(axis, before, stretches[number].length)
    return Part(local, tuple(stretches[number].start for stretches, number in zip(axes, path, strict=True)))


def local_slices(tensor: Any, axis: int, start: int, length: int) -> list[torch.Tensor]:
    """The memory on this rank of tensor.narrow(axis, start, length)."""
    found = []
    for part, starts in parts(tensor)[1]:
        first = max(start, starts[axis])
        end = min(start + length, starts[axis] + part.shape[axis])
        if first < end:
            found.append(part.narrow(axis, first - starts[axis], end - first))
    return found


def local_stretches(
    shape: tuple[int, ...],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Any],
) -> list[list[Stretch]]:
    """For every axis, the stretches of it that the rank at a coordinate of the mesh holds, in its order."""
    axes = [[Stretch(0, length)] for length in shape]
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if placement.is_partial() or axis is None:
            raise ValueError(
                "tensor must be sharded or replicated on every axis of its mesh, as a partial one has no "
                f"values of its own, got {tuple(placements)}"
            )
        # Shard is one piece. _StridedShard was cut after an axis to the right of it: into that many pieces,
        # of which every rank has a chunk.
        chunks = getattr(placement, "split_factor", 1)
        axes[axis] = [
            stretch
            for piece in range(chunks)
            for stretch in chunk(chunk(axes[axis], chunks, piece), ranks, rank)
        ]
    return axes


def chunk(stretches: list[Stretch], chunks: int, number: int) -> list[Stretch]:
    """One of the chunks of `torch.chunk`: all of the same length, but for the last ones."""
    total = sum(stretch.length for stretch in stretches)
    length = -(-total // chunks)
    begin, end = number * length, (number + 1) * length
    taken = []
    for stretch in stretches:
        first, last = max(begin, 0), min(end, stretch.length)
        if first < last:
            taken.append(Stretch(stretch.start + first, last - first))
        begin, end = begin - stretch.length, end - stretch.length
    return taken
