"""A model's own recipe: what initialises it again, once it is built."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gpuinit.torch.names import is_wrapper, named_parameters
from gpuinit.torch.shards import is_dtensor

WHOLE = ("init_states", "init_weights", "initialize_weights")  # torchtitan's; timm's and many a model's
EACH = ("_init_weights", "init_weights")  # given one module after the other: minGPT's and timm's
OWN = ("reset_parameters", "_reset_parameters")  # of one layer: torch's, and those of its attention


def run_recipe(module: nn.Module, recipe: Any) -> list[str]:
    """Run a recipe, which is "own" or a function of the model; return what is to be said of it."""
    with torch.no_grad(), ExitStack() as stack:
        if any(is_dtensor(parameter) for _, parameter, _ in named_parameters(module)):
            from torch.distributed.tensor.experimental import implicit_replication

            # What a recipe computes is alike on all ranks: beside a DTensor, a replicated one.
            stack.enter_context(implicit_replication())
        if recipe != "own":
            recipe(module)
            return []
        return run_own(module)


def run_own(module: nn.Module) -> list[str]:
    """The entry of the model, or else those of its parts."""
    done: dict[str, None] = {}  # notes, each once
    seen: set[nn.Module] = set()

    def visit(part: nn.Module) -> None:
        if part in seen:
            return
        seen.add(part)
        if is_transformers(part):
            done.update(dict.fromkeys(run_transformers(part)))
            return
        whole = entry(part, WHOLE, 0)
        if whole is not None:
            getattr(part, whole)()
            done[f"Ran {bare_class(part).__name__}.{whole}."] = None
            return
        each = entry(part, EACH, 1)
        if each is not None:
            part.apply(getattr(part, each))
            done[f"Ran {bare_class(part).__name__}.{each} on every module; its constructor may do more."] = (
                None
            )
            return
        for child in part.children():
            visit(child)
        own = entry(part, OWN, 0)  # after those of its children, as in a constructor
        if own is not None:
            getattr(part, own)()
        elif part is bare(module):
            done[
                f"{bare_class(part).__name__} has no recipe to run again: its parts were reset one by one, "
                "without what its constructor does beyond that."
            ] = None

    visit(module)
    return list(done)


def bare(module: nn.Module) -> nn.Module:
    """What wrappers such as that of torch.compile hold."""
    for name, child in module.named_children():
        if is_wrapper(module, name):
            return bare(child)
    return module


def bare_class(module: nn.Module) -> Any:
    """The class, without what fully_shard puts before it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapper = () if fsdp is None else fsdp.FSDPModule
    return next(base for base in type(module).__mro__ if not issubclass(base, wrapper))


def entry(module: nn.Module, names: tuple[str, ...], required: int) -> str | None:
    """The first of these methods that the module has, and that needs so many arguments."""
    for name in names:
        method = getattr(type(module), name, None)
        if not inspect.isfunction(method):
            continue
        arguments = list(inspect.signature(method).parameters.values())[1:]
        needed = [
            a for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)
        ]
        if len(needed) == required:
            return name
    return None


def is_transformers(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def run_transformers(model: Any) -> list[str]:
    """`initialize_weights` of transformers, as of a model that is new, with its weights tied."""
    notes = [f"Ran {bare_class(model).__name__}.initialize_weights."]
    for part in model.modules():  # what is marked so, would be skipped
        for marked in (part, *part.parameters(recurse=False), *part.buffers(recurse=False)):
            vars(marked).pop("_is_hf_initialized", None)
    # to_empty has untied them; a recipe may write both, and which one is last is the recipe's.
    model.tie_weights()
    with as_transformers_own(model) as note:
        model.initialize_weights()
    model.tie_weights()
    return notes + note


@contextmanager
def as_transformers_own(model: Any) -> Iterator[list[str]]:
    """Under fully_shard the class has a new name and a new module, which transformers takes for a user's own
    model: it would skip all modules that own no parameter, GPT-2's with its scaled projections among them.
    """
    original = bare_class(model)
    if original is type(model):
        yield []
        return
    model.is_custom_code = original.is_custom_code
    try:
        yield [f"Under fully_shard {original.__name__} was taken for what it is, not for custom code."]
    finally:
        del model.is_custom_code
