"""A whole model: every parameter gets its own stream, keyed by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import nn

from gpuinit.rules import (
    WANTED,
    Report,
    Row,
    Uncovered,
    find_rule,
    format_argument,
    noting,
    parse_rules,
    refuse_uncovered,
    spare_frozen,
    unwrap,
)
from gpuinit.stream import parse_seed
from gpuinit.tensors import is_fake, outside_graphs
from gpuinit.torch import adapters, default_rules, in_place, init
from gpuinit.torch.default_rules import (
    BATCH_NORMS,
    DEFAULT_RULES,
    Initializer,
    Rule,
    reset_buffers,
)
from gpuinit.torch.fill import check, check_owned, checking, draw_seed, recorded_stds, within
from gpuinit.torch.names import named_parameters, walk
from gpuinit.torch.padding import padded_tables, zero_row
from gpuinit.torch.recipes import run_recipe
from gpuinit.torch.shards import memory, parts
from gpuinit.torch.streams import (
    check_model,
    check_whole,
    note,
    notes_on_meta,
    owned_parameters,
    recipe_in_streams,
)

CONSTANTS = (nn.init.zeros_, nn.init.ones_, nn.init.constant_, default_rules.prelu_, default_rules.magnitude_)

# The default rules' own functions that write by `fill` alone, or check by themselves what they will write.
DRAWING = (
    default_rules.direction_,
    default_rules.he_normal_transposed_,
    default_rules.recurrent_uniform_,
    adapters.dora_magnitude_,
)

CONVOLUTIONS = nn.modules.conv._ConvNd  # transposed ones too

AXES = {"in_axis", "out_axis", "batch_axis"}

# What takes its fans from the shape, and the function of gpuinit.torch that has the same and takes axes.
FAN_RULES = {
    function: name
    for name, function in vars(in_place).items()
    if name.startswith(("he_", "glorot_", "lecun_", "variance_scaling_"))
}
FAN_RULES |= {
    function: name.rstrip("_").replace("kaiming", "he").replace("xavier", "glorot") + "_"
    for module in (nn.init, init)
    for name, function in vars(module).items()
    if name.startswith(("kaiming_", "xavier_"))
}


@outside_graphs
def initialize_(
    module: nn.Module,
    seed: SupportsIndex | None = 0,
    rules: Sequence[Rule] | None = None,
    *,
    recipe: str | Callable[[nn.Module], Any] | None = None,
    strict: bool = True,
) -> Report:
    """Fill every parameter of a model, each from a stream of its own, keyed by its fully qualified name.

    Adding a layer or changing the order of layers changes no other parameter, and no two parameters are
    alike. The weights are the same for one process and for any number of ranks, sharded or offloaded by
    `fully_shard` in any way: every rank makes its own shard, and no collective is called, but to gather what
    has a spectral norm and the bases of DoRA. For the large-model path build on meta, then `fully_shard`,
    `to_empty` and this; where weights are tied, tie them again after `to_empty`, which separates them.

    The default rules are `DEFAULT_RULES`:

        Linear, Conv, ConvTranspose   weight He-normal, bias 0
        Bilinear, Conv1D (GPT-2's)    weight He-normal, bias 0; Conv1D is (in, out)
        MultiheadAttention            projections He-normal, biases 0
        LSTM, GRU, RNN, their cells   uniform in +-1 / sqrt(hidden_size), as torch has them
        weight norm of these          direction as above, magnitude so that the variance is too
        spectral norm of these        weight as above, singular vectors found anew
        orthogonal weights            uniformly among all
        PReLU                         its own init
        LoRA of PEFT and torchtune    A uniform in +-1 / sqrt(fan_in), B 0; DoRA's norms those of the base
        BatchNorm, LayerNorm, ...     weight 1, bias 0
        other norms                   as their reset_parameters has it; without one not covered
        Embedding, EmbeddingBag       weight truncated normal, standard deviation 0.02

    They are for the parameters that torch gives a layer, by their exact names: one that a derived class adds
    is not covered. Nor are PEFT's other adapters, LoRA's where its configuration has them made otherwise, and
    its copies of layers that are trained too (modules_to_save).

    Whatever the rules, the padding_idx row of an embedding that is filled is set to 0, as torch does, also
    where a layer before it, or other embeddings, have the same table; and the running statistics of batch
    norms are reset. Other buffers are left alone: after `to_empty` compute them again. The singular vectors
    of spectral norms, the bases of orthogonal weights and the norms of DoRA are made anew where the parameter
    is filled; the bits of these three may differ between devices.

    A frozen parameter, one that does not require grad, is left alone, and the running statistics of a batch
    norm with it where all its parameters are, unless the rule that fits it is the caller's own and says more
    than "*".

    A weight of three or more axes that no convolution owns, such as a stack of experts, has fans only where
    the rule names its axes: `functools.partial(he_normal_, batch_axis=0, in_axis=2, out_axis=1)` for a stack
    of (out, in).

    Args:
        module: The model, with parameters on any device, bare or in what wraps it: `fully_shard`,
            `torch.compile`, DistributedDataParallel, AveragedModel, PEFT, DeepSpeed, timm's averages, Fabric.
            Names are those of the bare model, so that an average starts as its model does, and a base as it
            does without adapters. A parameter with several names is filled once, under the first, as
            `named_parameters` counts them.
        seed: An integer in [0, 2**64), the same on every rank. None draws one from torch's default CPU
            generator, where no parameter is a DTensor.
        rules: Pairs (pattern, initialiser), of which the first that fits is taken. A pattern is a glob on the
            name ("*.gate.weight"), or a function (module, name) -> bool, given the module that owns the
            parameter, or the layer where torch parametrises it. An initialiser is called as f(parameter),
            with those of seed=, name= and module= that it takes: `he_normal_`,
            `functools.partial(truncated_normal_, stddev=0.01)`, `torch.nn.init.zeros_`. To add to the default
            rules: [(pattern, initialiser), *DEFAULT_RULES].
            Functions that are not gpuinit's draw within `streams`, also from the seed and the name.
        recipe: "own" for what the model itself has: `initialize_weights` of transformers, as for a new model
            and with its weights tied; `init_states`, `init_weights` of torchtitan, timm and others; else
            `_init_weights` on every module, or the `reset_parameters` of the parts, which leaves out what
            constructors do beyond that. Or a function of the model. It runs in `streams`, with what it
            computes taken for replicated where the model is sharded; notes of the report say what ran. Rules
            are for the parameters that it never writes then, and there are none by default.
        strict: False leaves a parameter alone that no rule covers.

    Returns:
        A row for every parameter: name, shape, dtype, rule, standard deviation and what was written: "whole",
        "frozen", "not written", "meta, not written" for what has no memory, which a note says too, or what
        `streams` has. `print` shows a table.

    Raises:
        ValueError: No rule covers a parameter, and strict (after a recipe, which has written the others
            then); a rule has to name axes and does not; two parameters have one name where a wrapper is left
            out; or what is written would be lost: in FakeTensorMode, or where `fully_shard` has gathered.
        TypeError, ValueError, RuntimeError: As for `he_normal_`, with the name of the parameter.

    All parameters are checked before one is written, so that after an error the model is as it was; but what
    a recipe raises, or a function that is not gpuinit's, comes when its turn does.
    """
    check_model(module, seed)
    if not (recipe is None or recipe == "own" or callable(recipe)):
        raise TypeError(f'recipe must be None, "own" or a function of the model, got {recipe!r}')
    if rules is None:
        rules = DEFAULT_RULES if recipe is None else ()
    chosen = parse_torch_rules(rules)
    found = owned_parameters(module)
    for name, parameter, owner in found:
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            with noting(note(name, owner)):
                check(parameter)
    key = None if seed is None else parse_seed(seed)
    if recipe is None:
        return by_rules(module, find_rules(module, found, chosen), key, strict)
    check_whole(found)
    key = draw_seed() if key is None else key
    with recipe_in_streams(module, key, frozen_names(module)) as report:
        notes = run_recipe(module, recipe)
    unwritten = {row.name for row in report if row.written == "not written"}
    jobs = find_rules(module, owned_parameters(module), chosen)
    empty = {job.name for job in jobs if not job.parameter.numel()}
    left = [job for job in jobs if job.name in unwritten - empty]
    drawn = {job.parameter for job in jobs if job.name not in unwritten}
    filled = {row.name: row for row in by_rules(module, left, key, strict, drawn)}
    rows = [row._replace(written="whole") if row.name in unwritten & empty else row for row in report]
    return Report([filled.get(row.name, row) for row in rows], [*notes, *report.notes])


def frozen_names(module: nn.Module) -> set[str]:
    """Frozen parameters, and the buffers of modules that have no others."""
    names = {name for name, parameter, _ in named_parameters(module) if not parameter.requires_grad}
    for prefix, part in walk(module):
        own = list(part.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            names |= {prefix + name for name, _ in part.named_buffers(recurse=False)}
    return names


class Job(NamedTuple):
    """A parameter, and what fills it."""

    name: str
    parameter: torch.Tensor
    owner: nn.Module
    initializer: Initializer | None


def find_rules(
    module: nn.Module, found: Iterable[tuple[str, torch.Tensor, nn.Module]], chosen: list[Rule]
) -> list[Job]:
    """The first rule that fits, for every parameter."""
    naming = spare_frozen(chosen, DEFAULT_RULES)
    callers = [pair for pair in chosen if pair not in DEFAULT_RULES]
    peft = adapters.left_to_peft(module)
    jobs = []
    for name, parameter, owner in found:
        rules = (callers if f"{name}.".startswith(peft) else chosen) if parameter.requires_grad else naming
        jobs.append(Job(name, parameter, owner, find_rule(rules, owner, name)))
    return jobs


def by_rules(
    module: nn.Module,
    jobs: list[Job],
    key: int | None,
    strict: bool,
    drawn: set[torch.Tensor] | None = None,
) -> Report:
    """Check all, then fill all; the seed is drawn in between where there is none.

    drawn are the parameters that a recipe wrote before, where there was one.
    """
    after_recipe = drawn is not None
    if strict:
        refuse_uncovered(
            [
                Uncovered(name, tuple(parameter.shape), type(owner).__name__, suggest(parameter, owner))
                for name, parameter, owner, initializer in jobs
                if initializer is None and parameter.requires_grad
            ],
            "recipe must write every parameter, or rules cover it"
            if after_recipe
            else "rules must cover every parameter",
            [job.name for job in jobs if not job.parameter.requires_grad],
        )
    report = Report()
    filled, left = set[torch.Tensor](), set[torch.Tensor]()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for job in jobs:
            if job.initializer is not None:
                check_rule(job.initializer, job.parameter, key or 0, job.name, job.owner)
        for table, _ in padded_tables(module, {job.parameter for job in jobs if job.initializer is not None}):
            parts(table)
        key = draw_seed() if key is None else key
        if within.get() is None and any(draws_by_torch(job.initializer) for job in jobs):
            stack.enter_context(recipe_in_streams(module, key, set()))
        for name, parameter, owner, initializer in jobs:
            rule, std, written = "-", None, "not written"
            if initializer is not None:
                rule, std = describe(initializer), apply(initializer, parameter, key, name, owner)
                fake = is_fake(memory(parameter))
                written = "meta, not written" if fake else "whole"
                (left if fake else filled).add(parameter)
            elif not parameter.requires_grad:
                written = "frozen"
                left.add(parameter)
            dtype = str(parameter.dtype).removeprefix("torch.")
            report.append(Row(name, tuple(parameter.shape), dtype, rule, std, written))
        report.notes += notes_on_meta(report)
        for table, row in padded_tables(module, filled):
            zero_row(table, row)
        new = filled | (drawn or set())
        for prefix, part in walk(module):
            own = set(part.parameters(recurse=False))
            left_alone = not own & filled if after_recipe else bool(own) and own <= left
            if not (isinstance(part, BATCH_NORMS) and left_alone):
                reset_buffers(part, prefix, key, new)
    return report


def draws_by_torch(initializer: Initializer | None) -> bool:
    """Whether a function may draw that is not gpuinit's: from the streams of its parameters then."""
    function, _ = unwrap(initializer) if initializer else (None, {})
    return function is not None and not is_ours(function) and function not in CONSTANTS


def is_ours(function: Any) -> bool:
    """Whether all that it does to a tensor, it does by `fill`."""
    return function in DRAWING or getattr(function, "__module__", None) in (in_place.__name__, init.__name__)


def parse_torch_rules(rules: Any) -> list[Rule]:
    pairs = parse_rules(rules)
    for pair in pairs:
        if not callable(pair[1]):
            raise TypeError(f"{WANTED}{pair!r}")
    return pairs


def check_rule(
    initializer: Initializer, parameter: torch.Tensor, key: int, name: str, owner: nn.Module
) -> None:
    """Raise what filling would, as far as that can be known without writing."""
    function, words = unwrap(initializer)
    with noting(note(name, owner)):
        check_owned(parameter, owner, name)
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                "module must be filled in inference mode, where it was built, got it outside of that"
            )
        if parameter.ndim > 2 and not isinstance(owner, CONVOLUTIONS) and not AXES & words.keys():
            refuse_fans(initializer, tuple(parameter.shape))
        if is_ours(function):
            token = checking.set(True)
            try:
                call(initializer, parameter, key, name, owner)
            finally:
                checking.reset(token)


def refuse_fans(initializer: Initializer, shape: tuple[int, ...]) -> None:
    """Raise where a function takes its fans from the axes of a convolution's kernel."""
    function, words = unwrap(initializer)
    known = next((name for fan_rule, name in FAN_RULES.items() if fan_rule is function), None)
    if known is None:
        return
    given, ndim = [], len(shape)
    if function is getattr(in_place, known):  # torch's words are others
        given = [repr(value) for value in positional(initializer)]
        given += [f"{word}={value!r}" for word, value in words.items()]
    raise ValueError(
        "rules must name the axes of the fans where the parameter has three or more and no convolution owns "
        f"it: {with_axes(known, ndim, given)} for a stack of (out, in), "
        f"{with_axes(known, ndim, given, flipped=True)} for one of (in, out), or in_axis=1, out_axis=0 for "
        f"(out, in, *kernel), got {function.__name__} for shape {shape}"
    )


def with_axes(function: str, ndim: int, given: Sequence[str] = (), *, flipped: bool = False) -> str:
    """The text of a rule for a stack of (out, in), or of (in, out)."""
    in_axis, out_axis = (ndim - 2, ndim - 1) if flipped else (ndim - 1, ndim - 2)
    batch_axis = 0 if ndim == 3 else tuple(range(ndim - 2))
    axes = f"batch_axis={batch_axis!r}, in_axis={in_axis}, out_axis={out_axis}"
    return f"partial({', '.join([function, *given, axes])})"


def suggest(parameter: torch.Tensor, owner: nn.Module) -> str:
    """What the error for uncovered parameters has in its rules."""
    # With an axis of one it is rather a token, or a table of positions, than a stack.
    if parameter.ndim < 3 or 1 in parameter.shape or isinstance(owner, CONVOLUTIONS):
        return "initialiser"
    return with_axes("he_normal_", parameter.ndim)


def positional(initializer: Initializer) -> tuple[Any, ...]:
    """The arguments that partials give by place."""
    return (*positional(initializer.func), *initializer.args) if isinstance(initializer, partial) else ()


def call(initializer: Initializer, parameter: torch.Tensor, key: int, name: str, owner: nn.Module) -> None:
    initializer(parameter, **taken(initializer, {"seed": key, "name": name, "module": owner}))


def apply(
    initializer: Initializer, parameter: torch.Tensor, key: int, name: str, owner: nn.Module
) -> float | None:
    """Fill one parameter; return the standard deviation where it is known."""
    token = recorded_stds.set([])
    try:
        with noting(note(name, owner)):
            call(initializer, parameter, key, name, owner)
        stds = recorded_stds.get()
    finally:
        recorded_stds.reset(token)
    if initializer in CONSTANTS:
        return 0.0
    return stds[-1] if stds else None


def taken(initializer: Initializer, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that an initialiser takes and that no partial sets."""
    try:
        parameters = inspect.signature(initializer).parameters
    except ValueError:  # a built-in function
        return {}
    _, fixed = unwrap(initializer)
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
