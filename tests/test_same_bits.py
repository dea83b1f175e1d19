"""One weight, whoever makes it: the same bytes, and nothing of it beyond two standard deviations.

TABLE has a row for each maker and each device or process that it runs in; a maker shows how the seed and the
name are given to it. Keras has one backend a process, and JAX counts its devices once: those rows run this
file as a program, once for each process: python test_same_bits.py PROCESS
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import conftest
import ml_dtypes
import numpy as np
import pytest

import gpuinit

SEED = 0xFEDCBA98_76543210
LOW, HIGH = SEED % 2**32, SEED >> 32
NAME = "layer/kernel"  # the path of a Keras variable and of a leaf in a pytree
SHAPE = (37, 53)  # a multiple of nothing
LARGE = (4096, 4096)

# SHA-256 of the bytes of gpuinit.he_normal(SHAPE, seed=SEED, name=name, dtype=dtype), made by NumPy.
PINNED = {
    ("float32", None): "fbe296092f68601eafd4d007ac3033ccc852b779b98e3b1462e0fb01908af808",
    ("float32", NAME): "02c992b63edd4cf3cbae1ee8e56e7a994af9589a80be7a48878f5f8f337db495",
    ("float16", None): "7d0d5290ec4b44d00395c8624798175e393c3899bba612b28148566d507c17e0",
    ("float16", NAME): "fe4e0644658af39c98de56f5e3b3287884731bb7dbba384ad257fd6c7523acb5",
    ("bfloat16", None): "b0703d8aa43c511a74a4c9c60e655fde74292cba21f1e22351b7d3add1ac7e56",
    ("bfloat16", NAME): "9457a910ae80dff443775aa20d0ea44135754da5ef0c2afe884026c84708e8fe",
}

# The bound in float32, as the sampler has it. Of as many weights some come within a hundred-thousandth of it.
BOUND = 2 * np.float32(math.sqrt(2 / LARGE[0]) / 0.87962566103423976)


# The makers


def core(shape, dtype, name, device):
    """What every other maker's seed and name are measured by."""
    return gpuinit.he_normal(shape, seed=SEED, name=name, dtype=dtype, device=device)


def torch_in_place(shape, dtype, name, place):
    """Of torch's axes the first is the output's; the weight here has them as Keras has."""
    import torch

    import gpuinit.torch

    tensor = place(torch.empty(shape, dtype=getattr(torch, dtype)))
    return gpuinit.torch.he_normal_(tensor, seed=SEED, name=name, in_axis=0, out_axis=1)


def keras_integer(shape, dtype, name):
    """An integer is the seed. The name is the path of a variable that initialize fills."""
    import keras

    import gpuinit.keras

    if name is None:
        return gpuinit.keras.HeNormal(seed=SEED)(shape, dtype)
    layer = keras.layers.Dense(shape[1], use_bias=False, dtype=dtype, name="layer")
    layer.build((None, shape[0]))
    (row,) = gpuinit.keras.initialize(layer, SEED)
    assert row.name == name
    return layer.kernel.value


def keras_generator(shape, dtype, name):
    """The state of a SeedGenerator is the two words of the seed, the low one first. It knows no names."""
    import keras

    import gpuinit.keras

    generator = keras.random.SeedGenerator(0)
    generator.state.assign(np.array([LOW, HIGH], np.uint32).astype(generator.state.dtype))  # torch's is int32
    return gpuinit.keras.HeNormal(generator)(shape, dtype)


def jax_key():
    """A key is the two words of the seed, the high one first: jax.random.key(n) has n in the second."""
    import jax

    return jax.random.wrap_key_data(np.array([HIGH, LOW], np.uint32))


def jax_init(dtype, name):
    """gpuinit.jax.he_normal(dtype=dtype), and with a name what gpuinit.keras draws with."""
    import gpuinit.jax

    if name is None:
        return gpuinit.jax.he_normal(dtype=dtype)
    return gpuinit.jax.initializers.initializer_of(gpuinit.he_normal, dtype, name)


def jax_sharding(shape):
    """Every row on a device of its own, or a quarter of the rows on each of four: JAX cuts evenly."""
    import jax

    count = 37 if shape[0] % 37 == 0 else 4
    mesh = jax.make_mesh((count,), ("rows",), devices=jax.devices()[:count])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))


def jax_eager(shape, dtype, name):
    return jax_init(dtype, name)(jax_key(), shape)


def jax_jitted(shape, dtype, name):
    import jax

    return jax.jit(jax_init(dtype, name), static_argnums=1)(jax_key(), shape)


def jax_vmapped(shape, dtype, name):
    import jax

    keys = jax.numpy.stack([jax.random.key(0), jax_key()])
    return jax.vmap(lambda key: jax_init(dtype, name)(key, shape))(keys)[1]


def jax_sharded(shape, dtype, name):
    import gpuinit.jax

    return gpuinit.jax.sharded(shape, jax_sharding(shape), seed=SEED, name=name, dtype=dtype)


def jax_jitted_and_sharded(shape, dtype, name):
    import jax

    init = jax.jit(jax_init(dtype, name), static_argnums=(1, 2, 3))
    return init(jax_key(), shape, None, jax_sharding(shape))


def jax_pytree(shape, dtype, name):
    """The seed is an integer, and the name that of a leaf: it always has one."""
    import jax

    import gpuinit.jax

    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=jax_sharding(shape))
    return gpuinit.jax.initialize({"layer": {"kernel": leaf}}, SEED)["layer"]["kernel"]


IN_KERAS = (keras_integer, keras_generator)
IN_JAX = (jax_eager, jax_jitted, jax_vmapped, jax_sharded, jax_jitted_and_sharded, jax_pytree)
PROCESSES = {
    "keras on numpy": IN_KERAS,
    "keras on torch": IN_KERAS,
    "keras on jax": IN_KERAS,
    "keras on tensorflow": IN_KERAS,
    "jax": IN_JAX,
}
TABLE = [  # device, process, maker
    *((device, "this", maker) for maker in (core, torch_in_place) for device in conftest.NAMES),
    *(("cpu", process, maker) for process, makers in PROCESSES.items() for maker in makers),
]


def cases_of(maker):
    """Those whose name the maker can be given."""
    if maker is keras_generator:
        return [(SHAPE, dtype, name) for dtype, name in PINNED if name is None]
    if maker is jax_pytree:
        return [(SHAPE, dtype, name) for dtype, name in PINNED if name is not None]
    return [(SHAPE, dtype, name) for dtype, name in PINNED]


# What they made


def as_numpy(made):
    if hasattr(made, "detach"):  # torch's, which gives NumPy no bfloat16
        import torch
        import torch_devices

        made = torch_devices.host(made)
        if made.dtype == torch.bfloat16:
            return made.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(made)


def digest(array):
    return hashlib.sha256(array).hexdigest(), array.shape, array.dtype.name


def beyond(array):
    """How many lie beyond the bound; and the largest, in units of it."""
    size = np.abs(array)
    return int(np.count_nonzero(size > BOUND)), float(size.max() / BOUND)


def findings(make, maker):
    """All that is asked of a row, as JSON has it."""
    digests = {f"{dtype}, {name}": digest(make(shape, dtype, name)) for shape, dtype, name in cases_of(maker)}
    large = make(LARGE, "float32", None if maker is not jax_pytree else NAME)
    return json.loads(json.dumps({"digests": digests, "beyond": beyond(large)}))


def run_process(process):
    for maker in PROCESSES[process]:
        found = findings(lambda *case, maker=maker: as_numpy(maker(*case)), maker)
        print(json.dumps({maker.__name__: found}))
    print("done")


@functools.cache
def findings_of(process):
    backend = process.rpartition(" ")[2]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=37", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"KERAS_BACKEND": backend, "KERAS_HOME": folder}
        command = [sys.executable, __file__, process]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "done"
    return functools.reduce(dict.__or__, map(json.loads, lines))


@pytest.fixture
def found(device, process, maker, request):
    if process == "this":
        if maker is core:
            return findings(lambda *case: device.numpy(core(*case, device.name)), core)
        pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')
        place = request.getfixturevalue("place")
        return findings(lambda *case: as_numpy(torch_in_place(*case, place)), maker)
    if process == "jax":
        pytest.importorskip("jax", reason='JAX is not installed: pip install "gpuinit[jax]"')
        return findings_of(process)[maker.__name__]
    if importlib.util.find_spec("keras") is None:
        pytest.skip('Keras is not installed: pip install "gpuinit[keras]"')
    backend = process.removeprefix("keras on ")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    return findings_of(process)[maker.__name__]


rows = pytest.mark.parametrize(("device", "process", "maker"), TABLE, indirect=["device"])


@rows
def test_every_row_has_the_pinned_bytes(found, maker):
    expected = {
        f"{dtype}, {name}": [PINNED[dtype, name], list(shape), dtype]
        for shape, dtype, name in cases_of(maker)
    }
    assert found["digests"] == expected


@rows
def test_none_of_16_million_lies_beyond_two_standard_deviations(found):
    count, largest = found["beyond"]
    assert count == 0
    assert largest > 1 - 1e-5


def test_a_plain_normal_of_the_same_standard_deviation_does():
    plain = np.random.default_rng(0).standard_normal(LARGE, np.float32) * math.sqrt(2 / LARGE[0])
    count, _ = beyond(plain)
    assert count > 380_000  # 2.3%


def test_a_single_weight_beyond_is_seen():
    weight = core(LARGE, "float32", None, "cpu")
    weight[-1, -1] = np.nextafter(BOUND, np.inf, dtype=np.float32)
    assert beyond(weight)[0] == 1


if __name__ == "__main__":
    run_process(sys.argv[1])
