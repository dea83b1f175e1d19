"""What the axes of a kernel mean: told by its nnx module, its name or its bias, and never guessed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax

import gpuinit
from gpuinit.initializers import find_draw
from gpuinit.rules import GROUPS_SHOWN, Uncovered, find_globs, unwrap

Shape = tuple[int, ...]

# The functions that take their fans from the axes.
FAN_RULES = (
    gpuinit.he_normal,
    gpuinit.he_uniform,
    gpuinit.glorot_normal,
    gpuinit.glorot_uniform,
    gpuinit.lecun_normal,
    gpuinit.lecun_uniform,
    gpuinit.variance_scaling,
)

# What lies beside a kernel of this name; the last two are Equinox's, in cells.
BIASES = {"kernel": "bias", "w": "b", "weight": "bias", "weight_ih": "bias", "weight_hh": "bias"}


class Axes(NamedTuple):
    """As the functions of gpuinit take them."""

    in_axis: tuple[int, ...]
    out_axis: tuple[int, ...]
    batch_axis: tuple[int, ...] = ()


DEFAULT = Axes((-2,), (-1,))  # (*kernel, in, out)
TRANSPOSED = Axes((-1,), (-2,))  # (*kernel, out, in)


class Neighbours(NamedTuple):
    """What lies round a leaf."""

    shapes: Mapping[str, Shape]  # of all leaves, by name
    unstacked: set[str]  # modules which no nn.scan and no nn.vmap stacks
    modules: Mapping[tuple[Any, ...], Any]  # nnx modules, by path


def find_neighbours(tree: Any, shapes: Mapping[str, Shape]) -> Neighbours:
    return Neighbours(shapes, find_unstacked(shapes), dict(find_modules(tree)))


def find_unstacked(shapes: Mapping[str, Shape]) -> set[str]:
    """Modules with a bias of one axis or a kernel of two in or below them: in a stack it would have more."""
    found = set[str]()
    for name, shape in shapes.items():
        module, _, own = name.rpartition("/")
        if (own in BIASES.values() and len(shape) == 1) or (own in BIASES and len(shape) == 2):
            found |= {"", *accumulate(module.split("/"), "{}/{}".format)}
    return found


def find_modules(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The nnx modules of a pytree and their paths."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    if isinstance(tree, nnx.Module):
        yield path, tree

    def is_below(node: Any) -> bool:
        return node is not tree and isinstance(node, nnx.Module)

    for below, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_below)[0]:
        if is_below(node):
            yield from find_modules(node, (*path, *below))


# What is known


def with_axes(
    initializer: Callable[..., Any], name: str, path: tuple[Any, ...], around: Neighbours, dtype: Any
) -> Callable[..., Any] | None:
    """The initialiser with the axes that this leaf has, or None where they cannot be told.

    What takes no fans, or names axes itself, stays as it is. Where several readings of the axes are left that
    give the same distribution, any is right.
    """
    function, words = unwrap(initializer)
    if function not in FAN_RULES or words.keys() & set(Axes._fields):
        return initializer
    shape = around.shapes[name]
    found = readings(name, around, around.modules.get(path[:-1]))
    made = [initializer if axes == DEFAULT else partial(initializer, **axes._asdict()) for axes in found]
    draws = [find_draw(fill, shape, name=name, dtype=dtype) for fill in made]
    return made[0] if draws and all(draw == draws[0] for draw in draws) else None


def readings(name: str, around: Neighbours, module: Any) -> list[Axes]:
    """What the axes may mean; nothing where that is not known."""
    shape = around.shapes[name]
    own = name.rpartition("/")[2]
    told = axes_of_module(module, shape) if own == "kernel" else None
    if told is None and len(shape) > 2:
        told = axes_of_attention(name, around.shapes)
    if told is not None:
        return [told]
    bias = match_bias(shape, around.shapes.get(f"{name.removesuffix(own)}{BIASES.get(own)}"))
    if len(shape) < 2 or (len(shape) == 2 and "einsum" not in words_of(name)):  # the equation has any order
        return [DEFAULT, TRANSPOSED] if bias == (0,) else [DEFAULT]
    if is_convolution(name, around, bias):
        return [DEFAULT]
    if bias is None:
        return []
    # Every weight of the bias is one output, of one layer of a stack. What is left are inputs and receptive
    # field: fan_in is known, fan_out is not, so here it is once the least that it may be, once the most.
    rest = tuple(axis for axis in range(len(shape)) if axis not in bias)
    return [Axes(rest, (), bias), Axes((), bias)]


def match_bias(shape: Shape, bias: Shape | None) -> tuple[int, ...] | None:
    """The axes of a kernel that its bias has, among them one of the last two."""
    if bias is None or not 0 < len(bias) <= len(shape):
        return None
    for lengths in (bias, [length for length in bias if length != 1]):  # Haiku's may be (out, 1, 1)
        left = list(range(len(shape)))
        for length in reversed(lengths):
            axis = next((axis for axis in reversed(left) if shape[axis] == length), None)
            if axis is None:
                break
            left.remove(axis)
        else:
            found = tuple(axis for axis in range(len(shape)) if axis not in left)
            if left and found and found[-1] >= len(shape) - 2:
                return found
    return None


def axes_of_module(module: Any, shape: Shape) -> Axes | None:
    """As an nnx module of Flax has them. Axes by which nnx.vmap and nnx.scan stack it count for no fan."""
    nnx: Any = sys.modules.get("flax.nnx")
    if module is None or nnx is None:
        return None
    if isinstance(module, nnx.Conv):
        return place(shape, module.kernel_shape, DEFAULT)
    if isinstance(module, nnx.ConvTranspose):
        return place(shape, module.kernel_shape, TRANSPOSED if module.transpose_kernel else DEFAULT)
    if isinstance(module, nnx.Linear):
        return place(shape, (module.in_features, module.out_features), DEFAULT)
    if isinstance(module, nnx.LinearGeneral):
        batch = tuple(module.batch_axis.values())
        base = (*batch, *module.in_features, *module.out_features)
        axes = tuple(range(len(base)))
        first = len(base) - len(module.out_features)
        return place(shape, base, Axes(axes[len(batch) : first], axes[first:], axes[: len(batch)]))
    if isinstance(module, nnx.Einsum):
        operands, _, result = module.einsum_str.replace("...", "").partition("->")
        data, _, kernel = operands.partition(",")
        roles = ["in" if x not in result else "batch" if x in data else "out" for x in kernel]
        inputs, outputs, batch = (
            tuple(axis for axis, found in enumerate(roles) if found == role)
            for role in ("in", "out", "batch")
        )
        return place(shape, module.kernel_shape, Axes(inputs, outputs, batch))
    return None


def place(shape: Shape, base: Shape, axes: Axes) -> Axes | None:
    """The axes of a layer of shape `base`, in a stack of such layers or alone."""
    if shape == tuple(base):
        return axes
    places, axis = list[int](), len(shape)
    for length in reversed(base):
        axis = next((at for at in reversed(range(axis)) if shape[at] == length), -1)
        if axis < 0:
            return None
        places.insert(0, axis)
    inputs, outputs, batch = (tuple(places[at] for at in given) for given in axes)
    return Axes(inputs, outputs, (*batch, *(at for at in range(len(shape)) if at not in places)))


def axes_of_attention(name: str, shapes: Mapping[str, Shape]) -> Axes | None:
    """Those of Flax's: (*stack, features, heads, head_dim), of out (*stack, heads, head_dim, features).

    The names alone would not do, as convolutions are called so too: the shapes of all four must agree.
    """
    *scope, role, own = ["", *name.split("/")]
    roles = ("query", "key", "value", "out")
    query, key, value, out = (shapes.get("/".join([*scope[1:], part, own]), ()) for part in roles)
    stacks = {(len(part), part[:-3]) for part in (query, key, value, out)}
    if role not in roles or len(stacks) > 1 or not query[-2:] == key[-2:] == value[-2:] == out[-3:-1]:
        return None
    first = len(query) - 3
    stack = tuple(range(first))
    if role == "out":
        return Axes((first, first + 1), (first + 2,), stack)
    return Axes((first,), (first + 1, first + 2), stack)


CONVOLUTIONS = {"conv", "convs", "convolution", "convolutions"}

# Words in the names of those whose kernels may be (*kernel, out, in), or differ from place to place.
OTHER_CONVOLUTIONS = {"transpose", "transposed", "t", "up", "upsample", "local", "scan", "vmap"}


def is_convolution(name: str, around: Neighbours, bias: tuple[int, ...] | None) -> bool:
    """Whether a module is called a convolution, "Conv_0", "conv_init" or "conv2_d", and none that is stacked.

    A kernel of three axes is not: a convolution goes along one axis at least. One of more could be a stack of
    others, even beside what is not stacked; without a bias the field has to be square, or along one axis.
    """
    scope, _, module = name.rpartition("/")[0].rpartition("/")
    words = words_of(name)
    ndim = len(around.shapes[name])
    if not words & CONVOLUTIONS or words & OTHER_CONVOLUTIONS or bias not in (None, (ndim - 1,)):
        return False
    rank = re.search(r"conv([123])_?d(?![a-z])", module.lower())
    if rank is not None:
        return ndim == int(rank[1]) + 2
    square = len(set(around.shapes[name][:-2]) - {1}) <= 1
    return ndim == 3 or bias is not None or (scope in around.unstacked and square)


def words_of(name: str) -> set[str]:
    """The words in the name of a leaf's module: "std" and "conv" for "block/StdConv_0/kernel"."""
    module = name.rpartition("/")[0].rpartition("/")[2]
    return {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", module)}


def is_recurrent(name: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a kernel (*kernel, units, gates * units) of a cell of Flax or Haiku is that of its state.

    Beside it is the one of the input: "ii" beside "hi" in an LSTM, "dense_i" beside "dense_h".
    """
    *scope, module, own = ["", *name.split("/")]
    shape = shapes[name]
    if len(shape) < 2 or not shape[-2] or shape[-1] % shape[-2]:
        return False
    if module in ("dense_h", "hidden_to_hidden"):
        inputs = ["dense_i" if module == "dense_h" else "input_to_hidden"]
    elif re.fullmatch("h[ifgorznh]?", module):
        inputs = ["i" + module[1:], "i" + module[1:] + "_"]
    else:
        return False
    beside = ("/".join([*scope[1:], part, own]) for part in inputs)
    return any(shapes.get(part, ())[-1:] == shape[-1:] for part in beside)


# What cannot be told

OTHERS = (
    "in_axis=-2, out_axis=-1 for a convolution's (*kernel, in, out)",
    "in_axis=0, out_axis=(1, 2) for (features, heads, head_dim)",
    "in_axis=(0, 1), out_axis=2 for (heads, head_dim, features)",
    "in_axis=1, out_axis=0 for Equinox's (out, in, *kernel)",
)


def refuse_axes(unknown: Sequence[tuple[str, Shape, Any]], names: Sequence[str], others: str) -> None:
    """Raise where there are any, with rules for them that can be pasted before others, and fit no other."""
    if not unknown:
        return
    groups: dict[tuple[str, str], list[Uncovered]] = {}
    for name, shape, initializer in unknown:
        rule = text_of(initializer, shape)
        kind = re.sub(r"\d+", "", "/".join(name.split("/")[-2:]))
        groups.setdefault((kind, rule), []).append(Uncovered(name, shape, initializer=rule))
    shown = sorted(groups.values(), key=len, reverse=True)[:GROUPS_SHOWN]
    rules = [f'("{glob}", {group[0].initializer})' for group in shown for glob in find_globs(group, names)]
    listing = ", ".join(f"{group[0].name} {group[0].shape}" for group in shown)
    left = len(unknown) - len(shown)
    raise ValueError(
        "rules must name the axes of the fans where no nnx module, name or bias tells them: "
        f"[{', '.join(rules)}, *{others}] for stacks of (in, out), batch_axis, or convolutions, or in their "
        f"place {', '.join(OTHERS)}, got none for {listing}{f' and {left} more' if left else ''}"
    )


def text_of(initializer: Any, shape: Shape) -> str:
    """A rule with the axes of a stack of (in, out), of a convolution of a square field, or of (out, in)."""
    ndim = len(shape)
    function, words = unwrap(initializer)
    given = [f"{word}={value!r}" for word, value in words.items()]
    if ndim == 2:
        axes = "in_axis=1, out_axis=0"
    elif ndim > 3 and len(set(shape[:-2])) == 1:
        axes = "in_axis=-2, out_axis=-1"
    else:
        axes = f"batch_axis={0 if ndim == 3 else tuple(range(ndim - 2))}"
    return f"partial({', '.join([f'gpuinit.{function.__name__}', *given, axes])})"
