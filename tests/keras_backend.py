"""Run by test_keras.py, once for each backend of Keras: python keras_backend.py BACKEND FOLDER"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

BACKEND, FOLDER = sys.argv[1], Path(sys.argv[2])
os.environ["KERAS_BACKEND"] = BACKEND

import conftest  # noqa: E402
import cuda_sim  # noqa: E402
import keras  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import gpuinit  # noqa: E402
import gpuinit.keras  # noqa: E402
from gpuinit.distributions import TRUNCATED_STD  # noqa: E402

assert keras.backend.backend() == BACKEND
warnings.simplefilter("error", gpuinit.FallbackWarning)
CORE = {
    "HeNormal": gpuinit.he_normal,
    "HeUniform": gpuinit.he_uniform,
    "GlorotNormal": gpuinit.glorot_normal,
    "GlorotUniform": gpuinit.glorot_uniform,
    "LecunNormal": gpuinit.lecun_normal,
    "LecunUniform": gpuinit.lecun_uniform,
    "VarianceScaling": gpuinit.variance_scaling,
    "RandomNormal": partial(gpuinit.normal, stddev=0.05),
    "TruncatedNormal": partial(gpuinit.truncated_normal, stddev=0.05),
    "RandomUniform": partial(gpuinit.uniform, low=-0.05, high=0.05),
}
FAMILY = tuple(CORE)
# Class, arguments, what the core calls the same for shape (60, 40), and its standard deviation.
DRAWS = (
    ("RandomNormal", (0.3, 2.0), partial(gpuinit.normal, mean=0.3, stddev=2), 2),
    ("TruncatedNormal", (0.3, 2), partial(gpuinit.truncated_normal, mean=0.3, stddev=2), 2 * TRUNCATED_STD),
    ("RandomUniform", (-1, 3.0), partial(gpuinit.uniform, low=-1, high=3), 4 / 12**0.5),
    (
        "VarianceScaling",
        (0.7, "fan_avg", "untruncated_normal"),
        partial(gpuinit.normal, stddev=(0.7 / 50) ** 0.5),
        (0.7 / 50) ** 0.5,
    ),
    (
        "VarianceScaling",
        (0.7, "fan_out", "normal"),  # Keras's word for truncated_normal
        partial(gpuinit.variance_scaling, scale=0.7, mode="fan_out"),
        (0.7 / 40) ** 0.5,
    ),
    (
        "VarianceScaling",
        (0.7, "fan_in", "uniform"),
        partial(gpuinit.uniform, limit=(3 * 0.7 / 60) ** 0.5),
        (0.7 / 60) ** 0.5,
    ),
)


def as_numpy(tensor):
    if BACKEND == "torch" and "bfloat16" in str(tensor.dtype):
        import torch

        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.detach() if BACKEND == "torch" else tensor)


def check(tensor, fill, shape, **kwargs):
    array, expected = as_numpy(tensor), fill(shape, device="cpu", **kwargs)
    found = (array.dtype, array.shape, array.tobytes())
    assert found == (expected.dtype, expected.shape, expected.tobytes()), (fill, shape, kwargs, array.dtype)


def differ(*tensors):
    assert len({as_numpy(tensor).tobytes() for tensor in tensors}) == len(tensors)


def raises(kind, message, call, *args, **kwargs):
    with pytest.raises(kind, match=re.escape(message)):
        call(*args, **kwargs)


def bits():
    """Every class, shape and dtype has the core's bits, in a tensor of the backend."""
    for name in FAMILY:
        for shape in [(), (5,), (0, 3), (60, 40), (3, 3, 8, 16)]:
            tensor = getattr(gpuinit.keras, name)(seed=2**63 + 7)(shape)
            assert keras.ops.is_tensor(tensor)
            check(tensor, CORE[name], shape, seed=2**63 + 7)
    for dtype in ("float16", "bfloat16", *(["float64"] if BACKEND != "jax" else [])):
        tensor = gpuinit.keras.HeNormal(seed=3)((60, 40), dtype)
        check(tensor, gpuinit.he_normal, (60, 40), seed=3, dtype=dtype)
        assert keras.backend.standardize_dtype(tensor.dtype) == dtype
    keras.config.set_floatx("float16")
    check(gpuinit.keras.HeNormal(seed=3)((9, 4)), gpuinit.he_normal, (9, 4), seed=3, dtype="float16")
    keras.config.set_floatx("float32")
    array = as_numpy(gpuinit.keras.HeNormal(seed=0)((1024, 1024)))
    assert np.abs(array).max() <= np.float32(2) * np.float32(np.sqrt(2 / 1024) / TRUNCATED_STD)
    scaled = gpuinit.keras.VarianceScaling(0.3, "fan_avg", "normal", seed=1)((8, 6))
    check(scaled, gpuinit.variance_scaling, (8, 6), scale=0.3, mode="fan_avg", seed=1)


def draws():
    """Arguments other than the defaults: the core's bits, Keras's attributes, the report's figure."""
    for name, arguments, fill, std in DRAWS:
        ours, theirs = getattr(gpuinit.keras, name), getattr(keras.initializers, name)
        made = ours(*arguments, seed=9)
        assert vars(made) == vars(theirs(*arguments, seed=9))
        for dtype in ("float32", "float16", "bfloat16", *(["float64"] if BACKEND != "jax" else [])):
            check(made((60, 40), dtype), fill, (60, 40), seed=9, dtype=dtype)
        saved = keras.initializers.serialize(made)
        for again in (ours.from_config(made.get_config()), made.clone(), keras.initializers.get(saved)):
            assert type(again) is ours
            assert again.get_config() == made.get_config() == theirs(*arguments, seed=9).get_config()
            check(again((60, 40)), fill, (60, 40), seed=9)
        drawn = ours(*arguments, seed=keras.random.SeedGenerator(9))
        check(drawn((60, 40)), fill, (60, 40), seed=9)
        check(drawn((60, 40)), fill, (60, 40), seed=9 | 1 << 32)
        layer = keras.layers.Dense(40, name="layer")
        layer.build((None, 60))
        row, _ = gpuinit.keras.initialize(layer, 5, [("*kernel", made), ("*", "zeros")])
        check(layer.kernel.value, fill, (60, 40), seed=5, name=layer.kernel.path)
        assert row.rule == name
        assert abs(row.std / std - 1) < 1e-12
    raises(ValueError, "stddev must be", gpuinit.keras.RandomNormal(stddev=-1), (5,))
    raises(TypeError, "mean must be a finite number, got 'x'", gpuinit.keras.TruncatedNormal("x"), (5,))
    raises(TypeError, "minval must be", gpuinit.keras.RandomUniform(None, 2), (5,))
    raises(ValueError, "maxval must be at least minval, got", gpuinit.keras.RandomUniform(2, 1), (5,))
    raises(ValueError, "maxval 100000.0", gpuinit.keras.RandomUniform(0, 1e5), (5,), "float16")
    for narrow in (gpuinit.keras.RandomNormal(0.0, 1e-9), gpuinit.keras.TruncatedNormal(0.0, 1e-9)):
        raises(ValueError, "stddev must leave weights other than 0 in float16", narrow, (5,), "float16")


def numbers():
    """0-d arrays for every number; Keras's configuration brings them back from JSON."""
    kinds = (np.float32, np.float64, ml_dtypes.bfloat16, np.array, keras.Variable)
    kinds += (keras.ops.convert_to_tensor, lambda number: keras.ops.convert_to_tensor(number, "bfloat16"))
    kinds += (lambda number: keras.ops.multiply(number, keras.ops.ones(())), np.int64)
    for kind in kinds:
        one, two = (0, 1) if kind is np.int64 else (0.75, 1.5)
        for made, fill in (
            (
                gpuinit.keras.RandomNormal(kind(0.75), kind(1.5), 9),
                partial(gpuinit.normal, mean=one, stddev=two),
            ),
            (
                gpuinit.keras.TruncatedNormal(kind(0.75), kind(1.5), 9),
                partial(gpuinit.truncated_normal, mean=one, stddev=two),
            ),
            (
                gpuinit.keras.RandomUniform(kind(0.75), kind(1.5), 9),
                partial(gpuinit.uniform, low=one, high=two),
            ),
            (
                gpuinit.keras.VarianceScaling(kind(1.5), seed=9),
                partial(gpuinit.variance_scaling, scale=two),
            ),
        ):
            check(made((60, 40)), fill, (60, 40), seed=9)
            config = json.loads(json.dumps(made.get_config()))
            assert config == made.get_config()
            saved = json.loads(json.dumps(keras.initializers.serialize(made)))
            for again in (type(made).from_config(config), made.clone(), keras.initializers.get(saved)):
                check(again((60, 40)), fill, (60, 40), seed=9)
    raises(TypeError, "stddev must be", gpuinit.keras.RandomNormal(0, np.ones(1)), (5,))
    raises(TypeError, "minval must be", gpuinit.keras.RandomUniform(np.array(1j), 2), (5,))


def meaning():
    """Keras's own, 2**16 weights of each: two-sample Kolmogorov-Smirnov is over 0.0181 once in 1e9."""
    shape = (512, 128)
    bound = (np.log(2 / 1e-9) / 2**16) ** 0.5

    def distance(ours, theirs):
        samples = [np.sort(as_numpy(initializer(shape)).ravel()) for initializer in (ours, theirs)]
        ranks = [np.searchsorted(sample, np.concatenate(samples), "right") for sample in samples]
        return np.abs(ranks[0] - ranks[1]).max() / 2**16

    for name, arguments, *_ in (*DRAWS, *((name, ()) for name in FAMILY)):
        pair = [getattr(owner, name)(*arguments, seed=9) for owner in (gpuinit.keras, keras.initializers)]
        assert distance(*pair) < bound, (name, arguments)
    theirs = keras.initializers.RandomNormal(0.3, 2.0, seed=9)
    for wrong in (gpuinit.keras.RandomNormal(0.4, 2.0, 1), gpuinit.keras.TruncatedNormal(0.3, 2.0, 1)):
        assert distance(wrong, theirs) > bound


def seeds():
    """Keras's meaning of int, None and SeedGenerator."""
    shape = (8, 6)
    one = gpuinit.keras.HeNormal(seed=1)
    assert as_numpy(one(shape)).tobytes() == as_numpy(one(shape)).tobytes()
    unseeded = gpuinit.keras.HeNormal()
    assert as_numpy(unseeded(shape)).tobytes() == as_numpy(unseeded(shape)).tobytes()
    differ(unseeded(shape), gpuinit.keras.HeNormal()(shape), unseeded.clone()(shape))
    generator = keras.random.SeedGenerator(1)
    drawn = gpuinit.keras.HeNormal(seed=generator)
    check(drawn(shape), gpuinit.he_normal, shape, seed=1)
    check(drawn(shape), gpuinit.he_normal, shape, seed=1 | 1 << 32)
    check(gpuinit.keras.HeUniform(generator)(shape), gpuinit.he_uniform, shape, seed=1 | 2 << 32)
    highest = keras.random.SeedGenerator(2**31 - 1)
    check(gpuinit.keras.HeNormal(highest)(shape), gpuinit.he_normal, shape, seed=2**31 - 1)
    if BACKEND == "torch":  # whose words are signed
        generator.state.assign([-5, -7])
        seed = 2**32 - 5 | (2**32 - 7) << 32
        check(drawn(shape), gpuinit.he_normal, shape, seed=seed)
        check(drawn(shape), gpuinit.he_normal, shape, seed=seed + 2**32)
    wide = gpuinit.keras.RandomNormal(0.0, 1e5, highest)
    raises(ValueError, "stddev 100000.0", wide, shape, "float16")
    check(gpuinit.keras.HeNormal(highest)(shape), gpuinit.he_normal, shape, seed=2**31 - 1 | 1 << 32)
    raises(ValueError, "seed", gpuinit.keras.HeNormal, "x")
    raises(ValueError, "got -1", gpuinit.keras.HeNormal(-1), shape)
    for dtype in ("int32", "(1,", ("(1,", 1)):
        raises(ValueError, "dtype must be one of", gpuinit.keras.HeNormal(), shape, dtype)
    for dtype in (["(1,"], {"names": ["a"], "formats": ["(1,"]}):
        raises(TypeError, f"bfloat16, float64, got {dtype!r}", gpuinit.keras.HeNormal(), shape, dtype)


def configurations():
    """The keys and the arguments are Keras's own."""
    for name in FAMILY:
        ours, theirs = getattr(gpuinit.keras, name), getattr(keras.initializers, name)
        assert signature(ours) == signature(theirs)
        assert ours(seed=4).get_config() == theirs(seed=4).get_config()
        assert isinstance(ours(), theirs)
        again = ours.from_config(ours(seed=4).get_config())
        assert type(again) is type(again.clone()) is ours
        check(again((9, 4)), CORE[name], (9, 4), seed=4)
        assert type(keras.initializers.get(ours)) is ours
        assert type(keras.initializers.get(name)) is theirs  # a name alone is Keras's
        assert pickle.loads(pickle.dumps(ours)) is ours
        assert repr(ours).endswith(f"gpuinit.keras.{name}'>")
        saved = keras.saving.serialize_keras_object(ours(seed=4))
        assert saved["class_name"] == saved["registered_name"] == f"gpuinit>{name}"
        old = json.loads(OLD.replace("HeNormal", name))
        short = {key: saved[key] for key in ("class_name", "config")}
        for one in (saved, old | {"config": saved["config"]}, short):
            for load in (keras.saving.deserialize_keras_object, keras.initializers.get):
                assert type(load(one)) is ours
                check(load(one)((9, 4)), CORE[name], (9, 4), seed=4)
    for name, theirs in vars(keras.initializers).items():
        if isinstance(theirs, type) and theirs.__name__ in (*FAMILY, "Zeros", "Ones", "Constant"):
            ours = getattr(gpuinit.keras, name)
            assert name in gpuinit.keras.__all__
            assert ours is (theirs if theirs.__name__ not in FAMILY else vars(gpuinit.keras)[theirs.__name__])
    generator = gpuinit.keras.HeNormal(keras.random.SeedGenerator(5))
    check(generator.clone()((9, 4)), gpuinit.he_normal, (9, 4), seed=5)


# As saved before the class had a name of its own there; by that of Keras's it was taken for Keras's.
OLD = """{"module": "gpuinit.keras", "class_name": "HeNormal", "config": {"seed": 11, "input_axes": null,
"output_axes": null}, "registered_name": "gpuinit>HeNormal"}"""

ELSEWHERE = """
import json, sys
import keras

def load(path):
    if not path.endswith("json"):
        return keras.saving.load_model(path)
    config = json.load(open(path))
    if config["class_name"].startswith("gpuinit>"):
        return keras.initializers.get(config)
    return keras.models.model_from_json(json.dumps(config))

for path in sys.argv[1:]:
    try:
        load(path)
    except (TypeError, ValueError) as error:
        assert "gpuinit>" in str(error), error
    else:
        raise AssertionError(path)
    assert "gpuinit" not in sys.modules
import gpuinit.keras
for path in sys.argv[1:]:
    load(path)
"""


def loaded_elsewhere():
    """By a process that has not imported gpuinit.keras: an error, and never Keras's own initialiser."""
    files = []

    def save(name, text):
        files.append(FOLDER / f"{BACKEND} {name}.json")
        files[-1].write_text(text)

    shared = gpuinit.keras.RandomNormal(seed=1)
    for name in FAMILY:
        save(name, json.dumps(keras.initializers.serialize(getattr(gpuinit.keras, name)(seed=4))))
        dense = keras.layers.Dense(3, kernel_initializer=getattr(gpuinit.keras, name)(seed=4))
        model = keras.Sequential([keras.Input((2,)), dense], name=name)
        save(f"model of {name}", model.to_json())
    cell = keras.layers.LSTM(3, recurrent_initializer=shared, return_sequences=True)
    wrapped = keras.Sequential([keras.Input((4, 2)), keras.layers.TimeDistributed(model), cell])
    wrapped = keras.Sequential(
        [wrapped, keras.layers.Bidirectional(keras.layers.GRU(3, "tanh", bias_initializer=shared))]
    )
    for suffix in ("keras", "h5"):
        files.append(FOLDER / f"{BACKEND} wrapped.{suffix}")
        wrapped.save(files[-1])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def fans():
    """Axes as in Keras; depthwise kernels get the fan that they have; EinsumDense names its own."""
    axes = gpuinit.keras.HeNormal(1, input_axes=(0, 1), output_axes=(0, 1, 3))
    layer = keras.layers.DepthwiseConv2D(3, depthwise_initializer=axes)
    layer.build((None, 8, 8, 256))
    expected = {"in_axis": (), "out_axis": 3, "batch_axis": 2, "seed": 1}
    check(layer.kernel.value, gpuinit.he_normal, (3, 3, 256, 1), **expected)
    layer = keras.layers.EinsumDense(
        "abc,cde->abde", (None, 4, 5), kernel_initializer=gpuinit.keras.HeNormal(1)
    )
    layer.build((None, 7, 12))
    check(layer.kernel.value, gpuinit.he_normal, (12, 4, 5), seed=1, in_axis=0, out_axis=(1, 2))


def saved_model():
    """A .keras file brings the classes and the weights back."""
    model = small_model()
    x = np.ones((2, 12, 12, 3), np.float32)
    before = as_numpy(model(x))
    model.save(FOLDER / f"{BACKEND}.keras")
    again = keras.saving.load_model(FOLDER / f"{BACKEND}.keras")
    assert as_numpy(again(x)).tobytes() == before.tobytes()
    initializer = again.get_layer("last").kernel_initializer
    assert type(initializer) is gpuinit.keras.HeNormal
    assert initializer.get_config()["seed"] == 11
    check(initializer((16, 4)), gpuinit.he_normal, (16, 4), seed=11)


def small_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, name="conv", kernel_initializer=gpuinit.keras.HeNormal()),
            layers.BatchNormalization(name="norm"),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            layers.SeparableConv2D(4, 3, name="separable"),
            layers.Conv2DTranspose(5, 3, name="transposed"),
            layers.Flatten(name="flat"),
            layers.Dropout(0.5, seed=1),
            layers.Dense(16, name="first"),
            layers.Dense(4, name="last", kernel_initializer=gpuinit.keras.HeNormal(seed=11)),
        ],
        name="model",
    )


class Own(keras.layers.Layer):
    """A layer that the default rules do not know, with a variable that is not of floating point."""

    def build(self, _):
        self.own = self.add_weight(shape=(2, 3), name="own")
        self.steps = self.add_weight(shape=(4,), dtype="int8", trainable=False, name="steps")


def contents(layer):
    return [as_numpy(weight.value).tobytes() for weight in layer.weights]


def soil(layer):
    """No value of it is one that a rule gives."""
    for weight in layer.weights:
        weight.assign(np.full(weight.shape, 7))


def whole_model():
    model = small_model()
    report = gpuinit.keras.initialize(model, seed=5)
    by_path = {variable.path.removeprefix("model/"): variable for variable in model.weights}
    named = {variable.path.removeprefix("model/"): variable.path for variable in model.weights}
    depthwise = {"in_axis": (), "out_axis": 3, "batch_axis": 2}
    for path, axes in {
        "conv/kernel": {},
        "depthwise/kernel": depthwise,
        "separable/depthwise_kernel": depthwise,
        "separable/pointwise_kernel": {},
        "transposed/kernel": {"in_axis": -1, "out_axis": -2},
        "first/kernel": {},
        "last/kernel": {},
    }.items():
        weight = by_path[path]
        check(weight.value, gpuinit.he_normal, tuple(weight.shape), seed=5, name=named[path], **axes)
    for path in ("conv/bias", "norm/beta", "norm/moving_mean", "last/bias"):
        assert not as_numpy(by_path[path].value).any()
    for path in ("norm/gamma", "norm/moving_variance"):
        assert (as_numpy(by_path[path].value) == 1).all()
    assert [row.name for row in report] == [variable.path for variable in model.weights]
    row = next(row for row in report if row.name == named["depthwise/kernel"])
    assert abs(row.std - (2 / 9) ** 0.5) < 1e-12
    assert abs(as_numpy(by_path["first/kernel"].value).std() / report[-4].std - 1) < 0.02
    assert max(map(len, str(report).splitlines())) <= 80
    table = str(report).splitlines()
    assert table[0].split() == ["name", "shape", "dtype", "rule", "std"]
    assert table[-1] == f"{len(report)} parameters, {model.count_params():,} elements"

    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    attention.build((None, 5, 12), (None, 5, 12))
    gpuinit.keras.initialize(attention, 5)
    for kernel, shape, axes in (
        (attention.query_dense.kernel, (12, 2, 4), {"in_axis": 0, "out_axis": (1, 2)}),
        (attention.output_dense.kernel, (2, 4, 12), {"in_axis": (0, 1), "out_axis": 2}),
    ):
        check(kernel.value, gpuinit.he_normal, shape, seed=5, name=kernel.path, **axes)

    table = keras.layers.Embedding(30, 20, name="table")
    table.build()
    rules = [("*embeddings", gpuinit.keras.HeUniform(seed=3)), *gpuinit.keras.DEFAULT_RULES]
    assert gpuinit.keras.initialize(table, 5)[0].std == 0.02
    (row,) = gpuinit.keras.initialize(table, 5, rules)
    check(table.embeddings.value, gpuinit.he_uniform, (30, 20), seed=5, name=table.embeddings.path)
    assert row.rule == "HeUniform"

    own = Own()
    own.build((None, 2))
    before = contents(own)
    raises(ValueError, "got none for ", gpuinit.keras.initialize, own)
    rows = gpuinit.keras.initialize(own, strict=False)
    assert {(row.rule, row.std) for row in rows} == {("-", None)}
    assert contents(own) == before
    row, _ = gpuinit.keras.initialize(own, rules=[("*", "ones")])
    assert (row.rule, row.std) == ("Ones", 0.0)
    raises(ValueError, "model must be built", gpuinit.keras.initialize, keras.layers.Dense(3))
    raises(TypeError, "got int", gpuinit.keras.initialize, 3)


def recurrent():
    """Glorot uniform with the fans of one gate, biases 0 or 1, under every wrapper, key by key."""
    layers = keras.layers
    sequence = (None, 5, 6)
    no_qr = {"recurrent_initializer": "zeros"}  # of which NumPy has none for 16 bits
    built = {}
    for name, layer, shape in (
        ("lstm", layers.LSTM(3), sequence),
        ("plain", layers.LSTM(3, unit_forget_bias=False), sequence),
        ("no bias", layers.LSTM(3, use_bias=False), sequence),
        ("cell", layers.LSTMCell(3, name="lstm_cell"), (None, 6)),
        ("gru", layers.GRU(3), sequence),
        ("reset before", layers.GRU(3, reset_after=False), sequence),
        ("float16", layers.GRU(3, dtype="float16", **no_qr), sequence),
        ("bfloat16", layers.LSTM(3, dtype="bfloat16", **no_qr), sequence),
        ("simple", layers.SimpleRNN(3), sequence),
        ("stacked", layers.RNN([layers.LSTMCell(3), layers.GRUCell(4)]), sequence),
        ("both", layers.Bidirectional(layers.LSTM(3)), sequence),
        ("distributed", layers.TimeDistributed(layers.LSTM(3)), (None, 2, 5, 6)),
        ("conv 1", layers.ConvLSTM1D(3, 2), (None, 5, 8, 2)),
        ("conv 2", layers.ConvLSTM2D(3, 2), (None, 5, 8, 8, 2)),
        ("conv 3", layers.ConvLSTM3D(3, 2), (None, 5, 4, 4, 4, 2)),
    ):
        built[name] = layer
        layer.build(shape)
        soil(layer)
        report = gpuinit.keras.initialize(layer, 5)
        for variable, row in zip(layer.weights, report, strict=True):
            *_, cell, own = variable.path.split("/")
            gates = next(n for word, n in GATES.items() if word in cell)
            *field, inputs, width = (1, *variable.shape)
            units = width // gates
            if own != "bias":
                limit = (6 / (np.prod(field) * (inputs + units))) ** 0.5
                arguments = {"limit": limit, "seed": 5, "name": variable.path, "dtype": row.dtype}
                check(variable.value, gpuinit.uniform, variable.shape, **arguments)
                assert abs(row.std / (limit / 3**0.5) - 1) < 1e-12
                continue
            assert row.std == 0
            forget = 1.0 if gates == 4 and name != "plain" else 0.0
            expected = np.repeat([0, forget, 0, 0] if gates == 4 else [0] * gates, units)
            found = as_numpy(variable.value)
            assert (found.astype(float) == np.broadcast_to(expected, found.shape)).all(), variable.path
    assert [row.shape for row in gpuinit.keras.initialize(built["gru"])] == [(6, 9), (3, 9), (2, 9)]
    assert len(built["no bias"].weights) == 2
    assert [len(built[name].weights) for name in ("stacked", "both")] == [6, 6]
    for name, limits in {  # by hand: 6 inputs, 3 units; 2 channels, 3 filters, a field of 4
        "lstm": ((6 / (6 + 3)) ** 0.5, (6 / (3 + 3)) ** 0.5),
        "simple": ((6 / (6 + 3)) ** 0.5, (6 / (3 + 3)) ** 0.5),
        "conv 2": ((6 / (4 * (2 + 3))) ** 0.5, (6 / (4 * (3 + 3))) ** 0.5),
    }.items():
        for row, limit in zip(gpuinit.keras.initialize(built[name]), limits, strict=False):
            assert abs(row.std * 3**0.5 / limit - 1) < 1e-12
    wide = layers.LSTM(64)
    wide.build((None, 5, 32))
    gpuinit.keras.initialize(wide)
    kernel = np.abs(as_numpy(wide.cell.kernel.value))
    assert 0.999 * 0.25 < kernel.max() <= 0.25  # sqrt(6 / 96)


GATES = {"lstm": 4, "gru": 3, "simple_rnn": 1}


def other_layers():
    """The rest of Keras's own, and what is shared between a model and one inside it."""
    layers = keras.layers
    sequence = (None, 5, 6)
    values = {}
    for layer, shape in (
        (layers.PReLU(name="prelu"), sequence),
        (layers.Attention(True, "concat", name="attention"), [sequence, sequence]),
        (layers.BatchNormalization(renorm=True, name="norm"), sequence),
    ):
        layer.build(shape)
        soil(layer)
        for row, weight in zip(gpuinit.keras.initialize(layer), layer.weights, strict=True):
            (values[row.name],) = set(as_numpy(weight.value).ravel().tolist())
            assert row.std == 0
    assert values == {
        "prelu/alpha": 0,
        **{f"attention/{name}": 1 for name in ("scale", "concat_score_weight")},
        **{f"norm/{name}": 1 for name in ("gamma", "moving_variance", "moving_stddev", "renorm_stddev")},
        **{f"norm/{name}": 0 for name in ("beta", "moving_mean", "renorm_mean")},
    }

    additive = layers.AdditiveAttention()
    additive.build([sequence, sequence])
    gpuinit.keras.initialize(additive, 5)
    check(additive.scale.value, gpuinit.glorot_uniform, (6,), seed=5, name=additive.scale.path)

    table = layers.ReversibleEmbedding(30, 20, tie_weights=False)
    table.build()
    rows = gpuinit.keras.initialize(table, 5)
    assert [(row.name.rpartition("/")[2], row.std) for row in rows] == [
        ("embeddings", 0.02),
        ("reverse_embeddings", 0.02),
    ]

    spectral = layers.SpectralNormalization(layers.Dense(3))
    spectral.build((None, 6))
    gpuinit.keras.initialize(spectral, 5)
    kernel, vector = spectral.layer.kernel, spectral.vector_u
    check(kernel.value, gpuinit.he_normal, (6, 3), seed=5, name=kernel.path)
    check(vector.value, gpuinit.truncated_normal, (1, 3), stddev=0.02, seed=5, name=vector.path)

    shared = layers.Dense(6)
    ends = keras.Input((6,))
    inner = keras.Sequential([ends, shared, layers.Dense(6)], name="inner")
    outer = keras.Model(ends, inner(shared(ends)))
    assert len(gpuinit.keras.initialize(outer, 5)) == 4  # where the shared layer is met before the inner one
    check(shared.kernel.value, gpuinit.he_normal, (6, 6), seed=5, name=shared.kernel.path)


def frozen():
    """A layer that is not trainable is left alone, unless a rule of the caller names it."""
    layers = keras.layers
    base = keras.Sequential(
        [layers.Dense(4, name="dense"), layers.BatchNormalization(name="norm")], name="base"
    )
    model = keras.Sequential([keras.Input((6,)), base, layers.Dense(3, name="head")], name="model")
    base.trainable = False
    soil(model)
    before = contents(base)
    for rules in (None, [("*", "ones"), *gpuinit.keras.DEFAULT_RULES]):
        report = gpuinit.keras.initialize(model, 5, rules)
        assert contents(base) == before
        assert {row.name.split("/")[-2] for row in report if row.written == "frozen"} == {"dense", "norm"}
        assert {row.name.split("/")[-2] for row in report if row.written == "whole"} == {"head"}
    rules = [("*dense/kernel", "zeros"), *gpuinit.keras.DEFAULT_RULES]
    gpuinit.keras.initialize(model, 5, rules)
    assert not as_numpy(base.layers[0].kernel.value).any()
    assert contents(base)[1:] == before[1:]


def tower(name=None, inner=None):
    """A model whose layers do not know that they are in it."""
    ends = keras.Input((6,))
    x = keras.layers.Dense(6, name="proj")(ends if inner is None else inner(ends))
    return keras.Model(ends, x, name=name)


def beside(*towers):
    ends = [keras.Input((6,)) for _ in towers]
    x = keras.layers.Add()([one(end) for one, end in zip(towers, ends, strict=True)])
    return keras.Model(ends, keras.layers.Dense(3, name="head")(x))


class Held(keras.Model):
    """Layers as attributes, in this order."""

    def __init__(self, **held):
        super().__init__(name="held")
        for name, value in held.items():
            setattr(self, name, value)

    def build(self, shape):
        for layer in self._flatten_layers(include_self=False):
            if not layer.built:
                layer.build(shape)


class Many(keras.layers.Layer):
    def __init__(self, names):
        super().__init__(name="many")
        self.held = [self.add_weight(shape=(6, 6), name=name) for name in names]


def kernels(layer, seed=5):
    """By name, as `initialize` makes them."""
    soil(layer)
    report = gpuinit.keras.initialize(layer, seed)
    pairs = zip(report, layer.weights, strict=True)
    found = {row.name: weight for row, weight in pairs if row.std}
    for name, weight in found.items():
        check(weight.value, gpuinit.he_normal, tuple(weight.shape), seed=seed, name=name)
    assert len({as_numpy(weight.value).tobytes() for weight in found.values()}) == len(found)
    return {name: as_numpy(weight.value).tobytes() for name, weight in found.items()}


def shared_paths():
    """Weights of one path are told apart by the layers that hold them, or refused; others keep theirs."""
    model = beside(tower("left"), tower("right"))
    assert [weight.path for weight in model.weights[::2]] == ["proj/kernel", "proj/kernel", "head/kernel"]
    named = kernels(model)
    assert [*named] == ["left//proj/kernel", "right//proj/kernel", "head/kernel"]
    right, left = tower("right"), tower("left")
    assert kernels(beside(left, right)) == kernels(beside(right, left)) == named
    assert kernels(beside(tower("middle"), right, tower("left"))).items() > named.items()
    only = keras.layers.Dense(6, name="only")  # whose path is that of no other
    assert "only/kernel" in kernels(beside(tower("left", only), tower("right")))
    for held in (Held(a=tower("left"), b=tower("right")), Held(b=tower("right"), a=[tower("left")])):
        held.build((None, 6))
        assert kernels(held).items() < named.items()

    unnamed = kernels(beside(tower(), tower()))  # whatever numbers Keras gives them
    assert [*unnamed] == ["functional(0)//proj/kernel", "functional(1)//proj/kernel", "head/kernel"]
    for pattern in ("functional(1)//proj/kernel", lambda _, name: name.startswith("functional(1)//proj/k")):
        rules = [(pattern, "ones"), *gpuinit.keras.DEFAULT_RULES]
        report = gpuinit.keras.initialize(beside(tower(), tower()), 5, rules)
        assert [row.rule for row in report if row.shape[1:]] == ["HeNormal", "Ones", "HeNormal"]
    second, _, first = tower(), keras.layers.Dense(3), tower()
    model = beside(first, second)
    assert kernels(model) == unnamed
    model.save(FOLDER / f"{BACKEND} towers.keras")
    assert kernels(keras.saving.load_model(FOLDER / f"{BACKEND} towers.keras")) == unnamed
    assert kernels(keras.models.clone_model(model)) == unnamed

    deep = beside(tower("left", tower("inner")), tower("right", tower("inner", tower("inner"))))
    assert [*kernels(deep)] == [
        *("left/inner//proj/kernel", "left//proj/kernel"),
        *("right/inner/inner//proj/kernel", "right/inner//proj/kernel", "right//proj/kernel"),
        "head/kernel",
    ]
    wrap, distributed = tower("left"), keras.layers.TimeDistributed(tower("left"), name="wrap")
    ends = keras.Input((4, 6))
    x = keras.layers.Concatenate()([distributed(ends), keras.layers.TimeDistributed(wrap)(ends)])
    wrapped = kernels(keras.Model(ends, x))
    assert [*wrapped] == ["wrap/left//proj/kernel", "time_distributed(0)/left//proj/kernel"]
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="d")], name="s")
    nested = keras.Sequential([keras.Input((6,)), inner, keras.layers.Dense(6, name="d")], name="s")
    assert [*kernels(nested)] == ["s//s/d/kernel", "s/d/kernel"]

    shared = keras.layers.Dense(6, name="proj")  # the first ways to it are equally long
    ends = keras.Input((6,))
    for names in ("ab", "ba"):
        made = [keras.Model(ends, shared(ends), name=name) for name in names]
        ways = kernels(beside(*made, tower("c")))
        assert [*ways] == ["a//proj/kernel", "c//proj/kernel", "head/kernel"]
    assert [*kernels(beside(*made))] == ["proj/kernel", "head/kernel"]

    dense = keras.layers.Dense(6, name="proj")
    lists = Held(blocks=[keras.layers.Dense(6, name="proj") for _ in range(3)])
    dicts = Held(blocks={name: keras.layers.Dense(6, name="proj") for name in "ab"})
    equal_towers = Held(a=tower("tower"), b=tower("tower"))
    numbered = Held(a=tower(), b=tower())
    remade = Held(blocks=[dense])
    shown = ", ".join(f"2 named many/{name}" for name in "vwabc")
    remade.blocks = [keras.layers.Dense(6, name="proj")]
    for held, names in (
        (lists, "3 named held/proj/kernel"),
        (dicts, "2 named held/proj/kernel"),
        (remade, "2 named held/proj/kernel"),
        (equal_towers, "2 named tower//proj/kernel"),
        (numbered, "2 named functional//proj/kernel"),
        (Held(a=Many("vwvv")), "3 named many/v"),
        (Held(a=Many("vwabcde"), b=Many("abcwdev")), f"{shown}, and 2 more"),
    ):
        held.build((None, 6))
        soil(held)
        before = contents(held)
        rules = [("many/*", gpuinit.keras.HeNormal()), *gpuinit.keras.DEFAULT_RULES]
        message = "model must have a name for each weight, as equal names give equal weights; name the"
        with pytest.raises(ValueError, match=re.escape(message) + ".*, got " + re.escape(names)):
            gpuinit.keras.initialize(held, 5, rules)
        assert contents(held) == before
        gpuinit.keras.initialize(held, 5, [("*", "zeros")])  # nothing is drawn by a name
    equal_towers.a.name = "other"
    assert [*kernels(equal_towers)] == ["other//proj/kernel", "tower//proj/kernel"]
    lists.blocks[0].trainable = lists.blocks[1].trainable = False
    gpuinit.keras.initialize(lists, 5)
    check(lists.blocks[2].kernel.value, gpuinit.he_normal, (6, 6), seed=5, name="held/proj/kernel")

    for pattern, count in (("proj/kernel", 2), ("left//proj/kernel", 1), ("right//*", 1), ("*/kernel", 3)):
        model = beside(tower("left"), tower("right"))
        report = gpuinit.keras.initialize(model, 5, [(pattern, "zeros"), *gpuinit.keras.DEFAULT_RULES])
        assert [row.rule for row in report[::2]].count("Zeros") == count, pattern


def checked_before():
    """What cannot be drawn is refused before anything is written, and the error says which variable."""
    layers = keras.layers
    half = layers.Dense(3, dtype="float16", name="half")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="first"), half, Own(name="own")])
    soil(model)
    before = contents(model)
    normal = gpuinit.keras.RandomNormal

    def failing(layer):
        raise KeyError(layer.name)

    for kind, message, pattern, initializer in (
        (
            ValueError,
            "dtype must be one of float32, float16, bfloat16, float64, got 'int8'",
            "*steps",
            normal(),
        ),
        (ValueError, "stddev 100000.0", "*half/kernel", normal(stddev=1e5)),
        (ValueError, "stddev must be", "*half/kernel", normal(stddev=-1)),
        (ValueError, "got (0, 2)", "*half/kernel", gpuinit.keras.HeNormal(1, (0, 2), (1,))),
        (ValueError, "nonsense", "*own/own", "nonsense"),
        (ValueError, "3.5", "*own/own", 3.5),
        (KeyError, "half", "*half/bias", failing),
        (ValueError, "got none for ", "*own/own", None),
    ):
        rules = [(pattern, initializer), ("*own/own", "zeros"), *gpuinit.keras.DEFAULT_RULES]
        with pytest.raises(kind, match=re.escape(message)) as caught:
            gpuinit.keras.initialize(model, 5, rules)
        assert contents(model) == before, message
        if initializer is not None:
            (note,) = caught.value.__notes__
            assert note.endswith(pattern[1:] + ".")
    raises(
        TypeError,
        "input_axes must be axes in [-2, 2) for shape",
        gpuinit.keras.HeNormal(1, "x", (1,)),
        (2, 3),
    )
    for axes in ((2,), [-3]):
        message = f"output_axes must be axes in [-2, 2) for shape (2, 3), got {axes}"
        raises(ValueError, message, gpuinit.keras.HeNormal(1, (0,), axes), (2, 3))


def memory():
    """Of 64 MiB, no copy beyond it, in the whole process."""
    gpuinit.keras.HeNormal(1)((8, 8))
    status = Path("/proc/self/status")
    if not status.exists():
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0])
    tensor = gpuinit.keras.HeNormal(1)((4096, 4096))
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) - before
    print(f"memory {BACKEND}: {peak / 1024 - 64:.0f} MiB beyond the weight of 64 MiB")
    assert peak / 1024 < 64 + 40, peak  # 16 MiB of scratch, and what the process needs besides
    del tensor


def on_the_stand_in(tf):
    """What TensorFlow says of a GPU, with the stand-in for CuPy, whose memory TensorFlow can read."""
    gpu = SimpleNamespace(device="/job:localhost/replica:0/task:0/device:GPU:1")
    with mock.patch.dict(sys.modules, cupy=cuda_sim), mock.patch.object(tf, "zeros", return_value=gpu):
        conftest.forget()
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            cuda_sim.launches.clear()
            tensor = gpuinit.keras.HeNormal(seed=3)((37, 53), dtype)
            assert [device for device, _ in cuda_sim.launches] == [1]
            check(tensor, gpuinit.he_normal, (37, 53), seed=3, dtype=dtype)
    conftest.forget()


def elsewhere():
    """JAX: a layout makes every device its own shard. TensorFlow: a graph; torch: the meta device."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        made = tf.function(lambda: gpuinit.keras.HeNormal(3)((12, 16), "bfloat16"))()
        check(made, gpuinit.he_normal, (12, 16), seed=3, dtype="bfloat16")
        if not conftest.missing("cuda-sim"):
            on_the_stand_in(tf)
    if BACKEND == "torch":
        with keras.device("meta"):
            assert gpuinit.keras.HeNormal(3)((2**20, 2**20), "bfloat16").is_meta
    if BACKEND != "jax":
        return
    import jax

    devices = keras.distribution.list_devices()
    assert len(devices) == 4, devices
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*kernel"] = (None, "model")
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout_map))
    layer = keras.layers.Dense(16, kernel_initializer=gpuinit.keras.HeNormal(3), name="sharded")
    layer.build((None, 12))
    check(layer.kernel.value, gpuinit.he_normal, (12, 16), seed=3)
    assert layer.kernel.value.sharding.shard_shape((12, 16)) == (12, 8)
    gpuinit.keras.initialize(layer, 5)
    check(layer.kernel.value, gpuinit.he_normal, (12, 16), seed=5, name=layer.kernel.path)
    assert layer.kernel.value.sharding.shard_shape((12, 16)) == (12, 8)
    keras.distribution.set_distribution(None)
    init = gpuinit.keras.HeNormal(keras.random.SeedGenerator(6))

    def traced(state):
        with keras.StatelessScope([(init.seed.state, state)]):
            return init((12, 16))

    check(jax.jit(traced)(init.seed.state.value), gpuinit.he_normal, (12, 16), seed=6)


def nth(generator, count):
    """The seed of this draw."""
    return int(generator.get_config()["seed"]) | count << 32


def in_tf_functions():
    """A SeedGenerator draws anew in every run, as eagerly; an integer is a constant, while that is small."""
    import tensorflow as tf

    generator = keras.random.SeedGenerator(6)
    shapes = [
        ("float32", (12, 16)),
        ("float16", (5,)),
        ("bfloat16", (3, 4)),
        ("float64", ()),
        ("float32", (0, 3)),
    ]
    made_of = []

    @tf.function
    def draw():
        made = [gpuinit.keras.HeNormal(generator)(shape, dtype) for dtype, shape in shapes]
        made_of.append([(tensor.dtype.name, tuple(tensor.shape)) for tensor in made])  # known when traced
        return made

    count = 0
    for _ in range(2):
        for tensor, (dtype, shape) in zip(draw(), shapes, strict=True):
            check(tensor, gpuinit.he_normal, shape, seed=nth(generator, count), dtype=dtype)
            count += 1
        assert generator.state.numpy().tolist() == [6, count]
        check(gpuinit.keras.HeNormal(generator)((7,)), gpuinit.he_normal, (7,), seed=nth(generator, count))
        count += 1
    assert made_of == [shapes]

    init = gpuinit.keras.HeNormal(generator := keras.random.SeedGenerator(6))
    wide = gpuinit.keras.RandomNormal(0.0, 1e5, generator)
    raises(ValueError, "stddev 100000.0", tf.function(lambda: wide((5,), "float16"), autograph=False))

    @tf.function
    def loop(times):
        rows = tf.TensorArray(tf.float32, times, element_shape=(7,))
        for i in tf.range(times):
            rows = rows.write(i, init((7,)))
        return rows.stack()

    @tf.function
    def maybe(wanted):
        return init((7,)) if wanted else tf.zeros(7)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(x * init((7,)))
        return tape.gradient(total, x)

    drawn = [*loop(tf.constant(3)), *(maybe(tf.constant(wanted)) for wanted in (True, False, True))]
    assert not as_numpy(drawn.pop(4)).any()
    drawn += [gradient(tf.ones(7)), *tf.data.Dataset.range(2).map(lambda i: init((7,)))]
    for count, tensor in enumerate(drawn):
        check(tensor, gpuinit.he_normal, (7,), seed=nth(generator, count))

    variables = []

    @tf.function
    def build():
        if not variables:
            layer = keras.layers.Dense(4, kernel_initializer=gpuinit.keras.HeNormal(generator))
            layer.build((None, 3))
            one = tf.Variable(lambda: gpuinit.keras.HeNormal(generator)((3, 4)))
            variables.extend([layer.kernel, one])
        return tf.reduce_sum(variables[1])

    build()
    for count, variable in enumerate(variables, len(drawn)):
        check(tf.convert_to_tensor(variable), gpuinit.he_normal, (3, 4), seed=nth(generator, count))
    assert generator.state.numpy().tolist() == [6, len(drawn) + 2]

    with pytest.raises(tf.errors.InvalidArgumentError, match="gpuinit_weights_made_by_the_host"):
        tf.function(lambda: init((3, 4)), jit_compile=True, autograph=False)()
    integer = gpuinit.keras.HeNormal(2**63 + 7)
    for compiled in (False, True):
        made = tf.function(lambda: integer((2048, 2048)), jit_compile=compiled, autograph=False)
        check(made(), gpuinit.he_normal, (2048, 2048), seed=2**63 + 7)
        assert host_calls(made) == 0
    large = tf.function(lambda: integer((2048, 2049)), autograph=False)
    check(large(), gpuinit.he_normal, (2048, 2049), seed=2**63 + 7)
    assert host_calls(large) == 1
    huge = tf.function(lambda: integer((2**17, 2**14)), autograph=False)  # 8 GiB
    assert huge.get_concrete_function().structured_outputs.shape == (2**17, 2**14)
    raises(ValueError, "got -1", tf.function(lambda: gpuinit.keras.HeNormal(-1)((3,)), autograph=False))

    # AutoGraph would take seconds to translate what is called, and warn of what it cannot.
    translated, model = [], small_model()

    def seed_of(seed):
        translated.append(is_translated())
        return 3

    with mock.patch.object(gpuinit.keras, "seed_of", seed_of):
        tf.function(lambda: integer((3, 4)))()
        tf.function(gpuinit.keras.initialize)(model)
    assert len(translated) == 1 + 7, translated  # of the model: those that are drawn
    assert not any(translated)


def is_translated():
    from tensorflow.python.autograph.core import ag_ctx

    return ag_ctx.control_status_ctx().status == ag_ctx.Status.ENABLED


def host_calls(function):
    operations = function.get_concrete_function().graph.get_operations()
    return sum("PyFunc" in operation.type for operation in operations)


def in_graphs_of_torch():
    """torch.compile breaks its graph; what records one takes an integer; the meta device needs no seed."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    generator = keras.random.SeedGenerator(6)
    integer, drawn = gpuinit.keras.HeNormal(3), gpuinit.keras.HeNormal(generator)

    def run(x):
        return x * 2, integer((12, 16)), drawn((12, 16)), drawn((3,), "bfloat16"), x + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager")
    for count in (0, 2):
        before, one, other, third, after = compiled(torch.ones(2))
        check(one, gpuinit.he_normal, (12, 16), seed=3)
        check(other, gpuinit.he_normal, (12, 16), seed=nth(generator, count))
        check(third, gpuinit.he_normal, (3,), seed=nth(generator, count + 1), dtype="bfloat16")
        assert (before.tolist(), after.tolist()) == ([2, 2], [2, 2])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(lambda: integer((12, 16)), backend="eager", fullgraph=True)()
    layer = keras.layers.Dense(16, name="compiled")
    layer.build((None, 12))
    torch._dynamo.reset()
    torch.compile(lambda: gpuinit.keras.initialize(layer, 5), backend="eager")()
    check(layer.kernel.value, gpuinit.he_normal, (12, 16), seed=5, name=layer.kernel.path)

    class Adds(torch.nn.Module):
        def __init__(self, init):
            super().__init__()
            self.init = init

        def forward(self, x):
            return x + self.init((12, 16))

    x = torch.zeros(12, 16)
    for trace in (
        lambda init: make_fx(Adds(init))(x),
        lambda init: torch.export.export(Adds(init), (x,)).module(),
        lambda init: torch.jit.trace(Adds(init), x),
    ):
        check(trace(integer)(x), gpuinit.he_normal, (12, 16), seed=3)
        raises(ValueError, "seed must be an integer in what make_fx, torch.export or", trace, drawn)
    with keras.device("meta"):
        assert drawn((2**20, 2**20), "bfloat16").is_meta
    assert as_numpy(generator.state.value).tolist() == [6, 4]

    lazy = keras.Sequential([keras.Input((12,)), Lazy(keras.random.SeedGenerator(6))])
    check(lazy.layers[0].inner.kernel.value, gpuinit.he_normal, (12, 16), seed=6)


class Lazy(keras.layers.Layer):
    """Keras calls one without a build once symbolically, to find what it has."""

    def __init__(self, seed):
        super().__init__()
        self.inner = keras.layers.Dense(16, kernel_initializer=gpuinit.keras.HeNormal(seed))

    def call(self, x):
        return self.inner(x)


def in_transformations_of_jax():
    """A SeedGenerator whose state would be lost is an error; as in a training step it is drawn from."""
    import jax

    generator = keras.random.SeedGenerator(6)
    init = gpuinit.keras.RandomNormal(seed=generator)
    for transformed in (jax.jit(lambda: init((3,))), lambda: jax.eval_shape(lambda: init((3,)))):
        raises(ValueError, "seed must be an integer under jit and", transformed)
    raises(ValueError, "seed must be", jax.jit(lambda: init((3,))))
    assert generator.state.value.tolist() == [6, 0]  # and not a tracer
    check(jax.jit(lambda: gpuinit.keras.HeNormal(3)((12, 16)))(), gpuinit.he_normal, (12, 16), seed=3)

    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.generator = generator

        def call(self, x):
            return x + init((4,))

    model = keras.Sequential([keras.Input((4,)), Noise(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 1)), batch_size=4, epochs=2, verbose=0)
    assert generator.state.value.tolist() == [6, 4]

    lazy = keras.Sequential([keras.Input((12,)), Lazy(keras.random.SeedGenerator(6))])
    check(lazy.layers[0].inner.kernel.value, gpuinit.he_normal, (12, 16), seed=6)


TRACED = {"tensorflow": in_tf_functions, "torch": in_graphs_of_torch, "jax": in_transformations_of_jax}


def traced():
    """In the programs of a backend."""
    if BACKEND in TRACED:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Layer 'lazy")  # from Keras, where it cannot call it
            TRACED[BACKEND]()


MODELS = (
    saved_model,
    loaded_elsewhere,
    whole_model,
    recurrent,
    other_layers,
    frozen,
    shared_paths,
    checked_before,
)
for test in (memory, bits, draws, numbers, meaning, seeds, configurations, fans, *MODELS, elsewhere, traced):
    test()
print("equal")
