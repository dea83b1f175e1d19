"""JAX: initialisers `init(key, shape, dtype, out_sharding)`, sharded arrays and whole pytrees, the same bits.

    he_normal()(jax.random.key(0), (256, 64))            as jax.nn.initializers.he_normal()
    sharded((2**16, 2**14), sharding, seed=0, name="w")  one array, each shard made by itself
    initialize(shapes, seed=0)                           a pytree of jax.ShapeDtypeStruct, filled

`he_normal()(jax.random.key(n), shape)` has the bits of `gpuinit.he_normal(shape, seed=n)`. The 64 bits of a
key are the seed: its two words of 32 bits, the first one high, typed or raw. Of the four words of the "rbg"
and "unsafe_rbg" generators the first two count; those of `jax.random.key(n, impl="rbg")` are n as well.

Eagerly the weights are made on the device of the key: a CPU, or a GPU through CuPy, without a copy. Under
`jit`, `vmap` and the like the host makes them when the program runs, in a callback; a GPU gets a copy then.

Of `jax.nn.initializers`, orthogonal, delta_orthogonal and complex dtypes are not offered; `zeros`, `ones` and
`constant` are JAX's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np

try:
    import jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ImportError('gpuinit.jax needs JAX. To install it: pip install "gpuinit[jax]"') from error

from jax import numpy as jnp
from jax.nn.initializers import constant, ones, zeros
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

import gpuinit
from gpuinit import initializers
from gpuinit.distributions import TRUNCATED_STD, Uniform, parse_normal, parse_number, parse_recipe
from gpuinit.fans import Axes
from gpuinit.initializers import Shape, find_draw, parse_dtype
from gpuinit.memory import empty_aligned
from gpuinit.rules import Rule, Uncovered, find_rule, parse_rules, refuse_uncovered
from gpuinit.stream import Index, as_integer, as_integers, parse_index, parse_seed, parse_shape

__all__ = [
    "DEFAULT_RULES",
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "initialize",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "sharded",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

Initializer = Callable[..., jax.Array]
Fill = Callable[..., Any]  # a function of gpuinit, such as gpuinit.he_normal, or a partial of one

# JAX's words for what is drawn, and those of the core.
WORDS = {"truncated_normal": "truncated_normal", "normal": "untruncated_normal", "uniform": "uniform"}


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


def he_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None
) -> Initializer:
    """Truncated He-normal weights: the arguments and the distribution of `jax.nn.initializers.he_normal`.

    Returns:
        init(key, shape, dtype=None, out_sharding=None) -> jax.Array

        key: A typed key (`jax.random.key`) or a raw one (`jax.random.PRNGKey`); its 64 bits are the seed.
        shape: As for `gpuinit.he_normal`: fewer than two axes have fans too, with the default axes.
        dtype: float32, float16, bfloat16 or float64; None is the dtype above, else JAX's default. float16 and
            bfloat16 weights are the float32 ones of the same key, rounded. float64 needs JAX's x64 mode;
            without it JAX warns and it is float32.
        out_sharding: None, a PartitionSpec for the mesh in use (`jax.set_mesh`), or a NamedSharding. Every
            device then makes its own shard; JAX wants all of the same size.

    Works under `jit`, `vmap` over keys and `eval_shape`. A `jit` with `out_shardings` alone makes the whole
    array on the host first: give `out_sharding`, or call `sharded` outside of it.

    References: `gpuinit.he_normal` has the formulas, the bounds and the errors.
    """
    return variance_scaling(2.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def he_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None
) -> Initializer:
    """Uniform He weights, as `jax.nn.initializers.he_uniform`; all else as in `he_normal`."""
    return variance_scaling(2.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


def glorot_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None
) -> Initializer:
    """Truncated Glorot-normal weights, as `jax.nn.initializers.glorot_normal`; all else as in `he_normal`."""
    return variance_scaling(1.0, "fan_avg", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def glorot_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None
) -> Initializer:
    """Uniform Glorot weights, as `jax.nn.initializers.glorot_uniform`; all else as in `he_normal`."""
    return variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis, batch_axis, dtype)


def lecun_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None
) -> Initializer:
    """Truncated LeCun-normal weights, as `jax.nn.initializers.lecun_normal`; all else as in `he_normal`."""
    return variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def lecun_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None
) -> Initializer:
    """Uniform LeCun weights, as `jax.nn.initializers.lecun_uniform`; all else as in `he_normal`."""
    return variance_scaling(1.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


def variance_scaling(
    scale: float,
    mode: str,
    distribution: str,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> Initializer:
    """Weights of variance scale / fan: the arguments of `jax.nn.initializers.variance_scaling`.

        "truncated_normal"  std = sqrt(scale / fan), cut at +-2 * std / 0.87962566103423976
        "normal"            std = sqrt(scale / fan); "untruncated_normal" elsewhere in gpuinit
        "uniform"           limit = sqrt(3 * scale / fan), in [-limit, limit]

    Args:
        scale: A finite number > 0, or a 0-d array whose value is known when this is called.
        mode: "fan_in", "fan_out", "fan_avg" or "fan_geo_avg".
        distribution: One of the three above.

    All else is as in `he_normal`; what is wrong with these three is said at once.
    """
    if not isinstance(distribution, str) or distribution not in WORDS:
        raise ValueError(f"distribution must be one of {', '.join(WORDS)}, got {distribution!r}")
    recipe = parse_recipe(scale, mode, WORDS[distribution])

    def fill(shape: tuple[int, ...], **where: Any) -> Any:
        axes = divide_by_shared(len(shape), in_axis, out_axis, batch_axis)
        return gpuinit.variance_scaling(shape, **recipe._asdict(), **axes, **where)

    return initializer_of(fill, dtype)


def divide_by_shared(ndim: int, in_axis: Axes, out_axis: Axes, batch_axis: Axes) -> dict[str, Any]:
    """JAX lets an axis be both in and out, as Flax does for its Embed: it then counts for neither fan."""
    axes = {"in_axis": in_axis, "out_axis": out_axis, "batch_axis": batch_axis}
    inputs, outputs, batch = (as_integers(given, f"{word} must be axes") for word, given in axes.items())
    if not all(-ndim <= axis < ndim for axis in (*inputs, *outputs)):  # the default ones, or an error to come
        return axes
    shared = {axis % ndim for axis in inputs} & {axis % ndim for axis in outputs}
    if not shared:
        return axes
    kept = (tuple(axis for axis in given if axis % ndim not in shared) for given in (inputs, outputs))
    return dict(zip(axes, (*kept, (*batch, *shared)), strict=True))


def normal(stddev: float = 1e-2, dtype: Any = None) -> Initializer:
    """A normal distribution that is not cut, whatever the fans: as `jax.nn.initializers.normal`.

    stddev is a finite number >= 0, or a 0-d array whose value is known when this is called. What it returns
    is as for `he_normal`, with the bits of `gpuinit.normal`.
    """
    return initializer_of(partial(initializers.make, draw=parse_normal(stddev)), dtype)


def truncated_normal(
    stddev: float = 1e-2, dtype: Any = None, lower: float = -2.0, upper: float = 2.0
) -> Initializer:
    """A normal distribution cut at lower * stddev and upper * stddev, whatever the fans.

    As `jax.nn.initializers.truncated_normal`: stddev is that before the cut. What it returns is as for
    `he_normal`, with the bits, the bounds and the errors of `gpuinit.truncated_normal`.
    """
    return initializer_of(partial(initializers.make, draw=parse_normal(stddev, 0.0, lower, upper)), dtype)


def uniform(scale: float = 1e-2, dtype: Any = None) -> Initializer:
    """Uniform in [0, scale], whatever the fans: as `jax.nn.initializers.uniform`, but scale can be reached.

    scale is a finite number >= 0, or a 0-d array whose value is known when this is called. What it returns is
    as for `he_normal`, with the bits of `gpuinit.uniform(shape, 0, scale)`.
    """
    high = parse_number("scale", scale, least=0)
    return initializer_of(partial(initializers.make, draw=Uniform(0.0, high, ("scale", high))), dtype)


kaiming_normal = he_normal
kaiming_uniform = he_uniform
xavier_normal = glorot_normal
xavier_uniform = glorot_uniform


def initializer_of(fill: Fill, default_dtype: Any, name: str | None = None) -> Initializer:
    fill = partial(fill, name=name)

    def init(key: Any, shape: Shape, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        words = key_words(key)
        parsed = parse_shape(shape)
        made_of = canonical_dtype(default_dtype if dtype is None else dtype)
        if isinstance(words, jax.core.Tracer):
            find_draw(fill, parsed, dtype=made_of)  # an error is raised here
            if out_sharding is None:
                return traced(fill, words, parsed, made_of)
            return traced_shards(
                fill, words, parsed, made_of, named_sharding(out_sharding, jax.sharding.get_abstract_mesh())
            )
        make = partial(make_on, fill, parsed, seed=seed_of(np.asarray(words)), name=name, dtype=made_of)
        if out_sharding is None:
            committed = words.committed and len(words.devices()) == 1
            return make(words.device if committed else None)
        return gather(make, parsed, named_sharding(out_sharding, jax.sharding.get_mesh()))

    return init


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
    return make_on(initializer, tuple(leaf.shape), None, seed=key, name=name, dtype=dtype)


def is_traced() -> bool:
    """Whether what is called now becomes part of a program, as under jit."""
    return isinstance(jnp.empty(()), jax.core.Tracer)


# A key to a seed


def key_words(key: Any) -> jax.Array:
    """The words of one key, two of 32 bits, in the order of the module's docstring."""
    wanted = "key must be one JAX key, jax.random.key(0) or a raw one of 2 or 4 uint32 words"
    if isinstance(key, np.ndarray):
        key = jnp.asarray(key)
    if not isinstance(key, jax.Array):
        raise TypeError(f"{wanted}, got {key!r}")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim != (0 if typed else 1):
        raise ValueError(f"{wanted}; for many use jax.vmap, got shape {key.shape}")
    words = jax.random.key_data(key) if typed else key
    if words.dtype != np.uint32 or words.shape not in ((2,), (4,)):
        raise ValueError(f"{wanted}, got {words.dtype} of shape {words.shape}")
    return jnp.array(words[:2], copy=True)  # an operation, so that under jit a key from outside is traced


def seed_of(words: np.ndarray) -> int:
    high, low = words.tolist()
    return int(high << 32 | low)


def canonical_dtype(dtype: Any) -> np.dtype:
    """The dtype that JAX makes of this one, with its warning where it has no 64 bits."""
    wanted = parse_dtype(jnp.result_type(float) if dtype is None else dtype)
    found = np.dtype(jax.dtypes.canonicalize_dtype(wanted))
    if found != wanted:
        jax.eval_shape(partial(jnp.empty, (), wanted))  # warns
    return found  # type: ignore[no-any-return]


# Eager: on one device, on many


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


# Traced: the host is called back with the words of the key


def traced(fill: Fill, words: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    def host(words: Any) -> np.ndarray:
        words = np.asarray(words)
        out = np.empty((*words.shape[:-1], *shape), dtype)
        for place in np.ndindex(words.shape[:-1]):  # vmap's axes
            fill(shape, seed=seed_of(words[place]), device="cpu", out=out[(*place, ...)])
        return out

    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.pure_callback(host, result, words, vmap_method="expand_dims")


def traced_shards(
    fill: Fill, words: jax.Array, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding
) -> jax.Array:
    """Every device calls the host for its own shard."""
    part = sharding.shard_shape(shape)
    cuts = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))

    def host(words: Any, *places: Any) -> np.ndarray:
        starts = [int(place) * length for place, length in zip(places, part, strict=True)]
        index = tuple(slice(start, start + length) for start, length in zip(starts, part, strict=True))
        out: np.ndarray = fill(shape, seed=seed_of(np.asarray(words)), dtype=dtype, device="cpu", index=index)
        return out

    def shard(words: jax.Array) -> jax.Array:
        places = [jnp.int32(0) if cut is None else jax.lax.axis_index(cut) for cut in cuts]
        result = jax.ShapeDtypeStruct(part, dtype)
        return jax.pure_callback(host, result, words, *places, vmap_method="sequential")

    mapped = jax.shard_map(
        shard, mesh=sharding.mesh, in_specs=PartitionSpec(), out_specs=sharding.spec, check_vma=False
    )
    return mapped(words)
