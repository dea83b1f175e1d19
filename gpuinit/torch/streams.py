"""A model's own recipe, with every random number from the stream of the parameter that it is written to.

Below torch's functions, modules and scripts, all random numbers are made by operations that torch marks as
such (`torch.Tag.nondeterministic_seeded`). Inside `streams` they come here instead:

    on a parameter or a view of one   filled from the parameter's stream, from the places that it has there
    on a temporary                    followed, with what is computed from it, until that is written to a
                                      parameter; then made again, from a stream of that parameter
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from functools import cache
from operator import mul
from threading import Lock
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from gpuinit.distributions import Draw, Uniform, find_sampling, parse_normal, parse_number, parse_uniform
from gpuinit.rules import Report, Row, noting
from gpuinit.stream import parse_name, parse_seed, row_major
from gpuinit.tensors import is_fake, outside_graphs, overlaps, refuse_missing_memory, refuse_traced
from gpuinit.torch.adapters import magnitude_owners
from gpuinit.torch.fill import (
    SCRATCH,
    TORCH_DTYPES,
    check_fillable,
    check_owned,
    draw_seed,
    fill_part,
    within,
)
from gpuinit.torch.init import parse_truncated
from gpuinit.torch.names import is_gathered, named_parameters, walk
from gpuinit.torch.shards import is_dtensor, local_slices, memory, parts
from gpuinit.torch.views import Place, places

aten = torch.ops.aten

KNOWN = "normal_, uniform_, trunc_normal_, bernoulli_, random_, rand, randn, randint and randperm"
OPTIONS = ("dtype", "layout", "device", "pin_memory", "memory_format")
OVERWRITING = ("zero_", "fill_", "copy_", "_foreach_zero_", "_foreach_copy_")
READING = ("_local_scalar_dense", "equal", "is_nonzero")  # what Python is given a value by


class Sample(NamedTuple):
    """What a random operation draws."""

    text: str  # for the report
    draw: Draw
    # What makes the values of what is drawn, then float64, by exact operations.
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None


class Found(NamedTuple):
    """A parameter, and the part of it that a tensor is."""

    name: str
    parameter: Any
    places: list[Place]
    whole: bool  # all of it that this rank has
    shape: tuple[int, ...] = ()  # of the tensor, over all ranks

    def key(self) -> str:
        """What names the streams of temporaries: no parameter's own name, as it has an empty part."""
        if self.whole or not self.places:
            return f"{self.name}."
        # Of the part in the whole. Where an axis is cut, a part has all of it, or is no view.
        offset, strides = self.places[0].offset, self.places[0].strides
        if is_dtensor(self.parameter):
            starts = parts(self.parameter)[1][0].starts
            offset -= sum(map(mul, starts, row_major(tuple(self.parameter.shape))))
        return f"{self.name}.{offset}{list(self.shape)}{list(strides)}"


class Copy(NamedTuple):
    """What a view of a sharded parameter is where it goes across the shards, which are gathered for it."""

    storage: StorageWeakRef
    name: str
    parameter: Any
    # Of every view of it, by offset and shape: this rank's memory of what it is a copy of, where known.
    slices: dict[tuple[int, torch.Size], tuple[list[torch.Tensor], Place]]


class Write(NamedTuple):
    """What one operation did to a parameter."""

    text: str
    std: float | None
    drawn: str  # "", "directly" or "temporary"
    found: Found
    overwrites: bool = True


class Step(NamedTuple):
    """An operation on temporaries, to be run again."""

    number: int
    draws: bool
    run: Callable[[str], None]  # given the name of the stream, where it draws


class Group:
    """Temporaries whose random numbers have met, and how they were made."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.words: list[str] = []  # the same, for the report
        self.storages: dict[int, Any] = {}
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # bytes, and what they were at first

    def take(self, other: Group) -> None:
        """All that another has."""
        self.steps += other.steps
        self.words += other.words
        self.storages |= other.storages
        self.before += other.before


@outside_graphs
def streams(module: nn.Module, seed: SupportsIndex | None = 0) -> Block:
    """Run a model's own recipe with its random numbers from streams, keyed by the names of its parameters.

        with gpuinit.torch.streams(model, seed=0) as report:
            model.init_weights()
        print(report)

    It may also decorate a function, whose every call is such a block.

    Inside, every random number of torch is a function of the seed, the fully qualified name of the parameter
    that it is written to, and its place in the whole of it: not of the order of calls, of torch's seeds and
    generators, of ranks and sharding, or of how often the recipe is run. Distributions are the recipe's,
    `torch.nn.init.trunc_normal_` is one draw in one pass. Under `fully_shard` and tensor parallelism every
    rank makes its own shard, and no collective is called. A parameter that is tied has the first of its
    names, a view of a parameter the values of its places; a parameter drawn twice has the same values twice.

    What is drawn on a temporary is keyed by the parameter, and the part of it, that something computed from
    it reaches first, also where the temporary itself becomes the parameter. The operations on it are run a
    second time then; so its values must not be read before. Bits are promised for what is drawn, and for what
    the recipe computes from it by operations that are exact (a product, a copy; not log or QR).

    Args:
        module: The model, as for `initialize_`; its buffers have streams too. Meta and fake tensors are left
            alone.
        seed: An integer in [0, 2**64), the same on every rank. None draws one from torch's default CPU
            generator, where no parameter is a DTensor.

    Yields:
        The report, filled at the end of the block: a row for every parameter, and for every buffer that was
        drawn, with what was drawn and its numbers. written is "whole", "part", "temporary" for what was drawn
        on a temporary, or "not written".

    Raises:
        TypeError, ValueError: In the block, for a random operation that is not known (cauchy_, exponential_,
            dropout, ...), a dtype that cannot be drawn, a temporary whose values are read (`item`, `numpy`)
            before they reach a parameter, or one that every rank would write to its own shard; and for a
            block within a block, or a parameter to be trained that has no memory at its door.
    """
    return Block(module, seed)


class Block(ContextDecorator):
    """What `streams` gives: for one block, or for every call of a function that it decorates."""

    def __init__(self, module: nn.Module, seed: SupportsIndex | None) -> None:
        self.module, self.seed = module, seed
        self.recipe: Any = None

    def _recreate_cm(self) -> Block:
        """What the decorator enters: calls may be in several threads."""
        return Block(self.module, self.seed)

    @outside_graphs
    def __enter__(self) -> Report:
        check_model(self.module, self.seed)
        key = parse_seed(draw_seed() if self.seed is None else self.seed)
        check_whole(owned_parameters(self.module))
        recipe = recipe_in_streams(self.module, key, set())
        report = recipe.__enter__()
        self.recipe = recipe  # not of a block within this one, which is an error
        return report

    @outside_graphs
    def __exit__(self, *error: Any) -> bool | None:
        if self.recipe is None:
            raise RuntimeError("streams must be entered before it is left, got __exit__ alone")
        recipe, self.recipe = self.recipe, None
        left: bool | None = recipe.__exit__(*error)
        return left


def check_model(module: Any, seed: SupportsIndex | None) -> None:
    """Raise where it is no module, or needs a seed that all ranks share and has none."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    refuse_traced(module, "module")  # below the operations nothing of torch.jit is to be seen
    parameters = [parameter for _, parameter, _ in named_parameters(module)]
    if detect_fake_mode() is not None and not all(is_fake(memory(parameter)) for parameter in parameters):
        raise ValueError(
            "module must be filled outside of FakeTensorMode, where nothing reaches memory, got one whose "
            "parameters are not fake"
        )
    if any(is_gathered(part) for _, part in walk(module)):
        raise ValueError(
            "module must be sharded, as what is written to gathered parameters is lost; call its reshard(), "
            "got one that fully_shard has gathered"
        )
    if seed is None and any(map(is_dtensor, parameters)):
        raise ValueError("seed must be given for a model with DTensors, the same on every rank, got None")


def owned_parameters(module: nn.Module) -> list[tuple[str, torch.Tensor, nn.Module]]:
    """Name, parameter and owner. What is parametrised belongs to its layer, not to the list that keeps it."""
    layers = {
        kept: part
        for _, part in walk(module)
        if is_parametrized(part)
        for kept in part.parametrizations.values()
    } | magnitude_owners(module)
    return [
        (name, parameter, layers.get(owner, owner)) for name, parameter, owner in named_parameters(module)
    ]


def check_whole(found: list[tuple[str, torch.Tensor, nn.Module]]) -> None:
    """Raise where a parameter that a recipe may write has no memory for what it should hold."""
    for name, parameter, owner in found:
        is_lazy = isinstance(parameter, nn.parameter.UninitializedTensorMixin)  # `tensors` refuses it
        if parameter.requires_grad and not is_lazy:
            with noting(note(name, owner)):
                check_owned(parameter, owner, name)


def note(name: str, owner: nn.Module) -> str:
    return f"This is parameter {name}, of a {type(owner).__name__}."


@contextmanager
def recipe_in_streams(module: nn.Module, key: int, spared: set[str]) -> Iterator[Report]:
    """The same; parameters and buffers that are spared keep what they have, but for what is copied there."""
    if within.get() is not None:
        raise ValueError("streams must not be within other ones, got a block in a block")
    report = Report()
    mode = Streams(module, key, spared)
    token = within.set(mode)
    try:
        with one_truncated_draw(), registrations(mode.registered), Reading(mode), mode:
            yield report
        mode.settle_parameters()
    finally:
        within.reset(token)
    mode.fill(report)


@contextmanager
def one_truncated_draw() -> Iterator[None]:
    """In place of the loop that `trunc_normal_` is below. All its callers come to this one function."""
    with replacing:
        if not replaced:
            replaced.append(nn.init._no_grad_trunc_normal_)
            nn.init._no_grad_trunc_normal_ = truncated
        blocks.append(None)
    try:
        yield
    finally:
        with replacing:
            blocks.pop()
            if not blocks:
                nn.init._no_grad_trunc_normal_ = replaced.pop()


replacing = Lock()
replaced: list[Callable[..., torch.Tensor]] = []  # torch's own, while there are blocks, in any threads
blocks: list[None] = []


def truncated(
    tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> torch.Tensor:
    recipe = within.get()
    if recipe is None:  # of another thread
        original = replaced[0] if replaced else nn.init._no_grad_trunc_normal_
        return original(tensor, mean, std, a, b, generator)
    text = f"trunc_normal_{words(mean=mean)} std={std:.4g} a={a:.4g} b={b:.4g}"
    made: torch.Tensor = recipe.draw_above(tensor, Sample(text, parse_truncated(mean, std, a, b)))
    return made


@contextmanager
def registrations(called: Callable[..., None]) -> Iterator[None]:
    """Call a function where a parameter, buffer or module is set in any module."""
    hooks = nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(called),
        hooks.register_module_buffer_registration_hook(called),
        hooks.register_module_module_registration_hook(called),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Reading(TorchFunctionMode):  # type: ignore[misc]
    """Refuses what takes values out of torch by other ways than its operations."""

    WAYS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)

    def __init__(self, mode: Streams) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAYS and self.mode.groups and not self.mode.busy:
            group = self.mode.groups.get(storage_of(args[0]))
            if group is not None:
                refuse_reading(func.__name__, ", ".join(group.words))
        return func(*args, **(kwargs or {}))


class Streams(TorchDispatchMode):  # type: ignore[misc]
    """Sees every operation of torch while it is on, and is off in its own methods."""

    def __init__(self, module: nn.Module, key: int, spared: set[str]) -> None:
        super().__init__()
        self.module, self.key, self.spared = module, key, spared
        self.busy = False
        self.log: dict[str, list[Write]] = {}
        self.groups: dict[int, Group] = {}  # by storage
        self.plain: set[int] = set()  # storages of these that are no DTensor's: alike on all ranks
        # Those that were, how they were made, and whether they are alike on all ranks.
        self.settled: dict[int, tuple[StorageWeakRef, str, bool]] = {}
        self.copies: dict[int, Copy] = {}
        self.others: dict[int, tuple[StorageWeakRef, Write]] = {}  # the last write to other storages
        self.changes: Counter[int] = Counter()  # writes to a storage
        self.counts: Counter[str] = Counter()  # temporaries that reached a place
        self.number = self.lost = 0
        self.scan()

    def scan(self) -> None:
        """Find the storages of parameters and buffers."""
        self.stale = False
        self.modules = {id(part) for _, part in walk(self.module)}
        self.owners: dict[int, list[tuple[str, Any]]] = {}
        self.slots: list[tuple[dict[str, Any], str, Any, int]] = []  # where they are found, and their storage
        self.slots_of: dict[int, list[tuple[dict[str, Any], str, Any, int]]] = {}
        self.weak = []  # a number is not used again while there is a reference, though the memory is freed
        for name, tensor, names in self.tensors():
            storage = memory(tensor).untyped_storage()
            slot = (names, name.rpartition(".")[2], tensor, storage._cdata)
            self.weak.append(StorageWeakRef(storage))
            self.owners.setdefault(storage._cdata, []).append((name, tensor))
            self.slots.append(slot)
            self.slots_of.setdefault(storage._cdata, []).append(slot)

    def tensors(self) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Parameters and buffers, by name, and where their modules have them."""
        for name, parameter, owner in named_parameters(self.module):
            if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
                raise TypeError(f"module must have shapes; run it once before, got {name} uninitialized")
            if memory(parameter).layout is not torch.strided:
                raise TypeError(f"module must have dense parameters, got {name} of {parameter.layout}")
            yield name, parameter, owner._parameters
        for prefix, part in walk(self.module):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.layout is torch.strided:
                    yield prefix + name, buffer, part._buffers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.busy:
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self.random(func, args, kwargs)
        return self.follow(func, args, kwargs)

    def random(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that draws."""
        name = func.overloadpacket.__name__
        given = named(func, args, kwargs)
        sample = find_sample(func, name, given)
        if name.endswith("_"):
            return self.draw(given["self"], sample)
        if "out" in given:
            size = (given["n"],) if name == "randperm" else tuple(given["size"])
            if tuple(given["out"].shape) != size:
                given["out"].resize_(size)
            return self.draw(given["out"], sample)
        options = {word: given[word] for word in OPTIONS if given.get(word) is not None}
        if name.endswith("_like"):
            made = torch.empty_like(given["self"], **options)
        else:
            if name in ("randint", "randperm"):
                options = {"dtype": torch.int64} | options
            made = torch.empty(given["n"] if name == "randperm" else given["size"], **options)
        return self.draw(made, sample, fresh=True)

    def draw(self, tensor: Any, sample: Sample, fresh: bool = False) -> Any:
        """Fill a tensor, from the stream of the parameter that it is or looks into."""
        refuse_traced(tensor)
        local = memory(tensor)
        if is_fake(local):
            return tensor
        if sample.finish is None:
            check_fillable(tensor)
        else:
            if overlaps(local):
                raise ValueError(f"tensor must not hold elements that share memory, got shape {local.shape}")
            refuse_missing_memory(local)
        if storage_of(tensor) in self.copies:
            for part in self.local_parts(tensor, sample.text):
                self.draw(part, sample)
            copy = self.copies[storage_of(tensor)]
            self.write([copy.slices[local.storage_offset(), local.shape][1]], copy.name, sample)
            return tensor
        self.changes[storage_of(tensor)] += 1
        found = None if fresh else self.find(tensor) or self.find(tensor, again=True)
        if found is None and (names := [other.name for other in self.inside(local)]):
            raise ValueError(
                f"a draw must be on one parameter or a part of it, got one over {', '.join(names)}"
            )
        if found is None:
            self.draw_temporary(tensor, sample, fresh)
            return tensor
        if found.name in self.spared:
            return tensor
        self.settle_first(tensor, found)
        self.write(found.places, found.name, sample)
        std = None if sample.finish else sample.draw.std()
        self.note(Write(sample.text, std, "directly", found))
        if found.whole:
            self.forget(found.name)
        return tensor

    @contextmanager
    def above(self) -> Iterator[None]:
        """In what is not an operation that autograd has seen."""
        self.busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = False

    def draw_above(self, tensor: Any, sample: Sample) -> Any:
        """The same, called by a function."""
        with self.above():
            self.draw(tensor, sample)
            torch.autograd.graph.increment_version(tensor)
        return tensor

    def draw_given(self, tensor: Any, draw: Draw) -> Any:
        """What a function of gpuinit.torch draws that was given no seed."""
        return self.draw_above(tensor, Sample(draw_text(draw), draw))

    def settle_first(self, tensor: Any, found: Found) -> None:
        """Where a parameter was a temporary before: what it holds, before it is written to."""
        group = self.groups.get(storage_of(tensor))
        if group is not None:
            owner = self.find(found.parameter) or found
            self.settle(group, owner, True)
            self.note(Write(", ".join(group.words), None, "temporary", owner))

    def expect_given(self, tensor: Any) -> None:
        """Before one writes that was given a seed."""
        if storage_of(tensor) in self.groups:
            found = self.find(tensor, again=True)
            if found is None:
                raise ValueError("a seed must be for a parameter, got a temporary that holds random numbers")
            with self.above():
                self.settle_first(tensor, found)

    def note_given(self, tensor: Any, draw: Draw) -> None:
        """What one wrote that was given a seed."""
        found = self.find(tensor)
        if found is not None:
            self.note(Write(draw_text(draw), draw.std(), "directly", found))
            if found.whole:
                self.forget(found.name)

    def write(self, where: Iterable[Place], name: str, sample: Sample) -> None:
        """Fill the places from the stream of a name."""
        for place in where:
            dtype = torch.float64 if sample.finish else place.tensor.dtype
            request = (self.key, parse_name(name), *find_sampling(sample.draw, TORCH_DTYPES[dtype]))
            order = sorted(range(place.tensor.ndim), key=lambda axis: -place.strides[axis])
            strides = tuple(place.strides[axis] for axis in order)
            ordered = place.tensor.detach().permute(order)
            fill_part(ordered, place.offset, strides, request, dtype, sample.finish)

    def find(self, tensor: Any, again: bool = False) -> Found | None:
        """The parameter that this tensor is, or looks into; again where there may be new ones."""
        if self.stale or (again and not all(map(self.stands, self.slots))):
            self.scan()
        local = memory(tensor)
        number = local.untyped_storage()._cdata
        if not all(self.stands(slot) for slot in self.slots_of.get(number, ())):
            self.scan()
        for name, parameter in self.owners.get(number, ()):
            if local.element_size() != memory(parameter).element_size():
                continue
            where = places(local, parameter)
            if where is not None:
                both = is_dtensor(tensor) and is_dtensor(parameter)
                sizes = [t.numel() if both else memory(t).numel() for t in (tensor, parameter)]
                return Found(name, parameter, where, sizes[0] == sizes[1], tuple(tensor.shape))
        return None

    @staticmethod
    def stands(slot: tuple[dict[str, Any], str, Any, int]) -> bool:
        """Whether a name is still that of a tensor, and the tensor still has its memory."""
        names, key, tensor, number = slot
        return names.get(key) is tensor and memory(tensor).untyped_storage()._cdata == number

    def registered(self, module: nn.Module, *_: Any) -> None:
        """Called by torch where something is set in a module."""
        self.stale = self.stale or id(module) in self.modules

    def written(self, tensor: Any) -> list[Found]:
        """The parameters that are written where this is."""
        found = self.find(tensor)
        return self.inside(memory(tensor)) if found is None else [found]

    def inside(self, local: torch.Tensor) -> list[Found]:
        """The parameters that have memory between the first and the last element of this one."""
        first, last = span(local)
        found = []
        for name, parameter in self.owners.get(local.untyped_storage()._cdata, ()):
            memory_of = memory(parameter)
            begin, end = span(memory_of)
            if memory_of.numel() and first < end and begin < last:
                found.append(Found(name, parameter, [], first <= begin and end <= last))
        return found

    # Temporaries

    def draw_temporary(self, tensor: Any, sample: Sample, fresh: bool) -> None:
        """Fill a tensor that is in no parameter, and remember how."""
        local = memory(tensor)
        if not fresh and storage_of(tensor) in self.owners:
            raise ValueError(
                "a draw must be on a parameter, or on memory that has none, got one beside a parameter"
            )
        group = self.join([tensor])
        is_part = local.numel() * local.element_size() < local.untyped_storage().nbytes()
        if not fresh and is_part and storage_of(tensor) not in group.storages:
            group.before.append(saved(local))
        self.keep(group, tensor)

        then = tensor.detach()  # its shape, which operations like t_ may change

        def run(name: str) -> None:
            self.write(places(memory(then), then) or (), name, sample)

        self.add(group, True, sample.text, run)
        run(f"#{self.number}")  # until it is known where it goes

    def follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other operation: whether it writes to a parameter, and what it does with temporaries."""
        changed = [tensor for i in mutable(func) for tensor in tensors_in(argument(func, i, args, kwargs))]
        self.changes.update(map(storage_of, changed))
        if func.is_view and is_sharded(args[0]) and storage_of(args[0]) not in self.groups:
            return self.view(func, args, kwargs)
        if any(storage_of(tensor) in self.copies for tensor in changed):
            return self.change_copy(func, args, kwargs)
        if not changed and not self.groups and not self.settled:
            return func(*args, **kwargs)
        owned = [(found, tensor) for tensor in changed for found in self.written(tensor)]
        given = tensors_in((args, kwargs))
        drawn = [tensor for tensor in given if storage_of(tensor) in self.groups]
        name = func.overloadpacket.__name__
        copies = name == "copy_" and not drawn and not any(storage_of(t) in self.settled for t in given)
        if owned and not copies and all(found.name in self.spared for found, _ in owned):
            return args[0]
        if drawn:
            for tensor in drawn:
                if is_sharded(tensor) and storage_of(tensor) in self.plain:
                    refuse_shards(name)
            new = [tensor for tensor in changed if storage_of(tensor) not in self.groups]
            if not owned and any(self.find(tensor, again=True) for tensor in new):
                owned = [(found, tensor) for tensor in changed for found in self.written(tensor)]
            if not owned:
                return self.record(func, name, args, kwargs, given, changed, drawn)
            found = owned[0][0]
            if any(other.name != found.name for other, _ in owned):
                raise ValueError(f"random numbers must be written to one parameter at a time, got {func}")
            if any(is_sharded(found.parameter) and not is_dtensor(tensor) for _, tensor in owned):
                refuse_shards(name)
            self.settle(self.join(drawn), found, overwrites(func))
        settled = [t for t in given if storage_of(t) in self.settled]
        for tensor in settled:
            if self.settled[storage_of(tensor)][2] and any(
                is_sharded(found.parameter) and not is_dtensor(target) for found, target in owned
            ):
                refuse_shards(name)
        made_of = {self.settled[storage_of(tensor)][1]: None for tensor in settled}
        result = func(*args, **kwargs)
        text, std, anew = name, None, overwrites(func)
        if name in ("zero_", "fill_"):
            value = 0 if name == "zero_" else argument(func, 1, args, kwargs)
            text, std = f"{name}{'' if name == 'zero_' else f' {value:.4g}'}", 0.0
        if made_of:
            text = ", ".join([*made_of, name])
        for found, _ in owned:
            if found.whole and anew and not made_of:
                self.forget(found.name)
            self.note(Write(text, std, "temporary" if made_of else "", found, anew))
        for tensor in changed if not owned else ():
            storage = memory(tensor).untyped_storage()
            found = Found("", None, [], memory(tensor).numel() * tensor.element_size() == storage.nbytes())
            write = Write(text, std, "temporary" if made_of else "", found, anew)
            self.others[storage._cdata] = StorageWeakRef(storage), write
        if made_of and not owned:
            for tensor in tensors_in(result):
                made = StorageWeakRef(memory(tensor).untyped_storage())
                self.settled.setdefault(
                    storage_of(tensor), (made, ", ".join(made_of), not is_dtensor(tensor))
                )
        return result

    # Views of sharded parameters

    def view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A view of a DTensor. One across the shards is gathered: a copy, and writes to it would be lost."""
        result = func(*args, **kwargs)
        found = self.find(args[0])
        if found is None:
            return result
        cuts = None
        if found.whole and args[0].shape == found.parameter.shape:
            cuts = find_cuts(func.overloadpacket.__name__, args, kwargs)
        for i, tensor in enumerate(tensors_in(result)):
            local, storage = memory(tensor), memory(tensor).untyped_storage()
            if storage._cdata != storage_of(args[0]):
                copy = Copy(StorageWeakRef(storage), found.name, found.parameter, {})
                copy = self.copies.setdefault(storage._cdata, copy)
                if cuts is not None:
                    strides = row_major(tuple(found.parameter.shape))
                    axis, start, _ = cuts[i]
                    kept = strides if tensor.ndim == len(strides) else strides[:axis] + strides[axis + 1 :]
                    place = Place(local.detach(), start * strides[axis], kept)
                    slices = local_slices(found.parameter, *cuts[i])
                    copy.slices[local.storage_offset(), local.shape] = slices, place
        return result

    def local_parts(self, tensor: Any, text: str) -> list[torch.Tensor]:
        """The memory that a write to such a copy is meant for."""
        copy, local = self.copies[storage_of(tensor)], memory(tensor)
        slices = copy.slices.get((local.storage_offset(), local.shape))
        if slices is None:
            raise ValueError(
                "a write to a part of a sharded parameter must be to a slice of it, as others are copies, "
                f"got {text} on a part of {copy.name}"
            )
        if copy.name in self.spared:
            return []
        self.note(Write(text, None, "", Found(copy.name, copy.parameter, [], False), False))
        return slices[0]

    def change_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation in place on such a copy: on each rank's memory of these places too."""
        name = func.overloadpacket.__name__
        by_element = name in ("zero_", "fill_") or torch.Tag.pointwise in func.tags
        if not by_element or tensors_in((args[1:], kwargs)):
            copy = next(c for t in tensors_in(args) if (c := self.copies.get(storage_of(t))) is not None)
            raise ValueError(
                "a write to a part of a sharded parameter must be a draw or of one number, as the part is a "
                f"copy there, got {func} on a part of {copy.name}"
            )
        for part in self.local_parts(args[0], name):
            func(part, *args[1:], **kwargs)
        return func(*args, **kwargs)

    def record(
        self, func: Any, name: str, args: Any, kwargs: Any, given: Any, changed: Any, drawn: Any
    ) -> Any:
        """Run an operation on temporaries, and keep it."""
        if torch.Tag.inplace_view in func.tags:  # a shape changes, and no number
            return func(*args, **kwargs)
        words = ", ".join(dict.fromkeys(word for t in drawn for word in self.groups[storage_of(t)].words))
        if name in READING:
            refuse_reading(str(func), words)
        if func.namespace.startswith("_c10d_functional"):
            refuse_gathering(func)
        if "batch_norm" in name and named(func, args, kwargs).get("training"):
            raise ValueError(f"random numbers must not go through a batch norm in training, got {func}")
        for tensor in changed:
            if storage_of(tensor) in self.owners:
                raise ValueError(f"a temporary must not share memory with a parameter, got {func}")
        before = [saved(memory(tensor)) for tensor in changed if storage_of(tensor) not in self.groups]
        again = {storage_of(tensor) for tensor in changed}
        again |= {number for t in drawn for number in self.groups[storage_of(t)].storages}
        numbers = {storage_of(tensor) for tensor in given} - again
        versions = [(number, self.changes[number]) for number in numbers]
        inputs = {storage_of(tensor) for tensor in given}
        args_then, kwargs_then = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        result = func(*args, **kwargs)
        made = tensors_in(result)
        made_then = [tensor.detach() for tensor in made]
        new = [storage_of(tensor) not in inputs for tensor in made]
        if func.is_view and any(new) and is_sharded(args[0]):  # one across the shards
            refuse_gathering(func)
        group = self.join([*drawn, *changed])
        group.before += before

        def run(_: str) -> None:
            if any(self.changes[number] != before for number, before in versions):
                raise ValueError(
                    f"what is computed with random numbers must not change before they reach a parameter, "
                    f"got a change after {func}"
                )
            fresh_ones = tensors_in(func(*args_then, **kwargs_then))
            for tensor, fresh, is_new in zip(made_then, fresh_ones, new, strict=True):
                if is_new:
                    if tensor.shape != fresh.shape:
                        raise ValueError(
                            f"random numbers on temporaries must not decide a shape, got {func} after {words}"
                        )
                    tensor.copy_(fresh)

        if changed or any(new):
            self.add(group, False, name, run)
        for tensor in (*made, *changed):
            self.keep(group, tensor)
        return result

    def join(self, tensors: Iterable[Any]) -> Group:
        """The one group of all these tensors."""
        found = list({id(g): g for t in tensors if (g := self.groups.get(storage_of(t)))}.values())
        group = found[0] if found else Group()
        for other in found[1:]:
            group.take(other)
            self.groups |= dict.fromkeys(other.storages, group)
        return group

    def keep(self, group: Group, tensor: Any) -> None:
        """Count the storage of a tensor to a group."""
        storage = memory(tensor).untyped_storage()
        group.storages[storage._cdata] = storage
        self.groups[storage._cdata] = group
        self.settled.pop(storage._cdata, None)
        if not is_dtensor(tensor):
            self.plain.add(storage._cdata)

    def add(self, group: Group, draws: bool, word: str, run: Callable[[str], None]) -> None:
        """Remember an operation."""
        self.number += 1
        group.steps.append(Step(self.number, draws, run))
        if word not in group.words:
            group.words.append(word)

    def settle(self, group: Group, found: Found, anew: bool) -> None:
        """Make the temporaries of a group again, from the streams of the parameter that they reach."""
        key = found.key()
        if anew:  # what it took before is gone: running a recipe twice changes nothing
            self.counts[key] = 0
            if found.whole:
                self.forget(found.name)
        for held, before in group.before:
            held.copy_(before)
        for step in sorted(group.steps, key=lambda step: step.number):
            if step.draws:
                step.run(f"{key}#{self.counts[key]}")
                self.counts[key] += 1
            else:
                step.run("")
        for number, storage in group.storages.items():
            del self.groups[number]
            self.settled[number] = StorageWeakRef(storage), ", ".join(group.words), number in self.plain
            self.plain.discard(number)
        group.steps.clear()  # they hold the temporaries, and the group
        group.before.clear()

    def settle_parameters(self) -> None:
        """At the end: temporaries that have become parameters."""
        self.scan()
        with torch.no_grad():
            for name, parameter, _ in self.tensors():
                group = self.groups.get(storage_of(parameter))
                if group is None:
                    continue
                if is_sharded(parameter) and storage_of(parameter) in self.plain:
                    refuse_shards(name)
                found = self.find(parameter)
                if found is not None:
                    self.settle(group, found, True)
                    self.note(Write(", ".join(group.words), None, "temporary", found))
        self.lost = sum(step.draws for group in set(self.groups.values()) for step in group.steps)

    def forget(self, name: str) -> None:
        """A parameter is written anew: what reached it before is gone."""
        for key in [key for key in self.counts if key.startswith(f"{name}.")]:
            del self.counts[key]

    def note(self, write: Write) -> None:
        """Remember a write for the report; what it writes over is forgotten."""
        if write.found.whole and write.overwrites:
            self.log.pop(write.found.name, None)
        self.log.setdefault(write.found.name, []).append(write)

    def fill(self, report: Report) -> None:
        """The rows and the notes."""
        parameters = {name for name, _, _ in named_parameters(self.module)}
        for name, tensor, _ in self.tensors():
            writes = self.log.get(name, [])
            if not writes and (found := self.find(tensor)) is not None:  # a view of another one
                writes = self.log.get(found.name, [])
            if not writes and storage_of(tensor) in self.others:  # one that has become a parameter since
                writes = [self.others[storage_of(tensor)][1]]
            if name in parameters or any(write.drawn for write in writes):
                report.append(row_of(name, tensor, writes))
        spared = [row.name for row in report if row.name in self.spared and row.written == "not written"]
        if spared:
            report.notes.append(f"Left alone, as they are frozen: {listing(spared)}.")
        missing = [row.name for row in report if row.written == "not written" and row.name not in self.spared]
        if missing:
            report.notes.append(f"The recipe never wrote {listing(missing)}.")
        report.notes += notes_on_meta(report)
        temporary = [row.name for row in report if row.written == "temporary"]
        if temporary:
            report.notes.append(f"Drawn on temporaries: {listing(temporary)}.")
        if self.lost:
            report.notes.append(f"{self.lost} draws on temporaries reached no parameter and no buffer.")


def listing(names: list[str]) -> str:
    """The first five, and how many more there are: the rows have them all."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def notes_on_meta(report: Report) -> list[str]:
    """What to do where there was nothing to write to."""
    names = [row.name for row in report if row.written == "meta, not written"]
    remedy = "Give them memory first, by to_empty or accelerate's remove_hook_from_submodules."
    return [f"Not written, as they are on meta or fake: {listing(names)}. {remedy}"] if names else []


def row_of(name: str, tensor: Any, writes: list[Write]) -> Row:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if not any(write.drawn or write.overwrites for write in writes) or is_fake(memory(tensor)):
        written = "meta, not written" if is_fake(memory(tensor)) else "not written"
        return Row(name, shape, dtype, "-", None, written)
    last = max((i for i, write in enumerate(writes) if write.drawn), default=-1)
    told = [write for write in writes if write.drawn] if last >= 0 else writes
    # What was done afterwards to the drawn numbers, as by a recipe of several steps in place.
    after = [write for write in writes[last + 1 :] if last >= 0 and write.found.whole]
    texts = list(dict.fromkeys(write.text for write in (*told, *after)))
    std = told[0].std if len(texts) == 1 else None
    covered = {
        (place.offset, place.tensor.shape, place.strides) for write in writes for place in write.found.places
    }
    whole = any(write.found.whole for write in writes)
    local = memory(tensor).numel()
    whole = whole or 0 < local <= sum(shape.numel() for _, shape, _ in covered)
    written = "whole" if whole else "part"
    if any(write.drawn == "temporary" for write in writes):
        written = "temporary"
    return Row(name, shape, dtype, ", ".join(texts), std, written)


def find_cuts(name: str, args: Any, kwargs: Any) -> list[tuple[int, int, int]] | None:
    """Axis, start and length of every output of an operation that cuts a tensor; None for others."""
    tensor: Any = args[0]
    rest: list[Any] = [*args[1:], *kwargs.values()]
    if name == "select":
        axis, index = rest
        return [(axis % tensor.ndim, index % tensor.shape[axis], 1)]
    if name == "slice":
        defaults: list[Any] = [0, None, None, 1]
        axis, start, end, step = rest + defaults[len(rest) :]
        first, last, step = slice(start, end, step).indices(tensor.shape[axis])
        return [(axis % tensor.ndim, first, max(0, last - first))] if step == 1 else None
    if name == "unbind":
        axis = rest[0] if rest else 0
        return [(axis % tensor.ndim, i, 1) for i in range(tensor.shape[axis])]
    if name in ("split", "split_with_sizes"):
        size, axis = (*rest, 0)[:2]
        length = tensor.shape[axis]
        sizes = [size] * -(-length // size) if isinstance(size, int) else size
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        ends = [*starts[1:], length]
        return [(axis % tensor.ndim, start, end - start) for start, end in zip(starts, ends, strict=True)]
    return None


def find_sample(func: Any, name: str, given: dict[str, Any]) -> Sample:
    """What a random operation draws, by torch's own names of its arguments."""
    overload = func._overloadname
    if name == "normal_" or (name == "normal" and overload.startswith("float_float")):
        mean, std = given.get("mean", 0.0), given.get("std", 1.0)
        return Sample(f"normal_{words(mean=mean)} std={std:.4g}", parse_normal(std, mean, name="std"))
    if name == "uniform_":
        low, high = given.get("from", 0.0), given.get("to", 1.0)
        return Sample(f"uniform_ {low:.4g} to {high:.4g}", parse_uniform((low, high), names=("a", "b")))
    if name in ("randn", "randn_like"):
        return Sample(name, parse_normal(1.0, 0.0, name="std"))
    if name in ("rand", "rand_like"):  # [0, 1), up to the number before 1
        dtype = given.get("dtype") or (given["self"].dtype if "self" in given else torch.get_default_dtype())
        top = 1 - torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 1.0
        return Sample(name, parse_uniform((0.0, top)))
    if name == "bernoulli_" and overload == "float":
        p = parse_number("p", given.get("p", 0.5), least=0)
        return Sample(f"bernoulli_ p={p:.4g}", UNIT, lambda u: (u < p) | (p >= 1))
    if name == "random_" and given.get("to") is not None:
        return integers(name, given.get("from", 0), given["to"])
    if name in ("randint", "randint_like") and "Tensor" not in overload:
        return integers(name, given.get("low", 0), given["high"])
    if name == "randperm":
        if given["n"] > SCRATCH:
            raise ValueError(f"n must be at most 2**21 in streams, got {given['n']!r}")
        return Sample(name, UNIT, lambda u: u.argsort(stable=True))
    raise ValueError(f"a recipe in streams must draw by {KNOWN}, got {func}")


UNIT = parse_uniform((0.0, 1.0))


def integers(name: str, low: int, high: int) -> Sample:
    """All of [low, high) alike, as far as 53 bits can divide them."""
    count = high - low
    if not 0 < count <= 2**53:
        raise ValueError(f"high must be beyond low, by at most 2**53, got {low!r} and {high!r}")
    draw = parse_uniform((0.0, float(count)))
    return Sample(f"{name} {low} to {high}", draw, lambda u: u.floor_().clamp_(max=count - 1).add_(low))


def words(mean: float) -> str:
    return f" mean={mean:.4g}" if mean else ""


def draw_text(draw: Draw) -> str:
    """As the recipe of a model would have it: "normal std=0.02"."""
    if isinstance(draw, Uniform):
        return f"uniform {draw.low:.4g} to {draw.high:.4g}"
    text = f"normal{words(draw.mean)} std={draw.stddev:.4g}"
    bounds = (draw.lower, draw.upper)
    return (
        text if bounds == (-math.inf, math.inf) else f"truncated {text} in {bounds[0]:.4g} to {bounds[1]:.4g}"
    )


def span(local: torch.Tensor) -> tuple[int, int]:
    """Where its first element lies in the storage, and where the last one ends."""
    reach = sum((length - 1) * stride for length, stride in zip(local.shape, local.stride(), strict=True))
    return local.storage_offset(), local.storage_offset() + reach + 1


def storage_of(tensor: Any) -> int:
    """A number of its storage; 0 where it has none of its own, as a sparse one."""
    local = memory(tensor)
    return local.untyped_storage()._cdata if local.layout is torch.strided else 0


def tensors_in(value: Any) -> list[Any]:
    return [leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor)]


@cache
def mutable(func: Any) -> tuple[int, ...]:
    """The places of the arguments that an operation writes to."""
    arguments = func._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def overwrites(func: Any) -> bool:
    """Whether an operation leaves nothing of what it writes to."""
    return func.overloadpacket.__name__ in OVERWRITING or func._overloadname.endswith("out")


def argument(func: Any, i: int, args: Any, kwargs: Any) -> Any:
    return args[i] if i < len(args) else kwargs.get(func._schema.arguments[i].name)


def named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments that were given, by their names."""
    names = (argument.name for argument in func._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def is_sharded(tensor: Any) -> bool:
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def saved(local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All bytes of its storage, and what they are now."""
    held = torch.empty(0, dtype=torch.uint8, device=local.device).set_(local.untyped_storage())
    return held, held.clone()


def refuse_reading(what: str, words: str) -> None:
    raise ValueError(
        "a random number must reach a parameter before its value is read, as it depends on the name of that; "
        f"draw on the parameter itself, got {what} after {words}"
    )


def refuse_gathering(func: Any) -> None:
    raise ValueError(f"random numbers must not be gathered before they reach a parameter, got {func}")


def refuse_shards(name: str) -> None:
    raise ValueError(
        "random numbers on a plain temporary must not become one rank's shard, as all ranks draw the same; "
        f"draw on the parameter, or on an empty_like of it, got {name}"
    )
