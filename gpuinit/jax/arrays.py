"""Arrays of JAX that are made at once: on one device, or on many, each of which makes its own shard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import gpuinit
from gpuinit.initializers import Shape, parse_dtype
from gpuinit.memory import empty_aligned
from gpuinit.stream import Index, as_integer, parse_index, parse_seed, parse_shape

Fill = Callable[..., Any]  # a function of gpuinit, such as gpuinit.he_normal, or a partial of one


def sharded(
    shape: Shape,
    sharding: Sharding,
    initializer: Fill = gpuinit.he_normal,
    *,
    seed: SupportsIndex,
    name: str | None = None,
    dtype: Any = None,
) -> jax.Array:
    """An array of which every device makes its own shard, so that the whole is nowhere in memory.

    The bits are those of `initializer(shape, seed=seed, name=name)`, on any mesh. In a program of several
    processes each makes the shards of its own devices; nothing is sent.

    Args:
        shape: Shape of the whole array.
        sharding: Any `jax.sharding.Sharding`.
        initializer: `gpuinit.he_normal` or another function of gpuinit, or a `functools.partial` of one.
        seed: An integer in [0, 2**64), the same in every process.
        name: As for `gpuinit.he_normal`.
        dtype: As for `gpuinit.jax.he_normal`.

    Raises:
        ValueError: Called under `jit`, where `he_normal()(key, shape, dtype, out_sharding)` works.
    """
    if not isinstance(sharding, Sharding):
        raise TypeError(f"sharding must be a jax.sharding.Sharding, got {sharding!r}")
    if is_traced():
        raise ValueError(
            "sharded must be called outside of jit; there use he_normal()(key, shape, dtype, out_sharding), "
            "got a call that is traced"
        )
    key = parse_seed(as_integer(seed, "seed must be an integer in [0, 2**64)", seed))
    parsed = parse_shape(shape)
    make = partial(make_on, initializer, parsed, seed=key, name=name, dtype=canonical_dtype(dtype))
    return gather(make, parsed, sharding)


def canonical_dtype(dtype: Any) -> np.dtype:
    """The dtype that JAX makes of this one, with its warning where it has no 64 bits."""
    wanted = parse_dtype(jnp.result_type(float) if dtype is None else dtype)
    found = np.dtype(jax.dtypes.canonicalize_dtype(wanted))
    if found != wanted:
        jax.eval_shape(partial(jnp.empty, (), wanted))  # warns
    return found  # type: ignore[no-any-return]


def is_traced() -> bool:
    """Whether what is called now becomes part of a program, as under jit."""
    return isinstance(jnp.empty(()), jax.core.Tracer)


def make_on(
    fill: Fill,
    shape: tuple[int, ...],
    device: jax.Device | None,
    index: Index | None = None,
    *,
    seed: int,
    name: str | None,
    dtype: np.dtype,
) -> jax.Array:
    """One part, made on one device, or on the default one, to which the array is not bound then.

    Or it is: JAX binds what comes by DLPack, as from a GPU.
    """
    place = jnp.empty(()).device if device is None else device
    if place.platform == "gpu":
        made = fill(
            shape, seed=seed, name=name, dtype=dtype, device=f"cuda:{place.local_hardware_id}", index=index
        )
        return (
            jax.dlpack.from_dlpack(made) if hasattr(made, "__cuda_array_interface__") else put(made, device)
        )
    out = empty_aligned(parse_index(index, shape)[2], dtype)
    fill(shape, seed=seed, name=name, device="cpu", out=out, index=index)
    return put(out, device)


def put(made: np.ndarray, device: jax.Device | None) -> jax.Array:
    return jax.device_put(made, device)  # without a copy where it is aligned


def make_like(make: Callable[..., jax.Array], shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """An array where JAX has put this one: under `jax.set_mesh` it is whole on every device of the mesh."""
    sharding = like.sharding
    if isinstance(sharding, SingleDeviceSharding):
        return make(like.device if like.committed else None)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return gather(make, shape, sharding)


def gather(make: Callable[..., jax.Array], shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """An array of parts. Unlike the callback of jax.make_array_from_callback, make is told the device."""
    places = sharding.addressable_devices_indices_map(shape)
    arrays = [make(device, index) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def named_sharding(out_sharding: Any, mesh_in_use: Any) -> NamedSharding:
    """With the mesh in use, where it has none of its own or only the shape of one."""
    if isinstance(out_sharding, PartitionSpec):
        mesh, spec = mesh_in_use, out_sharding
    elif isinstance(out_sharding, NamedSharding):
        mesh, spec = out_sharding.mesh, out_sharding.spec
        if isinstance(mesh, AbstractMesh):
            mesh = mesh_in_use
    else:
        raise TypeError(
            f"out_sharding must be None, a PartitionSpec or a NamedSharding, got {out_sharding!r}"
        )
    if mesh.empty:
        raise ValueError(
            f"out_sharding must have a mesh; use jax.set_mesh or NamedSharding, got {out_sharding}"
        )
    return NamedSharding(mesh, spec)
