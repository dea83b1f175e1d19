"""`initialize`: a pytree of arrays for a pytree of shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax import numpy as jnp

import gpuinit
from gpuinit.distributions import TRUNCATED_STD
from gpuinit.jax.arrays import canonical_dtype, is_traced, make_like, make_on, sharded
from gpuinit.jax.initializers import initializer_of
from gpuinit.rules import Rule, Uncovered, find_rule, parse_rules, refuse_uncovered
from gpuinit.stream import as_integer, parse_seed


def called(*words: str) -> Callable[[Any, str], bool]:
    """True for leaves whose name ends in one of these parts."""
    return lambda leaf, name: name.rpartition("/")[2] in words


DEFAULT_RULES: tuple[Rule, ...] = (
    (called("kernel", "w"), gpuinit.he_normal),
    (called("bias", "b", "offset", "mean"), 0),
    (called("scale", "var"), 1),
    # 0.02 is the standard deviation of the weights, after truncation.
    (called("embedding", "embeddings"), partial(gpuinit.truncated_normal, stddev=0.02 / TRUNCATED_STD)),
)


def initialize(
    tree: Any, seed: SupportsIndex = 0, rules: Sequence[Rule] | None = None, *, strict: bool = True
) -> Any:
    """A pytree of arrays for a pytree of shapes, each leaf from a stream of its own, keyed by its path.

        shapes = jax.eval_shape(model.init, key, x)["params"]
        params = gpuinit.jax.initialize(shapes, seed=0)

    The name of a leaf is its key path, "Dense_0/kernel": adding a layer changes no other leaf. A leaf has the
    bits of `gpuinit.he_normal(shape, seed=seed, name="Dense_0/kernel")`, sharded or not, under `jit` or not.

    The default rules are `DEFAULT_RULES`, for the names of Flax and Haiku:

        kernel, w                 He-normal
        bias, b, offset, mean     0
        scale, var                1
        embedding, embeddings     truncated normal, standard deviation 0.02

    Args:
        tree: Leaves with shape and dtype: `jax.ShapeDtypeStruct`, whose sharding is heeded where it has one,
            or arrays, which are not changed. Leaves of other kinds and other dtypes than floats, such as
            counters and keys, are returned as they are.
        seed: An integer in [0, 2**64), the same in every process.
        rules: Pairs (pattern, initialiser), of which the first that fits is taken. A pattern is a glob on the
            name, or a function (leaf, name) -> bool. An initialiser is a function of gpuinit, a
            `functools.partial` of one, or a number for a constant. Equinox has weights of (out, in):
            ("*/weight", partial(gpuinit.he_normal, in_axis=1, out_axis=0)).
        strict: False leaves a leaf alone that no rule covers.

    Raises:
        ValueError: No rule covers a leaf, and strict.
    """
    key = parse_seed(as_integer(seed, "seed must be an integer in [0, 2**64)", seed))
    chosen = parse_rules(DEFAULT_RULES if rules is None else rules)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    plan = []
    for path, leaf in paths:
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # Flax's boxes, which are no names
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_float = hasattr(leaf, "shape") and jnp.issubdtype(getattr(leaf, "dtype", None), jnp.inexact)
        initializer = find_rule(chosen, leaf, name) if is_float else None
        plan.append((name, leaf, is_float, initializer))
    if strict:
        refuse_uncovered(
            [
                Uncovered(name, leaf.shape)
                for name, leaf, is_float, found in plan
                if is_float and found is None
            ]
        )
    leaves = [
        leaf if initializer is None else make_leaf(initializer, leaf, key, name)
        for name, leaf, _, initializer in plan
    ]
    return jax.tree_util.tree_unflatten(structure, leaves)


def make_leaf(initializer: Any, leaf: Any, key: int, name: str) -> jax.Array:
    sharding = getattr(leaf, "sharding", None)
    dtype = canonical_dtype(leaf.dtype)
    if isinstance(initializer, Real):
        return jnp.full(leaf.shape, initializer, dtype, device=sharding)
    if is_traced():
        words = np.array([key >> 32, key & 0xFFFFFFFF], np.uint32)
        return initializer_of(initializer, dtype, name)(words, leaf.shape, dtype, sharding)
    if sharding is not None:
        return sharded(leaf.shape, sharding, initializer, seed=key, name=name, dtype=dtype)
    make = partial(make_on, initializer, tuple(leaf.shape), seed=key, name=name, dtype=dtype)
    return make_like(make, tuple(leaf.shape), jnp.empty(()))
