"""Run by test_jax_mesh_in_use.py with 1 to 8 forced CPU devices: under jax.set_mesh, as JAX's own are.

The axes are Auto on one mesh, whose devices are in another order than JAX's, and Explicit on the other.

In every place an array of ours has the bits of the same call on one device, and the sharding that JAX's own
initialiser gets in that place; where JAX's own is refused, as by linen on explicit axes, so is ours.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gpuinit
import gpuinit.jax

COUNT = int(sys.argv[1])
assert jax.device_count() == COUNT
SHAPE = (16, 24)
P = PartitionSpec
MESHES = [shape for shape in [(1, 1), (1, 2), (2, 2), (4, 1), (2, 4)] if np.prod(shape) == COUNT]
OURS, THEIRS = gpuinit.jax.he_normal(), jax.nn.initializers.he_normal()
constrain = jax.lax.with_sharding_constraint
key = jax.random.key(5)  # made outside of any mesh

warnings.simplefilter("ignore", DeprecationWarning)  # of Flax's `.value`


class Linen(linen.Module):
    draw: object

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(24, kernel_init=linen.with_partitioning(self.draw, ("a", "b")))(x)
        return linen.Dense(8, kernel_init=self.draw)(x)


def linen_model(init, jitted=False):
    model, x = Linen(init), jnp.ones((2, 16))
    mesh = jax.sharding.get_mesh()
    run = model.init
    if jitted:
        shardings = None if mesh.empty else linen.get_sharding(jax.eval_shape(model.init, key, x), mesh)
        run = jax.jit(model.init, out_shardings=shardings)
    made = run(key, x)
    assert model.apply(made, x).shape == (2, 8)
    return jax.tree.leaves(made)


class Block(nnx.Module):
    def __init__(self, init, rngs):
        sharded = partial(nnx.Linear, kernel_init=nnx.with_partitioning(init, ("a", "b")), rngs=rngs)
        self.up, self.down = sharded(16, 24), nnx.Linear(24, 16, kernel_init=init, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, kernel_init=init, rngs=rngs, decode=False)
        self.metadata = nnx.Linear(
            16, 24, kernel_init=init, kernel_metadata={"out_sharding": ("a", "b")}, rngs=rngs
        )

    def __call__(self, x):
        return self.metadata(self.attention(self.down(self.up(x))))


def nnx_model(init, jitted=False):
    make = partial(Block, init)
    block = (nnx.jit(make) if jitted else make)(rngs=nnx.Rngs(0))
    return jax.tree.leaves(nnx.state(block, nnx.Param))


def tree(init, sharding=None):
    """gpuinit.jax.initialize has no counterpart: JAX's is called with the key that has its seed, unnamed."""
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
    if init is OURS:
        return list(gpuinit.jax.initialize({"kernel": leaf, "bias": leaf}, 5).values())
    return [init(key, SHAPE, jnp.float32, sharding), jnp.zeros(SHAPE, jnp.float32, device=sharding)]


def raw(init):
    return init(jax.random.key_data(jax.random.key(5)), SHAPE)  # made inside


def used(init):
    """What comes out of a program on the mesh can go into another."""
    array = jax.jit(lambda k: init(k, SHAPE))(key)
    return [array, array + 1, jax.jit(lambda x: x @ x.T)(array)]


CASES = {
    "eager": lambda init: init(key, SHAPE),
    "eager, bfloat16": lambda init: init(key, SHAPE, jnp.bfloat16),
    "eager, four axes": lambda init: init(key, (3, 3, 4, 8)),
    "raw key": raw,
    "jit, its only output": lambda init: jax.jit(lambda k: init(k, SHAPE))(key),
    "jit and used": used,
    "vmap": lambda init: jax.vmap(lambda k: init(k, SHAPE))(jax.random.split(key, 4)),
    "scan": lambda init: jax.lax.scan(lambda c, k: (c, init(k, SHAPE)), 0, jax.random.split(key, 3))[1],
    "linen": linen_model,
    "linen, jit": partial(linen_model, jitted=True),
    "nnx": nnx_model,
    "nnx, jit": partial(nnx_model, jitted=True),
    "initialize": tree,
    "initialize, jit": lambda init: jax.jit(partial(tree, init))(),
}


def outcome(case, init):
    try:
        return jax.tree.leaves(case(init))
    except AssertionError:  # with_sharding_constraint, on explicit axes
        return None


def main():
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))  # Flax wants one
    with jax.set_mesh(alone):
        plain = {name: [np.asarray(x) for x in jax.tree.leaves(case(OURS))] for name, case in CASES.items()}
    for shape, order, kind in (
        (MESHES[0], slice(None, None, -1), AxisType.Auto),
        (MESHES[-1], slice(None), AxisType.Explicit),
    ):
        devices = np.array(jax.devices())[order].reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("a", "b"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            for name, case in CASES.items():
                compare(f"{name} on {shape} {kind}", case, plain[name])
            where_it_is_asked_for(mesh, kind)
    print("equal")


def compare(name, case, expected):
    ours, theirs = outcome(case, OURS), outcome(case, THEIRS)
    assert (ours is None) == (theirs is None), name
    if ours is None:
        return
    for array, other, weights in zip(ours, theirs, expected, strict=True):
        if "used" not in name or array is ours[0]:  # products are summed in another order
            assert np.asarray(array).tobytes() == weights.tobytes(), name
        assert array.sharding.is_equivalent_to(other.sharding, array.ndim), (
            name,
            array.sharding,
            other.sharding,
        )
        assert jax.typeof(array) == jax.typeof(other), name
        assert array.is_fully_addressable, name
        (array + 1).block_until_ready()


def where_it_is_asked_for(mesh, kind):
    expected = gpuinit.he_normal(SHAPE, seed=5, device="cpu")
    uneven = gpuinit.he_normal((15, 23), seed=5, device="cpu")
    whole = P(None, None)
    for spec in (P("a", "b"), P("b", "a"), P(("a", "b")), P(None, ("b", "a")), P()):
        sharding = NamedSharding(mesh, spec)
        calls = [
            lambda spec=spec: OURS(key, SHAPE, None, spec),
            lambda spec=spec: jax.jit(lambda k: OURS(k, SHAPE, None, spec))(key),
            lambda sharding=sharding: jax.jit(lambda k: OURS(k, SHAPE), out_shardings=sharding)(key),
            lambda sharding=sharding: gpuinit.jax.sharded(SHAPE, sharding, seed=5),
        ]
        if kind == AxisType.Auto:
            calls.append(lambda spec=spec: jax.jit(lambda k: constrain(OURS(k, SHAPE), spec))(key))
            odd = jax.jit(lambda k, spec=spec: constrain(OURS(k, (15, 23)), spec) * 1)(key)
            assert np.asarray(odd).tobytes() == uneven.tobytes()
        else:
            calls.append(lambda spec=spec: jax.sharding.reshard(OURS(key, SHAPE), spec))
        for call in calls:
            made = call()
            assert made.sharding.is_equivalent_to(sharding, 2), (made.sharding, sharding)
            assert np.asarray(made).tobytes() == expected.tobytes()
            assert (
                np.asarray(jax.device_put(made, NamedSharding(mesh, whole))).tobytes() == expected.tobytes()
            )


main()
