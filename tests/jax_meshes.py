"""Run by test_jax.py with 1 to 8 forced CPU devices: whatever the mesh, the bits are those of the core."""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gpuinit
import gpuinit.jax

COUNT = int(sys.argv[1])
assert jax.device_count() == COUNT
SHAPE = (48, 24)
MESHES = [
    shape for shape in [(1, 8), (2, 4), (8, 1), (1, 6), (3, 2), (1, 2), (1, 1)] if np.prod(shape) == COUNT
]
P = PartitionSpec
SPECS = [P("a", "b"), P(("a", "b")), P(None, ("b", "a")), P("b"), P()]


def check(array, expected, sharding):
    assert np.asarray(array).tobytes() == expected.tobytes(), (sharding, array)
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


def main():
    init = gpuinit.jax.he_normal()
    jitted = jax.jit(init, static_argnums=(1, 2, 3))
    expected = gpuinit.he_normal(SHAPE, seed=5, device="cpu")
    named = gpuinit.glorot_uniform(SHAPE, seed=5, name="w", dtype="bfloat16", device="cpu")
    fill = partial(gpuinit.variance_scaling, scale=1.0, mode="fan_avg", distribution="uniform")
    key = jax.random.key(5)
    for shape in MESHES:
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(kind, kind))
            for spec in SPECS:
                sharding = NamedSharding(mesh, spec)
                check(gpuinit.jax.sharded(SHAPE, sharding, seed=5), expected, sharding)
                made = gpuinit.jax.sharded(SHAPE, sharding, fill, seed=5, name="w", dtype="bfloat16")
                check(made, named, sharding)
                check(init(key, SHAPE, None, sharding), expected, sharding)
                check(jitted(key, SHAPE, None, sharding), expected, sharding)
                with jax.set_mesh(mesh):
                    check(init(key, SHAPE, out_sharding=spec), expected, sharding)
                    check(jitted(key, SHAPE, None, spec), expected, sharding)
            sharding = NamedSharding(mesh, P("a", "b"))
            leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
            tree = gpuinit.jax.initialize({"kernel": leaf, "bias": leaf}, seed=5)
            check(tree["kernel"], gpuinit.he_normal(SHAPE, seed=5, name="kernel", device="cpu"), sharding)
            check(tree["bias"], np.zeros(SHAPE, np.float32), sharding)
    # Each device makes its own part and nothing more.
    made = []
    real = gpuinit.he_normal

    def recording(shape, **kwargs):
        made.append(kwargs["out"].shape)
        return real(shape, **kwargs)

    mesh = jax.make_mesh(MESHES[0], ("a", "b"))
    sharding = NamedSharding(mesh, P("a", "b"))
    gpuinit.jax.sharded(SHAPE, sharding, recording, seed=5)
    assert made == [sharding.shard_shape(SHAPE)] * COUNT, made


main()
print("equal")
