"""One model, one seed: the same weights on one process and on any number, however they are sharded."""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

import gpuinit
from gpuinit.distributions import TRUNCATED_STD

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')
pytest.importorskip("torch.distributed.tensor", reason="torch is built without torch.distributed")

import torch_worlds  # noqa: E402
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard  # noqa: E402
from torch_worlds import SEED  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.torch import shards  # noqa: E402

WORLDS = (2, 3, 4)


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    """What every process of a world found."""
    folder = tmp_path_factory.mktemp("world")
    torch.multiprocessing.spawn(torch_worlds.run, (request.param, str(folder)), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def numpy_digests():
    """The same model's weights, without torch."""
    layout = {"seed": SEED, "device": "cpu", "in_axis": 1, "out_axis": 0}
    weights = {
        "embed.weight": gpuinit.truncated_normal(
            (11, 8), 0.02 / TRUNCATED_STD, seed=SEED, name="embed.weight", device="cpu"
        ),
        "conv.weight": gpuinit.he_normal((4, 3, 3, 3), name="conv.weight", **layout),
        "conv.bias": np.zeros(4, np.float32),
        "back.weight": gpuinit.variance_scaling(
            (6, 2, 2, 2), 4.0, name="back.weight", **layout | {"in_axis": 0, "out_axis": 1}
        ),
        "back.bias": np.zeros(4, np.float32),
        "norm.weight": np.ones(3, np.float32),
        "norm.bias": np.zeros(3, np.float32),
        "head.weight": gpuinit.he_normal((1, 8), name="head.weight", dtype="bfloat16", **layout),
        "head.bias": np.zeros(1, np.uint16),
    }
    weights["embed.weight"][7] = 0
    for block in ("blocks.0.", "blocks.1."):
        weights |= {
            block + "up.weight": gpuinit.he_normal((13, 8), name=block + "up.weight", **layout),
            block + "up.bias": np.zeros(13, np.float32),
            block + "down.weight": gpuinit.he_normal((8, 13), name=block + "down.weight", **layout),
            block + "down.bias": np.zeros(8, np.float32),
            block + "norm.weight": np.ones(8, np.float32),
            block + "norm.bias": np.zeros(8, np.float32),
        }
    return {name: hashlib.sha256(array.tobytes()).hexdigest()[:16] for name, array in weights.items()}


def test_one_process_makes_numpy_s_weights():
    model = torch_worlds.Net()
    gt.initialize_(model, seed=SEED)
    assert torch_worlds.full_digests(model) == numpy_digests()


def test_every_world_and_every_sharding_makes_the_same_weights(world):
    expected = numpy_digests()
    names = {"fully_shard", "fully_shard on axis 1", "fully_shard with CPU offload", "tensor parallel"}
    names |= {"fully_shard of a model that has weights", "DistributedDataParallel"}
    if len(world) == 4:
        names |= {"tensor parallel and fully_shard, 2x2", "hybrid sharding, 2x2"}
    for found in world:
        assert set(found["models"]) == names
        for name in names:
            assert found["models"][name] == expected, name


def test_a_tensor_in_any_placement_is_the_same(world):
    expected = gpuinit.he_normal((7, 5, 6), seed=SEED, name="tensor", device="cpu", in_axis=1, out_axis=0)
    digest = hashlib.sha256(expected.tobytes()).hexdigest()[:16]
    for found in world:
        assert len(found["tensors"]) == (8 if len(world) == 4 else 4)
        assert set(found["tensors"].values()) == {digest}


def test_normals_and_uniforms_of_any_bounds_are_the_same_in_any_placement(world):
    same = {"seed": SEED, "name": "tensor", "device": "cpu"}
    truncated = gpuinit.truncated_normal((7, 5, 6), 0.5, 2.0, -1.0, 2.5, **same)
    expected = {
        "normal_": gpuinit.normal((7, 5, 6), 0.5, 2.0, **same),
        "truncated_normal_": truncated,
        "uniform_": gpuinit.uniform((7, 5, 6), -1.0, 3.0, **same),
        "init.trunc_normal_": truncated,
    }
    for found in world:
        assert found["draws"] == {
            name: {hashlib.sha256(array.tobytes()).hexdigest()[:16]} for name, array in expected.items()
        }


def test_what_cannot_be_filled_in_parts_is_refused(world):
    for found in world:
        errors = found["errors"]
        assert errors["partial"].startswith("ValueError: tensor must be sharded or replicated")
        assert errors["partial"].endswith("got (Partial(sum),)")
        assert (
            errors["no seed"]
            == "ValueError: seed must be given for a DTensor, the same on every rank, got None"
        )
        assert errors["no seed but a generator"] == errors["no seed"]
        assert errors["no seed for a model"].startswith(
            "ValueError: seed must be given for a model with DTensors"
        )
        assert "got (3, 5) for (Shard(dim=0),)" in errors["wrong shard"]
        assert errors["integer"].startswith("TypeError: tensor must have dtype")


def test_what_fully_shard_has_gathered_is_refused(world):
    for found in world:
        errors = found["errors"]
        assert errors["gathered"].startswith("ValueError: module must be sharded")
        assert errors["gathered, in streams"] == errors["gathered"]
        assert errors["gathered, then sharded"] == "nothing was raised"


def test_the_padding_rows_of_a_sharded_table_are_zero_whoever_else_has_it(world):
    for found in world:
        assert found["padding"] == {
            f"{order}, {recipe}": rows
            for order, rows in {"head first": [9], "head later": [9], "two": [2, 9]}.items()
            for recipe in (None, "own")
        }


def test_a_collective_would_show(world):
    for found in world:
        assert "all_gather_into_tensor.default was called" in found["errors"]["collective"]


def torch_s_own_shard(indices, mesh_shape, coordinate, placements):
    """The index of every element of a shard, cut by torch."""
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if not placement.is_replicate():
            pieces, _ = placement._split_tensor(indices, ranks, with_padding=False)
            indices = pieces[rank]
    return indices


def random_layouts(count):
    draw = random.Random(0)
    for _ in range(count):
        shape = tuple(draw.randint(0, 13) for _ in range(draw.randint(1, 3)))
        mesh_shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3)))
        placements = []
        for _ in mesh_shape:
            axis = draw.randrange(len(shape))
            strided = _StridedShard(axis, split_factor=draw.randint(1, 4))
            placements.append(draw.choice([Replicate(), Shard(axis), strided, strided]))
        yield shape, mesh_shape, placements


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), list(random_layouts(60)))
def test_the_parts_of_a_shard_lie_where_torch_cuts_it(shape, mesh_shape, placements):
    """Strided and uneven shards of every mesh, without processes: each holds torch's elements, in order."""
    indices = torch.arange(int(np.prod(shape))).reshape(shape)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        expected = torch_s_own_shard(indices, mesh_shape, coordinate, placements)
        axes = shards.local_stretches(shape, mesh_shape, coordinate, placements)
        local = torch.full([sum(stretch.length for stretch in axis) for axis in axes], -1)
        assert local.shape == expected.shape
        for path in itertools.product(*(range(len(axis)) for axis in axes)):
            part = shards.locate(local, axes, path)
            box = tuple(
                slice(start, start + length)
                for start, length in zip(part.starts, part.tensor.shape, strict=True)
            )
            part.tensor.copy_(indices[box])
        assert torch.equal(local, expected)


@pytest.mark.parametrize(
    ("length", "chunks", "lengths"),
    [(10, 2, [5, 5]), (10, 3, [4, 4, 2]), (10, 4, [3, 3, 3, 1]), (3, 4, [1, 1, 1, 0]), (5, 4, [2, 2, 1, 0])],
)
def test_an_axis_is_cut_as_torch_chunk_cuts_it(length, chunks, lengths):
    found = [shards.chunk([shards.Stretch(0, length)], chunks, number) for number in range(chunks)]
    assert [sum(stretch.length for stretch in stretches) for stretches in found] == lengths


def test_importing_the_module_does_not_load_dtensors():
    code = "import gpuinit.torch as gt, torch, sys; gt.he_normal_(torch.empty(3)); "
    code += "print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
