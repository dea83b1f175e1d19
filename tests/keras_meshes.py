"""Run by test_keras_meshes.py with 1 to 8 forced CPU devices: Keras on JAX under a distribution."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from unittest import mock

COUNT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
os.environ["KERAS_BACKEND"] = "jax"

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

import gpuinit  # noqa: E402
import gpuinit.keras  # noqa: E402
from gpuinit.keras import HeNormal  # noqa: E402

assert jax.device_count() == COUNT
layers, SeedGenerator = keras.layers, keras.random.SeedGenerator
DEVICES = keras.distribution.list_devices()
CLASSES = sorted(
    name for name, found in vars(gpuinit.keras).items() if isinstance(found, type) and name[0].isupper()
)
CLASSES = [name for name in CLASSES if issubclass(getattr(gpuinit.keras, name), gpuinit.keras.Drawn)]
CLASSES.remove("Drawn")
assert len(CLASSES) == 10
# Axes over which the kernels of a model are sharded, by path, for a mesh of axes "batch" and "model".
OVER_ONE = {
    "embeddings": ("model", None),
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*attention_output/kernel": ("model", None, None),
    "conv/kernel": (None, None, None, "model"),
    "dense/kernel": (None, "model"),
    "dense/bias": ("model",),
}
OVER_BOTH = {
    "embeddings": ("model", "batch"),
    ".*(query|key|value)/kernel": ("batch", "model", None),
    ".*attention_output/kernel": ("model", None, "batch"),
    "conv/kernel": (None, None, "batch", "model"),
    "dense/kernel": ("batch", "model"),
}


def model_parallel(shape, layouts):
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], DEVICES)
    layout_map = keras.distribution.LayoutMap(mesh)
    for path, axes in layouts.items():
        layout_map[path] = axes
    return keras.distribution.ModelParallel(layout_map=layout_map)


DISTRIBUTIONS = [
    keras.distribution.DataParallel(),
    model_parallel((1, COUNT), OVER_ONE),
    model_parallel((COUNT // 2 or 1, min(COUNT, 2)), OVER_BOTH),
]


def build(initializers):
    """A model with a layer of every kind, whose initialisers come one after the other from an iterator."""
    tokens, image = keras.Input((8,), dtype="int32"), keras.Input((6, 6, 8))
    x = layers.Embedding(24, 16, embeddings_initializer=next(initializers), name="embedding")(tokens)
    attention = layers.MultiHeadAttention(8, 4, kernel_initializer=next(initializers), name="attention")
    x = layers.Flatten()(attention(x, x))
    y = layers.Conv2D(8, 3, kernel_initializer=next(initializers), name="conv")(image)
    joined = layers.Concatenate()([x, layers.Flatten()(y)])
    outputs = layers.Dense(16, kernel_initializer=next(initializers), name="dense")(joined)
    return keras.Model([tokens, image], outputs, name="model")


def forever(make):
    while True:
        yield make()


def shared(seed):
    return partial(HeNormal, SeedGenerator(seed))


SEEDS = {
    "an integer": lambda: partial(HeNormal, 2**63 + 5),
    "none": lambda: HeNormal,
    "a generator each": lambda: lambda: HeNormal(SeedGenerator(5)),
    "a generator for all": lambda: shared(5),
}


def contents(model):
    return {weight.path: np.asarray(weight.value).tobytes() for weight in model.weights}


def has_layout(weight, distribution):
    """As Keras asks for, on its mesh, and not that in which its axes are explicit."""
    asked = distribution.get_variable_layout(weight).backend_layout
    assert weight.value.sharding.is_equivalent_to(asked, weight.ndim), (weight.path, weight.value.sharding)
    if COUNT > 1:  # Keras leaves the values of its own initialisers as they are on a mesh of one device
        assert weight.value.sharding.mesh == asked.mesh, weight.path
        assert weight.value.committed


def the_weights_are_those_without_a_distribution():
    for dtype in ("float32", "bfloat16", "mixed_bfloat16"):
        keras.config.set_dtype_policy(dtype)
        labels = SEEDS if dtype == "float32" else ["a generator for all"]
        for label in labels:
            seed = SEEDS[label]
            keras.utils.set_random_seed(9)  # from which None takes its seeds
            expected = contents(build(forever(seed())))
            assert len(expected) == 13
            for distribution in DISTRIBUTIONS:
                keras.utils.set_random_seed(9)
                with distribution.scope():
                    model = build(forever(seed()))
                assert contents(model) == expected, (dtype, label, distribution)
                for weight in model.weights:
                    has_layout(weight, distribution)
    keras.config.set_dtype_policy("float32")


def the_seed_is_that_of_the_core():
    """The third draw of a generator, made in one distribution, in another and in none."""
    for before in (nullcontext(), *(distribution.scope() for distribution in DISTRIBUTIONS)):
        with before:
            generator = SeedGenerator(6)
        count = 0
        for distribution in (*DISTRIBUTIONS, keras.distribution.DataParallel(devices=DEVICES[-1:]), None):
            with distribution.scope() if distribution else nullcontext():
                layer = layers.Dense(16, kernel_initializer=HeNormal(generator), name="dense")
                layer.build((None, 8))
            expected = gpuinit.he_normal((8, 16), seed=6 | count << 32, device="cpu")
            assert np.asarray(layer.kernel.value).tobytes() == expected.tobytes(), (before, distribution)
            count += 1
            assert np.asarray(generator.state.value).tolist() == [6, count]
            HeNormal(generator)((3,))  # Keras's own next draw is not disturbed
            count += 1


def every_class():
    for name in CLASSES:
        one = getattr(gpuinit.keras, name)
        assert "layout" in signature(one()).parameters  # by which Keras knows that it can ask for a shard
        for distribution in DISTRIBUTIONS:
            with distribution.scope():
                layer = layers.Dense(16, kernel_initializer=one(seed=SeedGenerator(7)), name="dense")
                layer.build((None, 8))
            expected = np.asarray(one(seed=SeedGenerator(7))((8, 16)))
            assert np.asarray(layer.kernel.value).tobytes() == expected.tobytes(), (name, distribution)
            has_layout(layer.kernel, distribution)


def every_device_makes_its_own_shard():
    """And `initialize` lets nothing go from one to another."""
    made, make = [], gpuinit.keras.make

    def recording(shape, *args, **kwargs):
        part = make(shape, *args, **kwargs)
        if isinstance(part, np.ndarray):  # not the check of the arguments
            made.append(part.shape)
        return part

    with DISTRIBUTIONS[2].scope():
        for seed in (5, SeedGenerator(5)):
            layer = layers.Dense(16, use_bias=False, kernel_initializer=HeNormal(seed), name="dense")
            with mock.patch.object(gpuinit.keras, "make", recording):
                layer.build((None, 8))
                shard = layer.kernel.value.sharding.shard_shape((8, 16))
                assert made == [shard] * COUNT, made
                made.clear()
                with jax.transfer_guard_device_to_device("disallow_explicit"):
                    gpuinit.keras.initialize(layer, 5)
                assert made == [shard] * COUNT, made
                made.clear()
        assert COUNT == 1 or shard != (8, 16)


def initialize():
    expected = build(forever(HeNormal))
    report = gpuinit.keras.initialize(expected, 5)
    for distribution in DISTRIBUTIONS:
        with distribution.scope():
            model = build(forever(HeNormal))
            assert str(gpuinit.keras.initialize(model, 5)) == str(report)
        assert contents(model) == contents(expected)
        assert str(gpuinit.keras.initialize(model, 6)) == str(report)  # and out of the scope
        assert contents(model) != contents(expected)
        for weight in model.weights:
            has_layout(weight, distribution)
    with keras.device(f"cpu:{COUNT - 1}"):
        layer = layers.Dense(16, name="dense")
        layer.build((None, 8))
    gpuinit.keras.initialize(layer, 5)
    for weight in layer.weights:
        assert weight.value.devices() == {jax.devices()[-1]}, weight.path
    assert not layer.kernel.value.committed
    expected = gpuinit.he_normal((8, 16), seed=5, name=layer.kernel.path, device="cpu")
    assert np.asarray(layer.kernel.value).tobytes() == expected.tobytes()


def trained_and_saved():
    batch = [np.zeros((8, 8), np.int32), np.ones((8, 6, 6, 8), np.float32)], np.ones((8, 16), np.float32)
    for distribution in DISTRIBUTIONS:
        with distribution.scope():
            model = build(forever(shared(5)))
            before = contents(model)
            model.compile("sgd", "mse")
            losses = model.fit(*batch, batch_size=8, epochs=2, verbose=0).history["loss"]
            assert losses[1] < losses[0]
            trained = contents(model)
            assert trained["dense/kernel"] != before["dense/kernel"]
            model.save(FOLDER / f"{COUNT}.keras")
            again = keras.saving.load_model(FOLDER / f"{COUNT}.keras")
            assert contents(again) == trained
            for weight in again.weights:
                has_layout(weight, distribution)
            kernel = again.get_layer("dense").kernel_initializer
            assert type(kernel) is HeNormal
            assert kernel.seed.get_config()["seed"] == 5
            gpuinit.keras.initialize(again, 5)
        assert contents(keras.saving.load_model(FOLDER / f"{COUNT}.keras")) == trained  # by one that has none


def layouts_by_hand():
    """What the call takes for `layout`, eagerly and under jit."""
    mesh = keras.distribution.DeviceMesh((1, COUNT), ["batch", "model"], DEVICES)
    layout = keras.distribution.TensorLayout((None, "model"), mesh)
    sharding = NamedSharding(mesh.backend_mesh, PartitionSpec(None, "model"))
    expected = gpuinit.he_normal((8, 16), seed=3, device="cpu")
    for given, asked in ((layout, sharding), (sharding, sharding), *((one, one) for one in SINGLE)):
        for seed in (3, SeedGenerator(3)):
            made = HeNormal(seed)((8, 16), layout=given)
            assert np.asarray(made).tobytes() == expected.tobytes()
            assert made.sharding.is_equivalent_to(asked, 2)
    init = HeNormal(SeedGenerator(3))

    @jax.jit
    def draw(state):
        with keras.StatelessScope([(init.seed.state, state)]) as scope:
            made = init((8, 16), layout=layout)
        return made, scope.get_current_value(init.seed.state)

    made, state = draw(init.seed.state.value)
    assert np.asarray(made).tobytes() == expected.tobytes()
    assert made.sharding.is_equivalent_to(sharding, 2)
    assert (state.tolist(), init.seed.state.value.tolist()) == ([3, 1], [3, 0])
    for wrong in ("model", 3, ("batch", "model")):
        wanted = "layout must be a keras.distribution.TensorLayout or a jax.sharding.Sharding, got "
        with pytest.raises(TypeError, match=re.escape(wanted + repr(wrong))):
            HeNormal(3)((8, 16), layout=wrong)


SINGLE = [SingleDeviceSharding(device) for device in jax.devices()]


for test in (
    the_weights_are_those_without_a_distribution,
    the_seed_is_that_of_the_core,
    every_class,
    every_device_makes_its_own_shard,
    initialize,
    trained_and_saved,
    layouts_by_hand,
):
    test()
print("equal")
