"""The names of a model's parameters: those of the bare model, whatever wraps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What wraps a model: the package and the class, and the child that is the model. All are known by their
# type, as a model may have a child of its own that is called so; none is imported for it.
WRAPPERS = (
    ("torch", "DataParallel", "module"),
    ("torch", "DistributedDataParallel", "module"),
    ("torch", "AveragedModel", "module"),
    ("torch", "QuantWrapper", "module"),
    ("torch", "OptimizedModule", "_orig_mod"),  # torch.compile's
    ("torch", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("apex", "DistributedDataParallel", "module"),
    ("fairscale", "ShardedDataParallel", "module"),
    ("deepspeed", "DeepSpeedEngine", "module"),
    ("timm", "ModelEmaV2", "module"),
    ("timm", "ModelEmaV3", "module"),
    ("lightning", "_FabricModule", "_forward_module"),
    ("lightning", "_FabricModule", "_original_module"),
    ("lightning_fabric", "_FabricModule", "_forward_module"),
    ("lightning_fabric", "_FabricModule", "_original_module"),
    ("peft", "PeftModel", "base_model"),
    ("peft", "PeftMixedModel", "base_model"),
    ("peft", "BaseTuner", "model"),
    ("peft", "BaseTunerLayer", "base_layer"),
    ("peft", "AuxiliaryTrainingWrapper", "original_module"),
)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Name, parameter and owner, once a parameter, in the order of `module.named_parameters()`.

    No two parameters or buffers may have one name, as wrappers that are left out could bring about.
    """
    seen = set()
    owners: dict[str, nn.Module] = {}
    for prefix, owner in walk(module):
        own = dict(owner.named_parameters(recurse=False))
        for name, tensor in (*own.items(), *owner.named_buffers(recurse=False)):
            if tensor in seen:
                continue
            seen.add(tensor)
            other = owners.setdefault(prefix + name, owner)
            if other is not owner:
                kinds = " and in ".join(f"a {type(part).__name__}" for part in (other, owner))
                raise ValueError(
                    "module must have one parameter or buffer for each name where what wraps it is left out; "
                    f"rename one, got {prefix + name} in {kinds}"
                )
            if name in own:
                yield prefix + name, tensor, owner


def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with the prefix of its names: none for what a wrapper adds.

    What a wrapper has beside the model, such as an adapter, is below the wrapper, so that several wrappers
    round one model do not meet.
    """
    seen = set()

    def below(prefix: str, bare: str, parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if parent in seen:
            return
        seen.add(parent)
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(parent, fsdp.FullyShardedDataParallel):
            raise TypeError(
                "module must keep the shapes of its parameters; use fully_shard, got a "
                "FullyShardedDataParallel, which flattens them"
            )
        wrapped = {name for name, _ in parent.named_children() if is_wrapper(parent, name)}
        own = prefix if wrapped else bare
        yield own, parent
        for name, child in parent.named_children():
            path = f"{own}{name}."
            yield from below(path, bare if name in wrapped else path, child)

    return below("", "", module)


def is_wrapper(parent: nn.Module, name: str) -> bool:
    """Whether a child is the model that its parent wraps."""
    kinds = {(package, kind) for package, kind, child in WRAPPERS if child == name}
    return bool(kinds) and any(is_kind(parent, *kind) for kind in kinds)


def is_kind(module: nn.Module, package: str, kind: str) -> bool:
    """Whether a module is of a class of this name in a package, which need not be imported for that."""
    return any(
        base.__name__ == kind and base.__module__.partition(".")[0] == package
        for base in type(module).__mro__
    )


def is_gathered(module: nn.Module) -> bool:
    """Whether fully_shard has the parameters of a module as copies now, gathered from all ranks."""
    if not is_kind(module, "torch", "FSDPModule"):
        return False
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups  # torch before 2.13
    return any(group is not None and not group.is_sharded for group in groups)
