"""he_normal and its family: the arguments of `jax.nn.initializers` in, an initialiser out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

import gpuinit
from gpuinit import initializers
from gpuinit.distributions import Uniform, parse_normal, parse_number, parse_recipe
from gpuinit.fans import Axes
from gpuinit.initializers import Shape, find_draw
from gpuinit.jax.arrays import Fill, canonical_dtype, gather, make_like, make_on, named_sharding
from gpuinit.jax.traced import draw_shards, draw_whole, whole_of
from gpuinit.stream import as_integers, parse_shape

Initializer = Callable[..., jax.Array]

# JAX's words for what is drawn, and those of the core.
WORDS = {"truncated_normal": "truncated_normal", "normal": "untruncated_normal", "uniform": "uniform"}


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

    Works under `jit`, `vmap` over keys, `shard_map`, `pmap`, `scan`, `cond`, `checkpoint`, `eval_shape` and
    `jax.export`, and counts as a draw for `jax.debug_key_reuse`. Under `jit` with `out_shardings` or a
    constraint on the sharding every device makes its own shard, too; but where the axes of the mesh are
    explicit, give `out_sharding`, as without it JAX's type of the array is that of a whole on every device.
    The numbers of the distribution must be known when the program is traced.

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
            whole = whole_of(parsed, made_of, find_draw(fill, parsed, dtype=made_of), name)
            if out_sharding is None:
                return draw_whole(whole, words)
            return draw_shards(whole, words, named_sharding(out_sharding, jax.sharding.get_abstract_mesh()))
        make = partial(make_on, fill, parsed, seed=seed_of(np.asarray(words)), name=name, dtype=made_of)
        if out_sharding is not None:
            return gather(make, parsed, named_sharding(out_sharding, jax.sharding.get_mesh()))
        return make_like(make, parsed, words)

    return init


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
    if typed and jax.config.jax_debug_key_reuse:
        jax.random.bits(key)  # a draw that the checker knows as one
    if words.dtype != np.uint32 or words.shape not in ((2,), (4,)):
        raise ValueError(f"{wanted}, got {words.dtype} of shape {words.shape}")
    return jax.lax.slice(words, (0,), (2,))  # an operation: under jit a key from outside is traced


def seed_of(words: np.ndarray) -> int:
    high, low = words.tolist()
    return int(high << 32 | low)
