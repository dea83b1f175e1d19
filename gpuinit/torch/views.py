"""Where the elements of a view lie in the tensor that it looks into."""

from __future__ import annotations

from collections.abc import Iterator
from operator import mul
from typing import Any, NamedTuple

import torch

from gpuinit.stream import row_major
from gpuinit.torch.shards import parts


class Place(NamedTuple):
    """Elements of a whole tensor: that at index i is its element offset + sum(i * strides), row-major."""

    tensor: torch.Tensor  # their memory
    offset: int
    strides: tuple[int, ...]


class Steps(NamedTuple):
    """A view whose element i has the index first + i @ steps in the tensor that it looks into."""

    view: torch.Tensor
    first: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]  # one for every axis of the view


def places(view: torch.Tensor, owner: Any) -> list[Place] | None:
    """The places that the elements of a view of this rank's memory have in its whole owner, which may be a
    DTensor; None where it has an element outside of it.

    A slice, a transpose, a diagonal or a reshaped view is one place, or a few.
    """
    local, boxes = parts(owner)
    found = unfold(view, local)
    if found is None:
        return None
    strides = row_major(tuple(owner.shape))
    made = []
    for box, starts in boxes:
        before = address(box.storage_offset() - local.storage_offset(), local) if box.numel() else None
        if before is None:
            continue
        for steps in clip(found, before, tuple(box.shape)) if len(boxes) > 1 else found:
            at = [start + i - j for start, i, j in zip(starts, steps.first, before, strict=True)]
            made.append(
                Place(
                    steps.view,
                    sum(map(mul, at, strides)),
                    tuple(sum(map(mul, step, strides)) for step in steps.steps),
                )
            )
    return made


def address(distance: int, tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The index of the element that lies so far from the first one; None where none does."""
    index = [0] * tensor.ndim
    for axis in sorted(range(tensor.ndim), key=tensor.stride, reverse=True):
        if tensor.shape[axis] > 1 and tensor.stride(axis):
            index[axis], distance = divmod(distance, tensor.stride(axis))
    return None if distance or min(index, default=0) < 0 else tuple(index)


def unfold(view: torch.Tensor, tensor: torch.Tensor) -> list[Steps] | None:
    """The view in pieces that walk the tensor in straight lines; None where it leaves it."""
    found, todo = [], [view] if view.numel() else []
    while todo:
        piece = todo.pop()
        first = address(piece.storage_offset() - tensor.storage_offset(), tensor)
        if first is None or not all(i < max(1, n) for i, n in zip(first, tensor.shape, strict=True)):
            return None
        axes = zip(piece.stride(), piece.shape, strict=True)
        steps = [address(stride if length > 1 else 0, tensor) for stride, length in axes]
        straight = [step for step in steps if step is not None]
        if len(straight) < len(steps):
            return None
        walk = Steps(piece, first, tuple(straight))
        pieces = cut(walk, tensor)
        todo += pieces[::-1]
        if not pieces:
            found.append(walk)
    return found


def cut(found: Steps, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of it, where its line runs on over the end of an axis, as in a flattened view; else none."""
    view, first, steps = found
    for axis in sorted(range(tensor.ndim), key=tensor.stride):  # the innermost first: it carries to the next
        length = tensor.shape[axis]
        walking = [j for j in range(view.ndim) if steps[j][axis] and view.shape[j] > 1]
        if first[axis] + sum(steps[j][axis] * (view.shape[j] - 1) for j in walking) < length:
            continue
        j = max(walking, key=lambda j: (steps[j][axis], view.stride(j)))
        step, count = steps[j][axis], view.shape[j]
        alone, aligned = len(walking) == 1 and step < length, not first[axis] and length % step == 0
        if alone and aligned and count * step % length == 0:
            inner = length // step
            return [view.unflatten(j, (count // inner, inner))]
        head = 1
        if alone and aligned:
            head = count * step // length * length // step
        elif alone:
            head = -(-(length - first[axis]) // step)
        return [view.narrow(j, 0, head), view.narrow(j, head, count - head)]
    return []


def clip(found: list[Steps], before: tuple[int, ...], lengths: tuple[int, ...]) -> Iterator[Steps]:
    """The parts of them whose index lies in a box of the tensor."""
    for steps in found:
        yield from clip_axis(steps, before, lengths, 0)


def clip_axis(found: Steps, before: tuple[int, ...], lengths: tuple[int, ...], axis: int) -> Iterator[Steps]:
    if axis == len(lengths):
        yield found
        return
    view, first, steps = found
    walking = [j for j in range(view.ndim) if steps[j][axis] and view.shape[j] > 1]
    if not walking:
        if before[axis] <= first[axis] < before[axis] + lengths[axis]:
            yield from clip_axis(found, before, lengths, axis + 1)
        return
    j = max(walking, key=lambda j: steps[j][axis])
    if len(walking) > 1:  # one index of it after the other
        spans = [(i, 1) for i in range(view.shape[j])]
    else:
        low, high = (
            min(max(0, -(-(end - first[axis]) // steps[j][axis])), view.shape[j])
            for end in (before[axis], before[axis] + lengths[axis])
        )
        spans = [(low, high - low)]
    for start, count in spans:
        if count:
            moved = tuple(i + start * step for i, step in zip(first, steps[j], strict=True))
            part = Steps(view.narrow(j, start, count), moved, steps)
            yield from clip_axis(part, before, lengths, axis + 1 if len(walking) == 1 else axis)
