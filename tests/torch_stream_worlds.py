"""What the processes of test_torch_streams_distributed.py do. No test is here: a process imports it alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_worlds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

import gpuinit.torch as gt

SEED = 7


class Net(nn.Module):
    """Lengths that no world divides, one shorter than the worlds, and every way to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=7)
        self.blocks = nn.ModuleList(torch_worlds.Block() for _ in range(2))
        self.fused = nn.Parameter(torch.empty(12, 8))
        self.decay = nn.Parameter(torch.empty(5))
        self.like = nn.Parameter(torch.empty(5, 2))
        self.one = nn.Parameter(torch.empty(1, 8, dtype=torch.bfloat16))
        self.register_buffer("table", torch.empty(9))

    def init_weights(self) -> None:
        torch.randn(dist.get_rank() + 1)  # ranks need not be in step
        nn.init.normal_(self.embed.weight)
        for block in self.blocks:
            nn.init.trunc_normal_(block.up.weight, std=0.02)
            block.down.reset_parameters()
            nn.init.zeros_(block.up.bias)
            nn.init.ones_(block.norm.weight)
            nn.init.zeros_(block.norm.bias)
        self.fused.copy_(torch.cat([torch.randn(6, 8), torch.rand(6, 8) * 2]))
        self.decay.copy_(torch.empty_like(self.decay).uniform_(1, 16).mul_(2))
        self.like.copy_(torch.randn_like(self.like).detach())
        nn.init.kaiming_uniform_(self.one)
        self.table.uniform_()


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def digests(model: nn.Module) -> dict[str, str]:
    found = torch_worlds.full_digests(model)
    return found | {name: torch_worlds.digest(buffer) for name, buffer in model.named_buffers()}


def initialised(model: nn.Module) -> dict[str, Any]:
    """Its weights, and the report, of a recipe that was run without a collective."""
    torch_worlds.poisoned(model)
    torch.manual_seed(dist.get_rank())
    with (
        torch_worlds.NoCollectives(),
        gt.streams(model, SEED) as report,
        torch.no_grad(),
        implicit_replication(),
    ):
        model.init_weights()
    return {"digests": digests(model), "report": [tuple(row) for row in report]}


def columns_from_temporaries(w: Any) -> None:
    for part in (w[:, :4], w[:, 4:]):
        part.copy_(torch.randn_like(part))


def drawn_row(w: Any) -> Any:
    row = w[2:3]
    row.normal_()
    return row


def given_later(w: Any, other: torch.Tensor) -> None:
    """A temporary that another parameter has been made of."""
    drawn = torch.randn(6, 8)
    other.copy_(drawn)
    local = w.to_local()
    local.copy_(drawn[: len(local)])


def draws(mesh: Any) -> dict[str, str]:
    """The digest of a parameter of (6, 8), sharded, after draws of many kinds; or what was refused."""
    other = nn.Parameter(torch.empty(6, 8))
    recipes: dict[str, Callable[[Any], Any]] = {
        "whole": lambda w: w.normal_(),
        "local": lambda w: w.to_local().normal_(),
        "columns": lambda w: [part.normal_() for part in w.chunk(2, 1)],
        "transposed": lambda w: w.t().normal_(),
        "rows by number": lambda w: [w[i].normal_() for i in range(-6, 0)],
        "row slices": lambda w: [w[i : i + 4].normal_() for i in (0, 2)],
        "row chunks": lambda w: [part.normal_() for part in w.split([1, 3, 2])],
        "a padding row": lambda w: (w.normal_(), nn.init.zeros_(w[4])),
        "a scaled row": lambda w: (w.normal_(), w[1:3].mul_(2)),
        "a copied row": lambda w: w[4].copy_(w[1]),
        "a row of rows": lambda w: w[1:3][0].zero_(),
        "every other row": lambda w: w[::2].normal_(),
        "local rows": lambda w: [row.normal_() for row in w.to_local()],
        "columns from temporaries": columns_from_temporaries,
        "a row that is read again": lambda w: w.mul_(0).add_(drawn_row(w)),
        "gathered": lambda w: w.copy_(torch.empty_like(w).normal_().full_tensor()),
        "a slice of a temporary": lambda w: w[2:5].copy_(torch.empty_like(w).normal_()[2:5]),
        "given to a shard later": lambda w: given_later(w, other),
        "given to a shard": lambda w: w.to_local().copy_(torch.randn(w.to_local().shape)),
        "a shard of its own": lambda w: w.copy_(
            DTensor.from_local(torch.randn(w.to_local().shape) * 0.1, mesh, [Shard(0)])
        ),
        "distributed": lambda w: w.copy_(distribute_tensor(torch.randn(6, 8), mesh, [Shard(0)])),
    }
    found = {}
    for name, recipe in recipes.items():
        module = nn.Module()
        module.w = nn.Parameter(distribute_tensor(torch.full((6, 8), 77.0), mesh, [Shard(0)]))
        module.other = other
        try:
            with gt.streams(module, SEED) as report, torch.no_grad():
                recipe(module.w)
            found[name] = torch_worlds.digest(module.w.full_tensor()) + " " + report[0].written
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(minutes=5), rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    models = {"bare": on_meta(), "fully_shard": torch_worlds.fsdp(on_meta(), mesh)}
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallel = torch_worlds.tensor_parallel(on_meta(), square["tp"])
        models |= {
            "hybrid sharding, 2x2": torch_worlds.fsdp(on_meta(), square),
            "tensor parallel and fully_shard": torch_worlds.fsdp(parallel, square["dp"]),
        }
    found = {
        "models": {name: initialised(model) for name, model in models.items()},
        "draws": draws(mesh),
        "seed": seed_of_none(models["fully_shard"]),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort while the interpreter ends


def seed_of_none(model: nn.Module) -> str:
    try:
        with gt.streams(model, None):
            return "nothing was raised"
    except ValueError as error:
        return str(error)
