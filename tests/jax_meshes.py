"""Run by test_jax.py with 1 to 8 forced CPU devices: whatever the mesh, the bits are those of the core."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gpuinit
import gpuinit.jax
from gpuinit.backends import cpu

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
    draws = [
        (gpuinit.jax.normal(0.3), partial(gpuinit.normal, stddev=0.3)),
        (gpuinit.jax.uniform(0.3), partial(gpuinit.uniform, low=0, high=0.3)),
        (
            gpuinit.jax.truncated_normal(0.3, None, -0.5, 3),
            partial(gpuinit.truncated_normal, stddev=0.3, lower=-0.5, upper=3),
        ),
    ]
    draws = [(init, fill, fill(SHAPE, seed=5, device="cpu")) for init, fill in draws]
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
            for other, drawn, weights in draws:
                check(gpuinit.jax.sharded(SHAPE, sharding, drawn, seed=5), weights, sharding)
                check(other(key, SHAPE, out_sharding=sharding), weights, sharding)
                traced = jax.jit(other, static_argnums=(1, 2, 3))(key, SHAPE, None, sharding)
                check(traced, weights, sharding)
            leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
            tree = gpuinit.jax.initialize({"kernel": leaf, "bias": leaf}, seed=5)
            check(tree["kernel"], gpuinit.he_normal(SHAPE, seed=5, name="kernel", device="cpu"), sharding)
            check(tree["bias"], np.zeros(SHAPE, np.float32), sharding)
    many_keys_in_either_width()
    where_another_shard_map_has_taken_an_axis()
    each_device_makes_its_own_part_and_nothing_more()
    if COUNT == 8:
        the_whole_is_never_in_memory_twice()


def many_keys_in_either_width():
    """Sharded along the keys and along the weights."""
    keys = jax.random.split(jax.random.key(5), COUNT)
    seeds = [int(high) << 32 | int(low) for high, low in jax.random.key_data(keys).tolist()]
    sharding = NamedSharding(jax.make_mesh(MESHES[0], ("a", "b")), P("a", "b"))
    for wide in (False, True):
        jax.config.update("jax_enable_x64", wide)  # for XLA's threads as well, unlike jax.enable_x64
        program = jax.jit(jax.vmap(lambda k: gpuinit.jax.he_normal()(k, SHAPE)), out_shardings=sharding)
        dtype = "float64" if wide else "float32"
        expected = [gpuinit.he_normal(SHAPE, seed=s, device="cpu", dtype=dtype) for s in seeds]
        check(program(keys), np.stack(expected), sharding)
    jax.config.update("jax_enable_x64", False)


def where_another_shard_map_has_taken_an_axis():
    mesh = jax.make_mesh(MESHES[0], ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    init, rows, spec = gpuinit.jax.he_normal(), MESHES[0][0], P("a", None, "b")
    keys = jax.random.wrap_key_data(jnp.array([[0, seed] for seed in range(rows)], jnp.uint32))
    keys = jax.device_put(keys, NamedSharding(mesh, P("a")))
    expected = np.stack([gpuinit.he_normal(SHAPE, seed=seed, device="cpu") for seed in range(rows)])
    for checked in (True, False):
        one = jax.shard_map(
            lambda k: init(k[0], SHAPE, None, P(None, "b"))[None],
            mesh=mesh,
            in_specs=P("a"),
            out_specs=P("a"),
            axis_names={"a"},
            check_vma=checked,
        )
        check(jax.jit(one)(keys), expected, NamedSharding(mesh, spec))


def each_device_makes_its_own_part_and_nothing_more():
    made = []

    def recording(out, runs, request):
        made.append(out.size)
        fill(out, runs, request)

    fill, cpu.fill = cpu.fill, recording
    mesh = jax.make_mesh(MESHES[0], ("a", "b"))
    sharding = NamedSharding(mesh, P("a", "b"))
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
    init = gpuinit.jax.he_normal()
    key = jax.device_put(jax.random.key(5), NamedSharding(mesh, P()))
    automatic = jax.make_mesh(MESHES[0], ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    same_key = jax.device_put(jax.random.key(5), NamedSharding(automatic, P()))
    for draw in (
        lambda: gpuinit.jax.sharded(SHAPE, sharding, seed=5),
        lambda: gpuinit.jax.initialize({"kernel": leaf}, 5),
        lambda: init(key, SHAPE, None, sharding),
        lambda: jax.jit(init, static_argnums=(1, 2, 3))(key, SHAPE, None, sharding),
        lambda: jax.jit(init, static_argnums=1, out_shardings=sharding)(key, SHAPE),
        lambda: constrained(init, automatic, same_key),
    ):
        made.clear()
        # Nothing goes from device to device either: no whole is cut up.
        with jax.transfer_guard_device_to_device("disallow_explicit"):
            jax.block_until_ready(draw())
        assert made == [np.prod(sharding.shard_shape(SHAPE))] * COUNT, made
    cpu.fill = fill


def constrained(init, mesh, key):
    """A constraint on a value within the program, with the mesh in use."""
    with jax.set_mesh(mesh):
        return jax.jit(lambda k: jax.lax.with_sharding_constraint(init(k, SHAPE), P("a", "b")) * 2)(key)


def the_whole_is_never_in_memory_twice():
    """All devices are in one process here, which holds their shards and no array that they were cut from."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    sharding = NamedSharding(jax.make_mesh((8,), ("a",)), P("a"))
    small = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    large = jax.ShapeDtypeStruct((8192, 4096), jnp.float32, sharding=sharding)
    gpuinit.jax.initialize({"kernel": small, "bias": small}, 5)  # loads what is loaded once
    for name in ("kernel", "bias"):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0])
        made = jax.block_until_ready(gpuinit.jax.initialize({name: large}, 5)[name])
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) - before
        print(f"memory {name}: {peak / 1024 - 128:.0f} MiB beyond the weight of 128 MiB")
        assert peak / 1024 < 128 + 48, (
            peak
        )  # one shard, 16 MiB of scratch, and what the process needs besides
        del made


main()
print("equal")
