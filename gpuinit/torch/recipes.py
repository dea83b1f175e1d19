"""A model's own recipe: what initialises it again, once it is built."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from types import FunctionType
from typing import Any

import torch
from torch import nn

from gpuinit.torch.adapters import check_adapters, reset_adapters
from gpuinit.torch.names import is_wrapper, named_parameters, walk
from gpuinit.torch.padding import EMBEDDINGS, zero_row
from gpuinit.torch.shards import is_dtensor

# Of a whole model: torchtitan's; timm's and many a model's.
WHOLE = ("init_states", "init_weights", "initialize_weights", "_init_weights")
EACH = ("_init_weights", "init_weights")  # given one module after the other: minGPT's and timm's
GIVEN = ("module", "m", "layer", "mod", "submodule")  # what they call it
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
    """What the parts have, then what they are in has, as when it was built."""
    done: dict[str, None] = {}  # notes, each once
    seen: set[nn.Module] = set()
    top = bare(module)
    tied = tied_tables(module)
    check_adapters(module)

    def visit(part: nn.Module) -> None:
        if part in seen:
            return
        seen.add(part)
        name = bare_class(part).__name__
        if is_transformers(part):
            done.update(dict.fromkeys(run_transformers(part)))
            return
        if is_torchtitan(part):  # it goes to all parts by itself
            part.init_states()
            done[f"Ran {name}.init_states."] = None
            return
        for child in part.children():  # before what has them, as in a constructor
            visit(child)
        own, whole, each = entry(part, OWN), entry(part, WHOLE), entry(part, EACH, GIVEN)
        if own:
            getattr(part, own)()
            zero_padding(tied, part)
        if whole:
            getattr(part, whole)()
            done[f"Reset the parts of {name}, then ran its {whole}."] = None
        elif each:
            part.apply(getattr(part, each))
            done[f"Reset the parts of {name}, then ran its {each} on each; its constructor may do more."] = (
                None
            )
        elif found := [entry for entry in (*WHOLE, *OWN) if entry != own and find_method(part, entry)]:
            done[f"{name}.{found[0]} needs arguments and was not run; give a function as the recipe."] = None
        elif part is top and not own:
            done[
                f"Reset the parts of {name}, which has no recipe of its own; its constructor may do more."
            ] = None

    visit(module)
    return [*done, *reset_adapters(module)]


def tied_tables(module: nn.Module) -> dict[torch.Tensor, list[Any]]:
    """The embeddings with a padding row that share their table with other modules."""
    owners = Counter(table for _, part in walk(module) for table in part.parameters(recurse=False))
    found: dict[torch.Tensor, list[Any]] = {}
    for _, part in walk(module):
        if isinstance(part, EMBEDDINGS) and part.padding_idx is not None:
            table = part._parameters.get("weight")
            if table is not None and owners[table] > 1:
                found.setdefault(table, []).append(part)
    return found


def zero_padding(tied: dict[torch.Tensor, list[Any]], part: nn.Module) -> None:
    """Set the padding rows to 0 again that another owner of the table has written."""
    for table in part.parameters(recurse=False):
        for embedding in tied.get(table, ()):
            zero_row(table, embedding.padding_idx)


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


def entry(module: nn.Module, names: tuple[str, ...], given: tuple[str, ...] = ()) -> str | None:
    """The first of these methods that the module has and that needs no argument, or one of these names."""
    for name in names:
        method = find_method(module, name)
        if method is None:
            continue
        arguments = list(inspect.signature(method).parameters.values())
        needed = [
            a for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)
        ]
        if not (needed or given) or (len(needed) == 1 and needed[0].name in given):
            return name
    return None


def find_method(module: nn.Module, name: str) -> Any:
    """A method of the class, of any kind; not what an instance has been given, or a property."""
    kind = inspect.getattr_static(type(module), name, None)
    is_method = isinstance(kind, FunctionType | staticmethod | classmethod | partialmethod)
    return getattr(module, name) if is_method else None


def is_torchtitan(module: nn.Module) -> bool:
    titan = sys.modules.get("torchtitan.protocols.module")
    return titan is not None and isinstance(module, titan.Module)


def is_transformers(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def run_transformers(model: Any) -> list[str]:
    """`initialize_weights` of transformers, as of a model that is new, with its weights tied."""
    theirs: Any = sys.modules["transformers.modeling_utils"]
    original = bare_class(model)
    # One that is overridden does more.
    name = (
        "initialize_weights"
        if original.init_weights is theirs.PreTrainedModel.init_weights
        else "init_weights"
    )
    notes = [f"Ran {original.__name__}.{name}."]
    # to_empty has untied them; a recipe may write both, and which one is last is the recipe's.
    model.tie_weights()
    for part in model.modules():  # what is marked so, by tying too, would be skipped
        for marked in (part, *part.parameters(recurse=False), *part.buffers(recurse=False)):
            vars(marked).pop("_is_hf_initialized", None)
    with as_transformers_own(model) as note:
        getattr(model, name)()
    tied = tied_tables(model)
    for part in model.modules():  # a new model ties its weights afterwards
        zero_padding(tied, part)
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
