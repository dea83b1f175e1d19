"""The names of a model's parameters: those of the bare model, whatever wraps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn


def named_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Name, parameter and owner, once a parameter, in the order of `module.named_parameters()`."""
    seen = set()
    for prefix, owner in walk(module):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield prefix + name, parameter, owner


def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with the prefix of its names: none for what a wrapper adds."""
    seen = set()

    def below(prefix: str, parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if parent in seen:
            return
        seen.add(parent)
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(parent, fsdp.FullyShardedDataParallel):
            raise TypeError(
                "module must keep the shapes of its parameters; use fully_shard, got a "
                "FullyShardedDataParallel, which flattens them"
            )
        yield prefix, parent
        for name, child in parent.named_children():
            yield from below(prefix if is_wrapper(parent, name) else f"{prefix}{name}.", child)

    return below("", module)


def is_wrapper(parent: nn.Module, name: str) -> bool:
    """Whether a child is the model that its parent wraps."""
    if name == "module":
        return isinstance(parent, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return name in ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, activation checkpointing
