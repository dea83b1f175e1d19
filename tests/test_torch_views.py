"""gpuinit.torch.views: where the elements of a view lie in the whole tensor."""

from __future__ import annotations

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from gpuinit.stream import row_major, strided_runs, walk  # noqa: E402
from gpuinit.torch import views  # noqa: E402
from gpuinit.torch.shards import Stretch, locate  # noqa: E402

MISSING = -1  # memory round the tensor that is no element of it


def random_tensor(draw):
    """Any order of axes in memory, with or without gaps, up to four axes."""
    shape = [draw.randint(1, 7) for _ in range(draw.randint(0, 4))]
    order = draw.sample(range(len(shape)), len(shape))
    if draw.random() < 0.5:
        memory = torch.empty([shape[axis] for axis in order], dtype=torch.int64)
        tensor = memory.permute([order.index(axis) for axis in range(len(shape))])
    else:
        gaps = torch.full([length + draw.randint(0, 1) for length in shape], MISSING)
        tensor = gaps[tuple(slice(0, length) for length in shape)]
    return tensor.copy_(torch.arange(tensor.numel()).reshape(shape))


def random_view(tensor, draw):
    view = tensor
    for _ in range(draw.randint(0, 4)):
        step = draw.choice(
            ["narrow", "slice", "permute", "flatten", "select", "diagonal", "unflatten", "strided"]
        )
        axis = draw.randrange(view.ndim) if view.ndim else None
        try:
            if step == "permute":
                view = view.permute(draw.sample(range(view.ndim), view.ndim))
            elif step == "flatten":
                view = view.view(-1)
            elif axis is None or not view.numel():
                continue
            elif step == "narrow":
                start = draw.randint(0, view.shape[axis])
                view = view.narrow(axis, start, draw.randint(0, view.shape[axis] - start))
            elif step == "slice":
                part = slice(draw.randint(0, 2), None, draw.randint(1, 3))
                view = view[(slice(None),) * axis + (part,)]
            elif step == "select":
                view = view.select(axis, draw.randrange(view.shape[axis]))
            elif step == "diagonal" and view.ndim > 1:
                view = view.diagonal(draw.randint(-2, 2), *draw.sample(range(view.ndim), 2))
            elif step == "unflatten":
                length = view.shape[axis]
                outer = draw.choice([n for n in range(1, length + 1) if length % n == 0])
                view = view.unflatten(axis, (outer, length // outer))
            elif step == "strided":  # straight through the memory, over gaps too
                stride, start = draw.randint(1, 3), view.storage_offset()
                room = (len(view.untyped_storage()) // view.element_size() - 1 - start) // stride
                view = view.as_strided((draw.randint(1, room + 1),), (stride,), start)
        except RuntimeError:  # a view that torch cannot make without a copy
            continue
    return view


def random_boxes(tensor, draw):
    """A tensor cut out of a larger one: one or two stretches an axis, as of a strided shard."""
    axes, shape = [], []
    for length in tensor.shape:
        first = draw.randint(0, length)
        start, gap = draw.randint(0, 3), draw.randint(0, 2)
        stretches = [Stretch(start, first), Stretch(start + first + gap, length - first)]
        axes.append([stretch for stretch in stretches if stretch.length])
        shape.append(start + gap + length + draw.randint(0, 2))
    paths = [()]
    for stretches in axes:
        paths = [(*path, i) for path in paths for i in range(len(stretches))]
    whole = torch.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    indices = [[s.start + i for s in stretches for i in range(s.length)] for stretches in axes]
    expected = whole[tuple(np.ix_(*indices))] if axes else whole
    return [locate(tensor, axes, path) for path in paths], shape, expected


class Whole:
    """What a DTensor is to `places`: a shape."""

    def __init__(self, shape):
        self.shape = tuple(shape)


def expand(place):
    """The global index of each of its elements."""
    index = torch.full(place.tensor.shape, place.offset)
    for axis, stride in enumerate(place.strides):
        shape = [-1 if i == axis else 1 for i in range(place.tensor.ndim)]
        index += (torch.arange(place.tensor.shape[axis]) * stride).view(shape)
    return index


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shards", [False, True])
def test_every_element_of_a_view_is_found(seed, shards, monkeypatch):
    """Each is written by its place, once, and read back through the view."""
    draw = random.Random(f"{seed} {shards}")
    outside = several = 0
    for _ in range(400):
        tensor = random_tensor(draw)
        owner, boxes, expected = tensor, [(tensor, (0,) * tensor.ndim)], tensor.clone()
        if shards:
            boxes, shape, expected = random_boxes(tensor, draw)
            owner = Whole(shape)
        monkeypatch.setattr(views, "parts", lambda _, tensor=tensor, boxes=boxes: (tensor, boxes))
        view = random_view(tensor, draw)
        found = views.places(view, owner)
        if (view == MISSING).any():
            outside += 1
            assert found is None
            continue
        wanted = expected.reshape(-1)[view]
        view.fill_(-2)
        for place in found:
            assert (place.tensor == -2).all()
            place.tensor.copy_(expand(place))
        assert torch.equal(view, wanted)
        several += len(found) > 1
    assert several > (20 if shards else 1)
    assert shards or outside > 5


def test_a_flattened_whole_and_a_transpose_are_one_place():
    tensor = torch.empty(60, 50, 4)
    for view in (tensor, tensor.view(-1), tensor.view(3000, 4), tensor.transpose(0, 2), tensor[::7, :, 1]):
        assert len(views.places(view, tensor)) == 1
    assert len(views.places(tensor.view(-1)[3:-5], tensor)) < 8


@pytest.mark.parametrize("seed", range(4))
def test_strided_runs_are_the_elements_in_order(seed):
    draw = random.Random(seed)
    for _ in range(200):
        lengths = tuple(draw.randint(0, 4) for _ in range(draw.randint(0, 4)))
        strides = tuple(draw.randint(1, 40) for _ in lengths)
        if draw.random() < 0.5:
            strides = row_major(tuple(length + draw.randint(0, 1) for length in lengths))
        offset = draw.randint(0, 10)
        found = [
            run.offset + further + row * run.row_stride + i
            for run in strided_runs(offset, lengths, strides)
            for further in walk(run.outer)
            for row in range(run.rows)
            for i in range(run.length)
        ]
        index = (
            np.indices(lengths).reshape(len(lengths), int(np.prod(lengths)))
            if lengths
            else np.zeros((0, 1), int)
        )
        assert found == (offset + np.array(strides, int) @ index).tolist()
