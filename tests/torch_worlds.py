"""What the processes of test_torch_distributed.py do. No test is here: a process imports this file alone."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import gpuinit.torch as gt

SEED = 2**63 + 5
DRAWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "normal_": lambda tensor: gt.normal_(tensor, 0.5, 2.0, seed=SEED, name="tensor"),
    "truncated_normal_": lambda tensor: gt.truncated_normal_(
        tensor, 0.5, 2.0, -1.0, 2.5, seed=SEED, name="tensor"
    ),
    "uniform_": lambda tensor: gt.uniform_(tensor, -1.0, 3.0, seed=SEED, name="tensor"),
    "init.trunc_normal_": lambda tensor: gt.init.trunc_normal_(
        tensor, 2.0, 0.5, 1.5, 3.25, seed=SEED, name="tensor"
    ),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 13)
        self.down = nn.Linear(13, 8)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    """Every default rule, lengths that no world divides, and one shorter than the worlds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=7)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv2d(6, 4, 3, groups=2)
        self.back = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(8, 1, dtype=torch.bfloat16)


def digest(tensor: torch.Tensor) -> str:
    memory = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memory.numpy().tobytes()).hexdigest()[:16]


def full_digests(model: nn.Module) -> dict[str, str]:
    """Of every whole parameter, the same on all ranks, under the names of the bare model."""
    found = {}
    for name, parameter, _ in gt.model.named_parameters(model):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = digest(whole)
    return found


class NoCollectives(TorchDispatchMode):
    """Raises where a collective is called; DTensors are taken apart first."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if "c10d" in function.namespace:
            raise AssertionError(f"the collective {function} was called")
        return function(*args, **(kwargs or {}))


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def fsdp(model: Any, mesh: Any, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def poisoned(model: Any) -> Any:
    """With memory for its shards, which holds what no recipe draws."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(77)
    return model


def materialise(model: Net) -> Net:
    """The weights, without a collective."""
    poisoned(model)
    with NoCollectives():
        gt.initialize_(model, seed=SEED)
    return model


def tensor_parallel(model: Any, mesh: Any) -> Any:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def shard_columns(parameter: nn.Parameter) -> Shard:
    """Axis 1 where FSDP can: it wants even shards there."""
    return Shard(1 if parameter.ndim > 1 and parameter.shape[1] % dist.get_world_size() == 0 else 0)


def worlds_models(world: int) -> dict[str, Callable[[], nn.Module]]:
    mesh = init_device_mesh("cpu", (world,))
    models: dict[str, Callable[[], nn.Module]] = {
        "fully_shard": lambda: materialise(fsdp(on_meta(), mesh)),
        "fully_shard on axis 1": lambda: materialise(fsdp(on_meta(), mesh, shard_placement_fn=shard_columns)),
        "fully_shard with CPU offload": lambda: materialise(
            fsdp(on_meta(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        ),
        "fully_shard of a model that has weights": lambda: materialise(fsdp(Net(), mesh)),
        "tensor parallel": lambda: materialise(tensor_parallel(on_meta(), mesh)),
        "DistributedDataParallel": lambda: materialise(nn.parallel.DistributedDataParallel(Net())),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        models["tensor parallel and fully_shard, 2x2"] = lambda: materialise(
            fsdp(tensor_parallel(on_meta(), square["tp"]), square["dp"])
        )
        models["hybrid sharding, 2x2"] = lambda: materialise(fsdp(on_meta(), square))
    return models


def tied(mesh: Any, layers: dict[str, Callable[[], Any]]) -> Any:
    """Layers of one table, which is sharded."""
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict((name, make()) for name, make in layers.items()))
    first, *others = model
    for other in others:
        other.weight = first.weight
    fully_shard(model, mesh=mesh)
    poisoned(model)
    for other in others:
        other.weight = first.weight
    return model


def padding_rows(world: int) -> dict[str, list[int]]:
    """The rows of 0 in tables that are tied, under rules and under the recipes of the parts."""
    mesh = init_device_mesh("cpu", (world,))
    head = {"head": lambda: nn.Linear(4, 11, bias=False)}
    one = {"one": lambda: nn.Embedding(11, 4, padding_idx=9)}
    two = {"two": lambda: nn.EmbeddingBag(11, 4, padding_idx=2)}
    found = {}
    for name, layers in {"head first": head | one, "head later": one | head, "two": one | head | two}.items():
        for recipe in (None, "own"):
            model = tied(mesh, layers)
            # Under the recipe of an embedding torch itself gathers the table, to set the row.
            with NoCollectives() if recipe is None else nullcontext():
                gt.initialize_(model, SEED, recipe=recipe)
            table = model[0].weight.full_tensor()
            found[f"{name}, {recipe}"] = [row for row in range(11) if not table[row].any()]
    return found


def gathered(mesh: Any) -> Any:
    """A model as a forward pass leaves it: the root's parameters are not sharded again."""
    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model, mesh=mesh)
    model(torch.ones(1, 4))
    return model


def layouts(world: int) -> list[tuple[Any, list[Any]]]:
    """Meshes and placements of three axes."""
    mesh = init_device_mesh("cpu", (world,))
    found: list[tuple[Any, list[Any]]] = [(mesh, [Shard(axis)]) for axis in range(3)]
    found.append((mesh, [Replicate()]))
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        pairs = [(Shard(0), Shard(0)), (Shard(2), Shard(1)), (Replicate(), Shard(1)), (Shard(0), Replicate())]
        found += [(square, list(pair)) for pair in pairs]
    return found


def tensors(world: int) -> dict[str, str]:
    """Digests of (7, 5, 6) in placements of its own, whole again; and what is refused."""
    found = {}
    for where, placements in layouts(world):
        tensor = distribute_tensor(torch.full((7, 5, 6), 77.0), where, placements)
        before, local_before = tensor._version, tensor.to_local()._version
        with NoCollectives():
            assert gt.he_normal_(tensor, seed=SEED, name="tensor") is tensor
        if tensor.to_local().numel():  # autograd notices
            assert tensor._version > before
            assert tensor.to_local()._version > local_before
        found[f"{where.shape} {placements}"] = digest(tensor.full_tensor())
    return found


def draws(world: int) -> dict[str, set[str]]:
    """The digests of each of DRAWS, whole again, in all layouts."""
    found: dict[str, set[str]] = {name: set() for name in DRAWS}
    for name, draw in DRAWS.items():
        for where, placements in layouts(world):
            tensor = distribute_tensor(torch.full((7, 5, 6), 77.0), where, placements)
            with NoCollectives():
                draw(tensor)
            found[name].add(digest(tensor.full_tensor()))
    return found


def errors(world: int) -> dict[str, str]:
    """What is refused, and that the guard against collectives works."""
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.zeros(7, 5), mesh, [Partial()])
    wrong = DTensor.from_local(
        torch.zeros(3, 5), mesh, [Shard(0)], run_check=False, shape=(30, 5), stride=(5, 1)
    )
    model, again = fsdp(Net(), mesh), gathered(mesh)
    attempts: dict[str, Callable[[], Any]] = {
        "partial": lambda: gt.he_normal_(partial, seed=0),
        "no seed": lambda: gt.he_normal_(sharded),
        "no seed but a generator": lambda: gt.init.normal_(sharded, generator=torch.Generator()),
        "no seed for a model": lambda: gt.initialize_(model, seed=None),
        "gathered": lambda: gt.initialize_(gathered(mesh)),
        "gathered, in streams": lambda: gt.streams(gathered(mesh)).__enter__(),
        "gathered, then sharded": lambda: again.reshard() or gt.initialize_(again),
        "wrong shard": lambda: gt.he_normal_(wrong, seed=0),
        "integer": lambda: gt.he_normal_(distribute_tensor(torch.zeros(8, dtype=torch.int32), mesh), seed=0),
        "collective": lambda: with_guard(sharded.full_tensor),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    assert not sharded.to_local().any()
    return found


def with_guard(function: Callable[[], Any]) -> None:
    with NoCollectives():
        function()


def run(rank: int, world: int, folder: str) -> None:
    """One process: what it found goes to a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(minutes=5), rank=rank, world_size=world)
    found = {
        "models": {name: full_digests(make()) for name, make in worlds_models(world).items()},
        "tensors": tensors(world),
        "draws": draws(world),
        "errors": errors(world),
        "padding": padding_rows(world),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort while the interpreter ends
