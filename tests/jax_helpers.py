"""A key, the weights that the core makes of it, and what it takes to be the same: for the tests with JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import gpuinit

SHAPE = (96, 40)
SEED = 0xFEDCBA98_76543210


def key(seed=SEED, **kwargs):
    """The typed key whose two words are this seed; jax.random.key takes 32 bits only without x64."""
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    return jax.random.wrap_key_data(words, **kwargs)


def same(array, expected):
    array = np.asarray(array)
    return (array.dtype, array.shape, array.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def core(shape=SHAPE, fill=gpuinit.he_normal, **kwargs):
    return fill(shape, **({"seed": SEED, "device": "cpu"} | kwargs))
