"""Draws that become part of a program, as under `jit`: the device makes the weights when the program runs.

The key is an operand, all else is known. Where the whole array is one value of the program, XLA's partitioner
is told that each device can make its own part, whatever the sharding that it finds. In `shard_map` and in
`pmap` an array is one device's own.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from gpuinit import devices
from gpuinit.distributions import Draw, find_sampling
from gpuinit.jax import ffi
from gpuinit.stream import parse_name, row_major


class Whole(NamedTuple):
    """All that is known of an array when it is traced: everything but its key."""

    shape: tuple[int, ...]
    dtype: np.dtype
    request: str

    def mark(self) -> tuple[int, int]:
        """64 bits that tell it from others."""
        number = parse_name(repr(self))
        return number >> 32, number & 0xFFFFFFFF


def whole_of(shape: tuple[int, ...], dtype: np.dtype, draw: Draw, name: str | None) -> Whole:
    request = ffi.write_spec(ffi.Spec(shape, parse_name(name), *find_sampling(draw, dtype)))
    return Whole(shape, dtype, request)


@partial(jax.jit, static_argnums=0)  # so that weights that differ in their key alone are traced once
def draw_whole(whole: Whole, key: jax.Array) -> jax.Array:
    """The whole array, one value of the program."""
    axes = jax.sharding.get_abstract_mesh().axis_types
    if all(axis == AxisType.Auto for axis in axes):
        made: jax.Array = by_partitioner(whole, 0)(jnp.concatenate([key, np.array(whole.mark(), np.uint32)]))
        return made
    return fill_whole(whole, key)


@partial(jax.jit, static_argnums=(0, 2))
def draw_shards(whole: Whole, key: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same, of which every device makes its own shard of this sharding."""
    mesh, spec = sharding.mesh, sharding.spec
    # The axes of a `shard_map` round this, for which the whole is one device's own. JAX tells the shape of no
    # shard on a mesh that has some.
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    plain = AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    shards = jax.shard_map(
        partial(fill_part, whole, NamedSharding(plain, spec).shard_shape(whole.shape), spec),
        mesh=mesh,
        axis_names=set(mesh.axis_names) - manual,
        in_specs=PartitionSpec(),
        out_specs=spec,
        check_vma=False,
    )
    made: jax.Array = shards(key)
    return made


# One device's arrays, one for each two words of the last axis of key


def fill_whole(whole: Whole, key: jax.Array) -> jax.Array:
    return fill(whole, whole.shape, key, jnp.zeros(2, np.uint32))


def fill_part(whole: Whole, part: tuple[int, ...], spec: Any, key: jax.Array) -> jax.Array:
    """The part of this device, whose place along every axis the mesh axes of the spec tell."""
    with jax.enable_x64(True):  # an array may have more than 2**32 elements
        first = jnp.uint64(0)
        for cut, length, stride in zip(spec, part, row_major(whole.shape), strict=False):
            if cut is not None and cut != ():
                first += jax.lax.axis_index(cut).astype(np.uint64) * np.uint64(length * stride)
        low, high = jax.lax.bitcast_convert_type(first, np.uint32)
    return fill(whole, part, key, jnp.stack([high, low]))


def fill(whole: Whole, part: tuple[int, ...], key: jax.Array, first: jax.Array) -> jax.Array:
    """The call that `gpuinit.jax.ffi` describes: the part that begins with this element, in two words too."""
    key = jax.lax.slice_in_dim(key, 0, 2, axis=-1)
    words = jnp.concatenate([key, jnp.broadcast_to(first, key.shape)], axis=-1)
    result = jax.ShapeDtypeStruct((*words.shape[:-1], *part), whole.dtype)
    if jax.sharding.get_abstract_mesh().manual_axes:
        result = varying(result, words)
    if has_handler():
        made: jax.Array = jax.ffi.ffi_call(ffi.TARGET, result, vmap_method="broadcast_all")(
            words, request=whole.request
        )
        return made

    def host(words: Any) -> np.ndarray:
        out = np.empty((*words.shape[:-1], *part), whole.dtype)
        ffi.fill_host(whole.request.encode(), np.asarray(words), out)
        return out

    called: jax.Array = jax.pure_callback(host, result, words, vmap_method="broadcast_all")
    return called


def varying(result: Any, words: jax.Array) -> jax.Array:
    """A value of this shape and dtype that, in JAX's eyes, differs between devices where the words do."""
    batch = words[..., 0]
    axes = (*batch.shape, *(1,) * (len(result.shape) - batch.ndim))
    return jnp.broadcast_to(batch.reshape(axes), result.shape).astype(result.dtype)


def has_handler() -> bool:
    """Whether the device itself makes the weights. Else the host is called back, as on a TPU."""
    platform = jax.default_backend()
    if ffi.problem() is not None:
        return False
    if platform == "cpu":
        ffi.wait_at_exit()
        return True
    if platform != "gpu" or "rocm" in jax.local_devices()[0].client.platform_version:
        return False
    problem = devices.cuda_problem()
    if problem is not None:
        devices.warn_of_fallback(problem)
    return problem is None


# Where XLA's partitioner finds the sharding


@lru_cache(maxsize=1024)
def by_partitioner(whole: Whole, batch_ndim: int) -> Any:
    """`fill_whole` for a key of so many axes before the last, of which each device makes its own part."""

    def partition(_: Any, operands: Any, result: Any) -> Any:
        mesh, everywhere = all_devices(result.sharding, len(result.shape))
        try:
            places = result.sharding.devices_indices_map(result.shape)
        except ValueError:  # lengths that the mesh does not divide
            return mesh, partial(fill_whole, whole), everywhere, (everywhere,)
        starts = np.array(
            [
                [axis.indices(length)[0] for axis, length in zip(place, result.shape, strict=True)]
                for place in places.values()
            ],
            np.int64,
        )
        lower = partial(
            fill_place,
            whole,
            result.sharding.shard_shape(result.shape),
            starts.reshape(len(places), len(result.shape)),
        )
        return mesh, lower, result.sharding, (everywhere,)

    partitioned = custom_partitioning(partial(fill_whole, whole))
    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=lambda _, operands, result: all_devices(
            operands[0].sharding, batch_ndim + 1
        )[1],
        sharding_rule=partial(sharding_rule, batch_ndim, len(whole.shape)),
    )
    mapped = custom_vmap(partitioned)
    mapped.def_vmap(lambda size, batched, key: (by_partitioner(whole, batch_ndim + 1)(key), True))
    return mapped


def all_devices(sharding: Sharding, ndim: int) -> tuple[Mesh, NamedSharding]:
    """The devices of a sharding of so many axes in a row, in its order, and what is whole on each of them."""
    count = len(sharding.device_set)
    in_order = sharding.devices_indices_map((count,) * ndim)  # lengths that any sharding divides
    mesh = Mesh(np.array(list(in_order)), ("device",))
    return mesh, NamedSharding(mesh, PartitionSpec())


def fill_place(whole: Whole, part: tuple[int, ...], starts: np.ndarray, key: jax.Array) -> jax.Array:
    """The part of this device, batch included, which starts where its row of `starts` says."""
    batch_ndim = key.ndim - 1
    firsts = starts[:, batch_ndim:] @ np.array(row_major(whole.shape), np.int64)
    here = jax.lax.axis_index("device")
    batch = jnp.asarray(starts[:, :batch_ndim], np.int32)[here]
    mine = jax.lax.dynamic_slice(key, [*batch, np.int32(0)], (*part[:batch_ndim], key.shape[-1]))
    halves = np.stack([firsts >> 32, firsts & 0xFFFFFFFF], axis=-1).astype(np.uint32)
    return fill(whole, part[batch_ndim:], mine, jnp.asarray(halves)[here])


def sharding_rule(batch_ndim: int, ndim: int, *_: Any) -> SdyShardingRule:
    """Any axis of the result may be sharded, its batch as that of the key."""
    batch = [f"b{axis}" for axis in range(batch_ndim)]
    axes = [f"a{axis}" for axis in range(ndim)]
    return SdyShardingRule(
        operand_mappings=((*batch, "words"),),
        result_mappings=((*batch, *axes),),
        need_replication_factors=("words",),
    )
