"""`initialize`: a pytree of arrays for a pytree of shapes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import jax
import numpy as np
from jax import numpy as jnp
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

import gpuinit
from gpuinit.distributions import TRUNCATED_STD
from gpuinit.initializers import find_draw
from gpuinit.jax.arrays import canonical_dtype, is_traced, make_like, make_on, sharded
from gpuinit.jax.axes import FAN_RULES, find_neighbours, is_recurrent, refuse_axes, with_axes
from gpuinit.jax.initializers import initializer_of
from gpuinit.rules import (
    WANTED,
    Report,
    Row,
    Rule,
    Uncovered,
    find_rule,
    format_argument,
    noting,
    parse_rules,
    refuse_uncovered,
    spare_frozen,
    unwrap,
)
from gpuinit.stream import as_integer, parse_seed


def called(*words: str) -> Callable[[Any, str], bool]:
    """True for leaves whose own name, the last part, is one of these."""
    return lambda leaf, name: name.rpartition("/")[2] in words


def of_kernel(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """What a kernel gets, by what lies beside it.

    That of a cell's state has the variance of an orthogonal matrix's elements, 1 / units, uniformly as the
    Keras rules have it. Flax draws one, by a QR decomposition, whose bits differ between devices.
    """
    return gpuinit.lecun_uniform if is_recurrent(name, shapes) else gpuinit.he_normal


DEFAULT_RULES: tuple[Rule, ...] = (
    (called("kernel", "w"), of_kernel),
    (called("bias", "b", "offset", "mean"), 0),
    (called("scale", "var"), 1),
    # 0.02 is the standard deviation of the weights, after truncation.
    (called("embedding", "embeddings"), partial(gpuinit.truncated_normal, stddev=0.02 / TRUNCATED_STD)),
)


# The functions of gpuinit, which say what they would draw.
GPUINITS = (*FAN_RULES, gpuinit.normal, gpuinit.truncated_normal, gpuinit.uniform)

ADDRESS = re.compile(" at 0x[0-9a-f]+")  # in what Python makes of an object that has no text of its own


class Leaf(NamedTuple):
    """A leaf, and what is to be done with it."""

    name: str
    path: tuple[Any, ...]
    value: Any
    is_float: bool
    initializer: Any = None  # a number, or a function; None where it is left alone
    dtype: Any = None  # that it gets
    std: float | None = None  # of the distribution drawn from, where it is gpuinit's


@overload
def initialize(
    tree: Any,
    seed: SupportsIndex = 0,
    rules: Sequence[Rule] | None = None,
    *,
    strict: bool = True,
    return_report: Literal[False] = False,
) -> Any: ...


@overload
def initialize(
    tree: Any,
    seed: SupportsIndex = 0,
    rules: Sequence[Rule] | None = None,
    *,
    strict: bool = True,
    return_report: Literal[True],
) -> tuple[Any, Report]: ...


def initialize(
    tree: Any,
    seed: SupportsIndex = 0,
    rules: Sequence[Rule] | None = None,
    *,
    strict: bool = True,
    return_report: bool = False,
) -> Any:
    """A pytree of arrays for a pytree of shapes, each leaf from a stream of its own, keyed by its path.

        shapes = jax.eval_shape(model.init, key, x)["params"]
        params = gpuinit.jax.initialize(shapes, seed=0)
        params, report = gpuinit.jax.initialize(shapes, seed=0, return_report=True)

    The name of a leaf is its key path, "Dense_0/kernel": adding a layer changes no other leaf, and no two are
    alike. A leaf has the bits of `gpuinit.he_normal(shape, seed=seed, name="Dense_0/kernel")`, sharded or
    not, under `jit` or not.

    The default rules are `DEFAULT_RULES`, for the names of Flax and Haiku:

        kernel, w                 He-normal; of a cell's state uniform with variance 1 / units, that of
                                  the orthogonal ones that Flax draws
        bias, b, offset, mean     0
        scale, var                1
        embedding, embeddings     truncated normal, standard deviation 0.02

    A kernel of two axes is (in, out), but for that of an Einsum whose module is in `tree`. What more axes
    mean, and so the fans, the first of these tells:

        its module                Conv, ConvTranspose, Linear, LinearGeneral, Einsum of Flax NNX, where `tree`
                                  holds the modules and not their state alone
        query, key, value, out    Flax's attention, where the shapes of these four agree
        Conv_0, conv_1, conv2_d   a convolution (*kernel, in, out): of four axes and more where a bias of one
                                  axis, the name or leaves beside it show that nothing stacks it
        the bias beside it        has every output, and so every output kernel.size / bias.size inputs

    Where nothing tells them, a rule has to name them: ("*/experts/kernel",
    partial(gpuinit.he_normal, batch_axis=0)) for a stack of (in, out).

    Args:
        tree: Leaves with shape and dtype: `jax.ShapeDtypeStruct`, whose sharding is heeded where it has one,
            or arrays, which are not changed. Leaves of other kinds and other dtypes than floats, such as
            counters and keys, are returned as they are.
        seed: An integer in [0, 2**64), the same in every process.
        rules: Pairs (pattern, initialiser), of which the first that fits is taken. A pattern is a glob on the
            name, or a function (leaf, name) -> bool. An initialiser is a function of gpuinit, a
            `functools.partial` of one, or a number for a constant. To add to the default rules:
            [(pattern, initialiser), *DEFAULT_RULES]. Equinox has weights of (out, in):
            ("*/weight", partial(gpuinit.he_normal, in_axis=1, out_axis=0)).
        strict: False leaves a leaf alone that no rule covers. The states of optax are covered only by rules
            of the caller that say more than "*".
        return_report: Whether to return (tree, report) instead of the tree. The report has a row for every
            leaf with shape and dtype: name, shape, dtype, rule and standard deviation; `print` shows a table.

    Raises:
        ValueError: No rule covers a leaf, and strict; two leaves would have one name, and so one weight; or a
            rule has to name axes and does not.
        TypeError, ValueError: As for the initialiser, with the name of the leaf.
            All leaves are checked before one is made.
    """
    key = parse_seed(as_integer(seed, "seed must be an integer in [0, 2**64)", seed))
    others = "gpuinit.jax.DEFAULT_RULES" if rules is None else "rules"
    chosen = parse_jax_rules(DEFAULT_RULES if rules is None else rules)
    leaves, structure = plan(tree, chosen, strict, others)
    rows = [row_of(leaf) for leaf in leaves if hasattr(leaf.value, "shape") and hasattr(leaf.value, "dtype")]
    made = [leaf.value if leaf.initializer is None else make_leaf(leaf, key) for leaf in leaves]
    filled = jax.tree_util.tree_unflatten(structure, made)
    return (filled, Report(rows)) if return_report else filled


def parse_jax_rules(rules: Sequence[Rule]) -> list[Rule]:
    pairs = parse_rules(rules)
    for pair in pairs:
        if not (callable(pair[1]) or isinstance(pair[1], Real | None)):
            raise TypeError(f"{WANTED}{pair!r}")
    return pairs


def plan(tree: Any, rules: list[Rule], strict: bool, others: str) -> tuple[list[Leaf], Any]:
    """The leaves in order, each with the initialiser that it gets, and the structure. Nothing is made.

    `others` is what the caller calls the rules, for a message.
    """
    refuse_modules(tree)
    paths, structure = tree_flatten_with_path(tree)
    states = [path for path, node in tree_flatten_with_path(tree, is_leaf=is_state)[0] if is_state(node)]
    naming = spare_frozen(rules, DEFAULT_RULES)
    leaves = []
    for path, value in paths:
        leaf = name_leaf(path, value)
        if leaf.is_float:
            chosen = naming if any(path[: len(above)] == above for above in states) else rules
            leaf = leaf._replace(initializer=find_rule(chosen, value, leaf.name))
        leaves.append(leaf)
    if strict:
        refuse_uncovered(
            [
                Uncovered(leaf.name, tuple(leaf.value.shape))
                for leaf in leaves
                if leaf.is_float and leaf.initializer is None
            ]
        )
    refuse_equal_names(leaves)
    shapes = {leaf.name: tuple(leaf.value.shape) for leaf in leaves if leaf.is_float}
    around = find_neighbours(tree, shapes)
    planned, unknown = [], []
    for leaf in leaves:
        if leaf.initializer is not None:
            with noting(f"This is leaf {leaf.name}."):
                dtype = canonical_dtype(leaf.value.dtype)
                initializer = (
                    of_kernel(leaf.name, shapes) if leaf.initializer is of_kernel else leaf.initializer
                )
                found = with_axes(initializer, leaf.name, leaf.path, around, dtype)
                std = std_of(found, leaf, dtype)
            if found is None:
                unknown.append((leaf.name, shapes[leaf.name], initializer))
            leaf = leaf._replace(initializer=found, dtype=dtype, std=std)
        planned.append(leaf)
    refuse_axes(unknown, [leaf.name for leaf in leaves], others)
    return planned, structure


def name_leaf(path: tuple[Any, ...], value: Any) -> Leaf:
    if path and path[-1] == GetAttrKey("value"):  # Flax's boxes, which are no names
        path = path[:-1]
    is_float = hasattr(value, "shape") and jnp.issubdtype(getattr(value, "dtype", None), jnp.inexact)
    return Leaf(keystr(path, simple=True, separator="/"), path, value, is_float)


def is_state(node: Any) -> bool:
    """Whether it is a state of optax, whose leaves have the names of parameters."""
    package = type(node).__module__.partition(".")[0]
    return package == "optax" or isinstance(node, getattr(sys.modules.get("flax.nnx"), "OptState", ()))


def std_of(initializer: Any, leaf: Leaf, dtype: Any) -> float | None:
    """The standard deviation, where it is known; what filling would raise is raised."""
    if isinstance(initializer, Real):
        return 0.0
    if initializer is None or unwrap(initializer)[0] not in GPUINITS:
        return None
    return find_draw(initializer, tuple(leaf.value.shape), name=leaf.name, dtype=dtype).std()


def refuse_modules(tree: Any) -> None:
    """Raise where a module is a leaf, which would be left alone in silence, or modules share a weight."""
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    kinds = tuple(module.Module for module in (linen, nnx) if module is not None)
    for leaf in jax.tree_util.tree_leaves(tree):
        if isinstance(leaf, kinds):
            raise TypeError(
                "tree must be of shapes or arrays; of a model take jax.eval_shape(model.init, ...) or "
                f"nnx.state(model), got a {type(leaf).__name__}"
            )
    if nnx is None:
        return
    seen: dict[int, Any] = {}
    for path, node in tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]:
        if isinstance(node, nnx.Variable) and seen.setdefault(id(node), path) is not path:
            raise ValueError(
                "tree must have no weight twice, which would be separated; take nnx.state(model), "
                f"got {keystr(seen[id(node)])} again as {keystr(path)}"
            )


def refuse_equal_names(leaves: Sequence[Leaf]) -> None:
    """Raise where two leaves would get the same weights."""
    drawn: dict[str, Leaf] = {}
    for leaf in leaves:
        if not isinstance(leaf.initializer, Real | None):
            other = drawn.setdefault(leaf.name, leaf)
            if other is not leaf:
                raise ValueError(
                    "tree must give every leaf a name of its own, as one name has one stream of weights, "
                    f"got {leaf.name!r} for both {keystr(other.path)} and {keystr(leaf.path)}"
                )
            if ADDRESS.search(leaf.name):
                raise ValueError(
                    f"tree must have keys that are written alike in every process, got {leaf.name!r}"
                )


def row_of(leaf: Leaf) -> Row:
    made = leaf.initializer is not None
    dtype = str(leaf.dtype if made else leaf.value.dtype)
    rule = describe(leaf.initializer) if made else "-"
    return Row(leaf.name, tuple(leaf.value.shape), dtype, rule, leaf.std, "whole" if made else "not written")


def describe(initializer: Any) -> str:
    """An initialiser as a reader knows it: "truncated_normal(stddev=0.02274)", or "0"."""
    if isinstance(initializer, Real):
        return str(initializer)
    function, words = unwrap(initializer)
    name = str(getattr(function, "__name__", type(function).__name__))
    given = [f"{word}={format_argument(value)}" for word, value in words.items()]
    return f"{name}({', '.join(given)})" if given else name


def make_leaf(leaf: Leaf, key: int) -> jax.Array:
    shape, sharding = tuple(leaf.value.shape), getattr(leaf.value, "sharding", None)
    if isinstance(leaf.initializer, Real):
        return jnp.full(shape, leaf.initializer, leaf.dtype, device=sharding)
    fill: Any = leaf.initializer
    if is_traced():
        words = np.array([key >> 32, key & 0xFFFFFFFF], np.uint32)
        return initializer_of(fill, leaf.dtype, leaf.name)(words, shape, leaf.dtype, sharding)
    if sharding is not None:
        return sharded(shape, sharding, fill, seed=key, name=leaf.name, dtype=leaf.dtype)
    make = partial(make_on, fill, shape, seed=key, name=leaf.name, dtype=leaf.dtype)
    return make_like(make, shape, jnp.empty(()))
