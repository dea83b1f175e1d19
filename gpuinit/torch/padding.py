"""The padding rows of embeddings, which are 0 whoever else has the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized

from gpuinit.tensors import is_fake
from gpuinit.torch.names import walk
from gpuinit.torch.shards import memory, parts

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def padded_tables(module: nn.Module, filled: set[torch.Tensor]) -> Iterator[tuple[Any, int]]:
    """What holds a padding row of a table that is filled, and which row.

    A table may be tied: to a layer that has it first, or to other embeddings, each with a row of its own. It
    may also be a view of a parameter, or be made from one.
    """
    for _, part in walk(module):
        if not isinstance(part, EMBEDDINGS) or part.padding_idx is None:
            continue
        table = find_table(part, filled)
        if table is not None:
            yield table, part.padding_idx


def find_table(embedding: Any, filled: set[torch.Tensor]) -> Any:
    """What is to have a row of 0, or None where none of it is filled."""
    if is_parametrized(embedding, "weight"):
        steps = embedding.parametrizations.weight
        made = dict(steps.named_parameters(recurse=False))
        names: tuple[str, ...] = ("original0", "original1")
        if not isinstance(steps[0], _WeightNorm):
            names = ("original",)
            if not steps.is_tensor and filled.intersection(made.values()):
                raise ValueError(no_row(steps, made.values()))
    else:
        steps, made = None, dict(embedding.named_parameters(recurse=False))
        names = ("weight", "weight_g", "weight_v", "weight_orig")  # the latter of hooks of torch.nn.utils
    found = [made[name] for name in names if name in made]
    if not found:  # no parameter: a buffer, or an attribute
        weight = vars(embedding).get("weight", embedding._buffers.get("weight"))
        return weight if isinstance(weight, torch.Tensor) and lies_in(weight, filled) else None
    if not filled.intersection(found):
        return None
    if len(found) == 2:  # the norms of rows, of which one may be 0, or the directions below norms of columns
        return found[0] if found[0].ndim and len(found[0]) == embedding.num_embeddings else found[1]
    if steps is None or isinstance(steps[0], _SpectralNorm):  # a look at the weight would change its vectors
        return found[0]
    wanted = no_row(steps, found)
    try:
        weight = embedding.weight
        if lies_in(weight, filled):  # as a transpose does
            return weight
        fits = weight.shape == found[0].shape and not isinstance(steps[0], _Orthogonal)
        if fits and not is_fake(memory(weight)):
            fits = keeps_row(steps, found[0], embedding.padding_idx)
    except Exception as error:
        raise ValueError(f"{wanted}, which raises {type(error).__name__}") from error
    if not fits:
        raise ValueError(wanted)
    return found[0]


def no_row(steps: Any, originals: Iterable[torch.Tensor]) -> str:
    shapes = " and ".join(str(tuple(original.shape)) for original in originals)
    return (
        "padding_idx must be None where no row of a parameter makes that of the table 0, got a table made by "
        f"{type(steps[0]).__name__} from shape {shapes}"
    )


def keeps_row(steps: Iterable[Any], original: Any, row: int) -> bool:
    """Whether a parametrisation makes a row of 0 from one: tried on ones, whatever the memory holds now."""
    table = torch.ones_like(original.detach())
    zero_row(table, row)
    for step in steps:
        table = step(table)
    return not any(found.any() for found in local_rows(table, row))


def lies_in(view: torch.Tensor, owners: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor shares the memory of one of these."""
    storage = storage_number(view)
    return storage != 0 and any(storage == storage_number(owner) for owner in owners)


def storage_number(tensor: Any) -> int:
    """A number of its storage; 0 where it has none of its own, as a sparse or a fake one."""
    local = memory(tensor)
    return local.untyped_storage()._cdata if local.layout is torch.strided and not local.is_meta else 0


def zero_row(table: Any, row: int) -> None:
    """Set a row to 0 where this rank has it. A negative one counts from the end, as in torch."""
    for found in local_rows(table, row):
        found.zero_()


def local_rows(table: Any, row: int) -> Iterator[torch.Tensor]:
    """What this rank has of a row."""
    row += table.shape[0] if row < 0 else 0
    for part, starts in parts(table)[1]:
        if starts[0] <= row < starts[0] + part.shape[0]:
            yield part[row - starts[0]]
