"""A whole model: every parameter gets its own stream, keyed by its name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import nn

from gpuinit.rules import WANTED, Report, Row, find_rule, parse_rules, refuse_uncovered
from gpuinit.stream import parse_seed
from gpuinit.torch.default_rules import BATCH_NORMS, DEFAULT_RULES, EMBEDDINGS, Initializer, Rule
from gpuinit.torch.fill import draw_seed, recorded_stds
from gpuinit.torch.shards import is_dtensor, parts

CONSTANTS = (nn.init.zeros_, nn.init.ones_, nn.init.constant_)


def initialize_(
    module: nn.Module,
    seed: SupportsIndex | None = 0,
    rules: Sequence[Rule] | None = None,
    *,
    strict: bool = True,
) -> Report:
    """Fill every parameter of a model, each from a stream of its own, keyed by its fully qualified name.

    Adding a layer or changing the order of layers changes no other parameter, and no two parameters are
    alike. The weights are the same for one process and for any number of ranks, sharded or offloaded in any
    way: every rank makes its own shard, and no collective is called. For the large-model path build on meta,
    then `fully_shard`, `to_empty` and this; where weights are tied, tie them again after `to_empty`, which
    separates them.

    The default rules are `DEFAULT_RULES`:

        Linear, Conv, ConvTranspose   weight He-normal, bias 0
        MultiheadAttention            projections He-normal, biases 0
        BatchNorm, LayerNorm, ...     weight 1, bias 0
        Embedding, EmbeddingBag       weight truncated normal, standard deviation 0.02

    Whatever the rules, the padding_idx row of an embedding is set to 0, as torch does, and the running
    statistics of batch norms are reset. Other buffers are left alone: after `to_empty` compute them again.

    Args:
        module: The model, bare or in `fully_shard`, `torch.compile`, DistributedDataParallel, and with
            parameters on any device. Names are those of the bare model. A parameter with several names is
            filled once, under the first, as `named_parameters` counts them.
        seed: An integer in [0, 2**64), the same on every rank. None draws one from torch's default CPU
            generator, where no parameter is a DTensor.
        rules: Pairs (pattern, initialiser), of which the first that fits is taken. A pattern is a glob on the
            name ("*.gate.weight"), or a function (module, name) -> bool, given the module that owns the
            parameter. An initialiser is called as f(parameter), with those of seed=, name= and module= that
            it takes: `he_normal_`, `functools.partial(truncated_normal_, stddev=0.01)`,
            `torch.nn.init.zeros_`. To add to the default rules: [(pattern, initialiser), *DEFAULT_RULES].
        strict: False leaves a parameter alone that no rule covers.

    Returns:
        A row for every parameter: name, shape, dtype, rule and standard deviation; `print` shows a table.

    Raises:
        ValueError: No rule covers a parameter, and strict. Nothing is written then.
        TypeError, ValueError, RuntimeError: As for `he_normal_`, with the name of the parameter.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    chosen = parse_torch_rules(DEFAULT_RULES if rules is None else rules)
    found = list(named_parameters(module))
    if seed is None and any(is_dtensor(parameter) for _, parameter, _ in found):
        raise ValueError("seed must be given for a model with DTensors, the same on every rank, got None")
    key = parse_seed(draw_seed() if seed is None else seed)
    plan = [(name, parameter, owner, find_rule(chosen, owner, name)) for name, parameter, owner in found]
    uncovered = [name for name, _, _, initializer in plan if initializer is None]
    if strict:
        refuse_uncovered(uncovered)
    report = []
    with torch.no_grad():
        for name, parameter, owner, initializer in plan:
            rule, std = "-", None
            if initializer is not None:
                rule, std = describe(initializer), apply(initializer, parameter, key, name, owner)
            dtype = str(parameter.dtype).removeprefix("torch.")
            report.append(Row(name, tuple(parameter.shape), dtype, rule, std))
        for _, part in walk(module):
            if isinstance(part, BATCH_NORMS):
                part.reset_running_stats()
    return Report(report)


def parse_torch_rules(rules: Any) -> list[Rule]:
    pairs = parse_rules(rules)
    for pair in pairs:
        if not callable(pair[1]):
            raise TypeError(f"{WANTED}{pair!r}")
    return pairs


def apply(
    initializer: Initializer, parameter: torch.Tensor, key: int, name: str, owner: nn.Module
) -> float | None:
    """Fill one parameter; return the standard deviation where it is known."""
    token = recorded_stds.set([])
    try:
        initializer(parameter, **taken(initializer, {"seed": key, "name": name, "module": owner}))
        stds = recorded_stds.get()
    except Exception as error:
        error.add_note(f"This is parameter {name}, of a {type(owner).__name__}.")
        raise
    finally:
        recorded_stds.reset(token)
    if isinstance(owner, EMBEDDINGS) and owner.padding_idx is not None and parameter is owner.weight:
        zero_row(parameter, owner.padding_idx)
    if initializer in CONSTANTS:
        return 0.0
    return stds[-1] if stds else None


def taken(initializer: Initializer, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that an initialiser takes and that are not set by a partial."""
    try:
        parameters = inspect.signature(initializer).parameters
    except ValueError:  # a built-in function
        return {}
    fixed = getattr(initializer, "keywords", {})
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {
        word: value
        for word, value in offered.items()
        if (everything or word in parameters) and word not in fixed
    }


def describe(initializer: Initializer) -> str:
    """An initialiser as a reader knows it: "truncated_normal_(stddev=0.02274)"."""
    if not isinstance(initializer, partial):
        return str(getattr(initializer, "__name__", type(initializer).__name__))
    words = [format_argument(value) for value in initializer.args]
    words += [f"{word}={format_argument(value)}" for word, value in initializer.keywords.items()]
    return f"{describe(initializer.func)}({', '.join(words)})"


def format_argument(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def zero_row(parameter: torch.Tensor, row: int) -> None:
    _, places = parts(parameter)
    for tensor, starts in places:
        if starts[0] <= row < starts[0] + tensor.shape[0]:
            tensor[row - starts[0]].zero_()


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
