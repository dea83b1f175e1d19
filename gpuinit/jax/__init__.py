"""JAX: initialisers `init(key, shape, dtype, out_sharding)`, sharded arrays and whole pytrees, the same bits.

    he_normal()(jax.random.key(0), (256, 64))            as jax.nn.initializers.he_normal()
    sharded((2**16, 2**14), sharding, seed=0, name="w")  one array, each shard made by itself
    initialize(shapes, seed=0)                           a pytree of jax.ShapeDtypeStruct, filled; with
                                                         return_report=True also a report

`he_normal()(jax.random.key(n), shape)` has the bits of `gpuinit.he_normal(shape, seed=n)`. The 64 bits of a
key are the seed: its two words of 32 bits, the first one high, typed or raw. Of the four words of the "rbg"
and "unsafe_rbg" generators the first two count; those of `jax.random.key(n, impl="rbg")` are n as well.

The device makes the weights: a CPU, or a GPU through CuPy. Eagerly it is the device of the key; under `jit`
and the like, those that run the program, each its own part, by a call of XLA's foreign function interface. A
TPU, and a GPU without CuPy, get what the host makes meanwhile in a callback.

Such a program can be exported and cached, and runs wherever gpuinit.jax has been imported. `jax.export` wants
the name of the call: `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(gpuinit.jax.TARGET)]`. For
several devices it wants `out_sharding` too, as does JAX's persistent cache, for jit's `out_shardings` alone
leaves a Python function in the program.

Of `jax.nn.initializers`, orthogonal, delta_orthogonal and complex dtypes are not offered; `zeros`, `ones` and
`constant` are JAX's own.
"""

try:
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ImportError('gpuinit.jax needs JAX. To install it: pip install "gpuinit[jax]"') from error

from jax.nn.initializers import constant, ones, zeros

from gpuinit.jax.arrays import sharded
from gpuinit.jax.ffi import TARGET
from gpuinit.jax.initializers import (
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    lecun_uniform,
    normal,
    truncated_normal,
    uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
)
from gpuinit.jax.tree import DEFAULT_RULES, initialize

__all__ = [
    "DEFAULT_RULES",
    "TARGET",
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
