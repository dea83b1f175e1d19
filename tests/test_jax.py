"""gpuinit.jax: the bits of the core, eager, traced and sharded; what JAX's users hand to it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gpuinit

jax = pytest.importorskip("jax", reason='JAX is not installed: pip install "gpuinit[jax]"')

import jax.numpy as jnp  # noqa: E402
from jax_helpers import SEED, SHAPE, core, key, same  # noqa: E402

import gpuinit.jax  # noqa: E402
from gpuinit.jax import arrays, initializers  # noqa: E402

ROOT = Path(__file__).parent.parent

NAMES = ("he_normal", "he_uniform", "glorot_normal", "glorot_uniform", "lecun_normal", "lecun_uniform")
ALIASES = {
    "kaiming_normal": "he_normal",
    "kaiming_uniform": "he_uniform",
    "xavier_normal": "glorot_normal",
    "xavier_uniform": "glorot_uniform",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_family_has_the_bits_of_the_core(name):
    assert same(getattr(gpuinit.jax, name)()(key(), SHAPE), core(fill=getattr(gpuinit, name)))
    axes = {"in_axis": 2, "out_axis": (0, 1), "batch_axis": 3}
    expected = core((3, 4, 5, 6), getattr(gpuinit, name), **axes)
    assert same(getattr(gpuinit.jax, name)(**axes)(key(), (3, 4, 5, 6)), expected)


# Initialisers of JAX's names, and what the core calls the same.
DRAWS = {
    "normal": (gpuinit.jax.normal, partial(gpuinit.normal, stddev=0.01)),
    "normal of 0.3": (partial(gpuinit.jax.normal, 0.3), partial(gpuinit.normal, stddev=0.3)),
    "uniform": (gpuinit.jax.uniform, partial(gpuinit.uniform, low=0, high=0.01)),
    "uniform of 10": (partial(gpuinit.jax.uniform, 10.0), partial(gpuinit.uniform, low=0, high=10)),
    "truncated": (gpuinit.jax.truncated_normal, partial(gpuinit.truncated_normal, stddev=0.01)),
    "truncated at other bounds": (
        partial(gpuinit.jax.truncated_normal, 0.3, lower=-0.5, upper=3),
        partial(gpuinit.truncated_normal, stddev=0.3, lower=-0.5, upper=3),
    ),
    "scaled, normal": (
        partial(gpuinit.jax.variance_scaling, 0.7, "fan_geo_avg", "normal"),
        partial(gpuinit.normal, stddev=(0.7 / (96 * 40) ** 0.5) ** 0.5),
    ),
    "scaled, truncated": (
        partial(gpuinit.jax.variance_scaling, 0.7, "fan_avg", "truncated_normal"),
        partial(gpuinit.truncated_normal, stddev=(0.7 / 68) ** 0.5 / 0.87962566103423978),
    ),
    "scaled, uniform": (
        partial(gpuinit.jax.variance_scaling, 0.7, "fan_out", "uniform"),
        partial(gpuinit.uniform, limit=(3 * 0.7 / 40) ** 0.5),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_have_the_bits_of_the_core(draw, dtype):
    ours, fill = DRAWS[draw]
    keys = jax.random.wrap_key_data(jnp.array([[0, 3], [SEED >> 32, SEED & 0xFFFFFFFF]], jnp.uint32))
    with jax.enable_x64(dtype == "float64"):
        for init in (ours(dtype=dtype), partial(ours(), dtype=jnp.dtype(dtype))):
            expected = core(fill=fill, dtype=dtype)
            assert same(init(key(), SHAPE), expected)
            assert same(jax.jit(partial(init, shape=SHAPE))(key()), expected)
            many = jax.vmap(partial(init, shape=SHAPE))(keys)
            assert same(many[0], core(fill=fill, dtype=dtype, seed=3))
            assert same(many[1], expected)


def test_the_meaning_is_that_of_jax():
    """Two-sample Kolmogorov-Smirnov with 2**16 weights of each: over the bound, 0.0181, once in 1e9."""
    from scipy.stats import ks_2samp

    shape = (512, 128)
    bound = (np.log(2 / 1e-9) / shape[0] / shape[1]) ** 0.5

    def distance(ours, theirs):
        draws = ours(jax.random.key(1), shape), theirs(jax.random.key(2), shape)
        return ks_2samp(*(np.asarray(draw).ravel() for draw in draws)).statistic

    modes = ("fan_in", "fan_out", "fan_avg", "fan_geo_avg")
    words = ("normal", "truncated_normal", "uniform", "normal")
    calls = [("variance_scaling", (0.7, *pair)) for pair in zip(modes, words, strict=True)]
    calls += [("normal", ()), ("uniform", ()), ("uniform", (10.0,)), ("truncated_normal", ())]
    calls += [("truncated_normal", (0.3, None, *bounds)) for bounds in [(-0.5, 3), (1, 4), (-2, 0.5)]]
    for name, arguments in calls:
        made = [getattr(owner, name)(*arguments) for owner in (gpuinit.jax, jax.nn.initializers)]
        assert distance(*made) < bound, (name, arguments)
    theirs = jax.nn.initializers.variance_scaling(0.7, "fan_avg", "normal")
    for wrong in (("fan_geo_avg", "normal"), ("fan_avg", "truncated_normal")):
        assert distance(gpuinit.jax.variance_scaling(0.7, *wrong), theirs) > bound


@pytest.mark.parametrize("array", [jnp.float32, jnp.bfloat16, np.float64, jnp.int32])
def test_numbers_may_be_arrays_of_no_dimension(array):
    for ours, fill in (
        (gpuinit.jax.normal(array(3)), partial(gpuinit.normal, stddev=3)),
        (gpuinit.jax.uniform(array(3)), partial(gpuinit.uniform, low=0, high=3)),
        (
            gpuinit.jax.truncated_normal(array(3), lower=array(-1), upper=array(2)),
            partial(gpuinit.truncated_normal, stddev=3, lower=-1, upper=2),
        ),
        (
            gpuinit.jax.variance_scaling(array(3), "fan_in", "normal"),
            partial(gpuinit.variance_scaling, scale=3, distribution="untruncated_normal"),
        ),
    ):
        assert same(ours(key(), SHAPE), core(fill=fill))
        assert same(jax.jit(partial(ours, shape=SHAPE))(key()), core(fill=fill))


def test_numbers_that_are_traced_are_refused_in_words():
    for name, argument, more in (
        ("normal", "stddev", ()),
        ("truncated_normal", "stddev", ()),
        ("uniform", "scale", ()),
        ("variance_scaling", "scale", ("fan_in", "normal")),
    ):
        init = getattr(gpuinit.jax, name)
        with pytest.raises(TypeError, match=rf"^{argument} must be .*that is known now, got .*Tracer"):
            jax.jit(lambda number, init=init, more=more: init(number, *more)(key(), SHAPE))(0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: gpuinit.jax.normal(-1.0), r"^stddev must be .* >= 0, got -1\.0$"),
        (lambda: gpuinit.jax.uniform(-1.0), r"^scale must be .* >= 0, got -1\.0$"),
        (lambda: gpuinit.jax.truncated_normal(1.0, None, 2, 1), r"^upper must be .*got lower 2\.0"),
        (lambda: gpuinit.jax.variance_scaling(0, "fan_in", "normal"), r"^scale must be .*got 0$"),
        (
            lambda: gpuinit.jax.variance_scaling(1, "fan", "normal"),
            r"^mode must be .*fan_geo_avg, got 'fan'$",
        ),
        (
            lambda: gpuinit.jax.variance_scaling(1, "fan_in", "untruncated_normal"),
            r"^distribution must be one of truncated_normal, normal, uniform, got 'untruncated_normal'$",
        ),
    ],
)
def test_wrong_numbers_and_words_are_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("under", [lambda f: f, jax.jit])
def test_weights_that_would_be_infinite_are_refused(under):
    for name, argument in (("normal", "stddev"), ("truncated_normal", "stddev"), ("uniform", "scale")):
        init = getattr(gpuinit.jax, name)(1e5)
        assert under(lambda k, init=init: init(k, SHAPE))(key()).dtype == np.float32
        with pytest.raises(
            ValueError, match=rf"^{argument} must leave .*finite in float16, got {argument} 1"
        ):
            under(lambda k, init=init: init(k, SHAPE, np.float16))(key())


@pytest.mark.parametrize("under", [lambda f: f, jax.jit])
def test_weights_that_would_all_be_0_are_refused(under):
    for init, argument in (
        (gpuinit.jax.normal(1e-9), "stddev"),
        (gpuinit.jax.truncated_normal(1e-9), "stddev"),
        (gpuinit.jax.uniform(1e-9), "scale"),
        (gpuinit.jax.variance_scaling(1e-18, "fan_in", "normal"), "scale"),
    ):
        assert under(lambda k, init=init: init(k, SHAPE))(key()).any()
        with pytest.raises(
            ValueError, match=rf"^{argument} must leave weights other than 0 in float16, .*e-"
        ):
            under(lambda k, init=init: init(k, SHAPE, np.float16))(key())


def test_arguments_are_those_of_jax():
    from inspect import signature

    draws = ("variance_scaling", "truncated_normal", "normal", "uniform")
    for name in (*NAMES, *ALIASES, *draws):
        ours, theirs = getattr(gpuinit.jax, name), getattr(jax.nn.initializers, name)
        assert [(p.name, p.default, p.kind) for p in signature(ours).parameters.values()] == [
            (p.name, p.default, p.kind) for p in signature(theirs).parameters.values()
        ]
    theirs = signature(jax.nn.initializers.he_normal()).parameters
    for init in (gpuinit.jax.he_normal(), gpuinit.jax.normal(), gpuinit.jax.uniform()):
        assert list(signature(init).parameters) == list(theirs)


def test_names_of_jax_are_all_here():
    for alias, name in ALIASES.items():
        assert getattr(gpuinit.jax, alias) is getattr(gpuinit.jax, name)
    for name in ("zeros", "ones", "constant"):
        assert getattr(gpuinit.jax, name) is getattr(jax.nn.initializers, name)
    theirs = {name for name in vars(jax.nn.initializers) if not name.startswith("_")}
    assert theirs - set(gpuinit.jax.__all__) == {"Initializer", "orthogonal", "delta_orthogonal"}


@pytest.mark.parametrize("shape", [(), 7, (0, 3), (5,), (3, 3, 8, 4)])
def test_every_shape_eager_and_jitted(shape):
    init = gpuinit.jax.he_normal()
    assert same(init(key(), shape), core(shape))
    assert same(jax.jit(partial(init, shape=shape))(key()), core(shape))


def test_keys_typed_and_raw_and_of_four_words():
    init = gpuinit.jax.he_normal()
    raw = jax.random.key_data(key())
    four = jnp.concatenate([raw, jnp.array([1, 2], jnp.uint32)])
    for given in (key(), raw, np.asarray(raw), jax.random.wrap_key_data(four, impl="rbg"), four):
        assert same(init(given, SHAPE), core())
        assert same(jax.jit(init, static_argnums=1)(given, SHAPE), core())
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        assert same(init(jax.random.key(7, impl=implementation), SHAPE), core(seed=7))
    assert not same(init(jax.random.key(8), SHAPE), core(seed=7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (0, "got 0"),
        (None, "got None"),
        (np.zeros(2, np.float32), "got float32"),
        (np.zeros(3, np.uint32), r"got uint32 of shape \(3,\)"),
        (np.zeros((5, 2), np.uint32), r"use jax.vmap, got shape \(5, 2\)"),
    ],
)
def test_what_is_no_key_is_refused(wrong, message):
    with pytest.raises((TypeError, ValueError), match=f"^key must be .*{message}"):
        gpuinit.jax.he_normal()(wrong, SHAPE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_and_rounding(dtype):
    expected = core().astype(dtype)
    for init in (
        gpuinit.jax.he_normal(dtype=dtype),
        partial(gpuinit.jax.he_normal(), dtype=jnp.dtype(dtype)),
    ):
        assert same(init(key(), SHAPE), expected)
        assert same(jax.jit(partial(init, shape=SHAPE))(key()), expected)


def test_bfloat16_has_thousands_of_values_and_jax_128():
    shape = (512, 512)
    ours = np.asarray(gpuinit.jax.he_normal(dtype=jnp.bfloat16)(key(), shape))
    theirs = np.asarray(jax.nn.initializers.he_normal(dtype=jnp.bfloat16)(key(), shape))
    assert np.unique(ours.view(np.uint16)).size > 2000
    assert np.unique(theirs.view(np.uint16)).size <= 256
    assert ours.dtype == ml_dtypes.bfloat16


def test_float64_is_handled_as_jax_handles_it():
    with pytest.warns(UserWarning, match="float64 .*truncated to dtype float32"):
        array = gpuinit.jax.he_normal()(key(), SHAPE, np.float64)
    assert same(array, core())
    with jax.enable_x64(True):
        assert same(gpuinit.jax.he_normal()(key(), SHAPE, np.float64), core(dtype="float64"))
        assert same(gpuinit.jax.he_normal()(key(), SHAPE), core(dtype="float64"))


@pytest.mark.parametrize("under", [lambda f: f, jax.jit])
def test_errors_come_at_once(under):
    draw = under(lambda k: gpuinit.jax.he_normal(in_axis=4)(k, SHAPE))
    with pytest.raises(ValueError, match=r"^in_axis must be .*got 4"):
        draw(key())
    with pytest.raises(ValueError, match=r"^dtype must be one of .*int32"):
        under(lambda k: gpuinit.jax.he_normal()(k, SHAPE, np.int32))(key())
    with pytest.raises(ValueError, match=r"^dtype must be one of .*complex64"):
        under(lambda k: gpuinit.jax.normal()(k, SHAPE, np.complex64))(key())
    with pytest.raises(TypeError, match=r"^out_sharding must be .*got 'x'"):
        under(lambda k: gpuinit.jax.he_normal()(k, SHAPE, out_sharding="x"))(key())


def test_vmap_over_keys_is_the_same_as_a_loop():
    init = gpuinit.jax.he_normal()
    keys = jax.random.split(key(), (2, 3))
    draw = jax.vmap(jax.vmap(lambda k: init(k, SHAPE, jnp.bfloat16)))
    for made in (draw(keys), jax.jit(draw)(keys)):
        assert made.shape == (2, 3, *SHAPE)
        for place in np.ndindex(2, 3):
            assert same(made[place], np.asarray(init(keys[place], SHAPE, jnp.bfloat16)))


def test_eval_shape_draws_nothing(monkeypatch):
    monkeypatch.setattr("gpuinit.backends.cpu.fill", None)
    shapes = jax.eval_shape(lambda k: gpuinit.jax.he_normal()(k, (2**20, 2**20), jnp.bfloat16), key())
    assert (shapes.shape, shapes.dtype) == ((2**20, 2**20), jnp.bfloat16)


def test_a_key_from_outside_of_jit_embeds_no_constant():
    for outside in (key(), jax.random.key_data(key())):
        text = str(jax.make_jaxpr(lambda k=outside: gpuinit.jax.he_normal()(k, SHAPE))())
        assert "ffi_call" in text
        assert str(SEED >> 32) not in text


def test_eager_weights_are_on_the_device_of_the_key():
    init = gpuinit.jax.he_normal()
    assert init(key(), SHAPE).committed == (jax.default_backend() == "gpu")  # by DLPack
    committed = jax.device_put(key(), jax.devices()[0])
    assert init(committed, SHAPE).committed


def test_the_cpu_takes_the_memory_over_without_a_copy(monkeypatch):
    given = []
    monkeypatch.setattr(arrays, "put", lambda made, device: given.append(made) or original(made, device))
    for side in (512, 513, 600, 700):
        array = gpuinit.jax.he_normal()(jax.device_put(key(), jax.devices("cpu")[0]), (side, side))
        assert array.unsafe_buffer_pointer() == given[-1].ctypes.data


original = arrays.put


def test_initialize_names_every_leaf_by_its_path():
    shapes = {
        "Dense_0": {
            "kernel": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16),
            "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
        },
        "norm": {"scale": jnp.zeros(3)},
        "table": {"embedding": jax.ShapeDtypeStruct((64, 32), jnp.float32)},
        "list": [{"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}],
        "steps": {"bias": jnp.int32(5)},
        "function": print,
    }
    tree = gpuinit.jax.initialize(shapes, seed=3)
    expected = core((8, 4), seed=3, name="Dense_0/kernel", dtype="bfloat16")
    assert same(tree["Dense_0"]["kernel"], expected)
    assert same(tree["list"][0]["w"], core((8, 4), seed=3, name="list/0/w"))
    assert same(tree["Dense_0"]["bias"], np.zeros(4, np.float32))
    assert same(tree["norm"]["scale"], np.ones(3, np.float32))
    assert 0.017 < np.asarray(tree["table"]["embedding"]).std() < 0.023  # 2048 draws: 9 standard errors
    assert tree["steps"]["bias"] is shapes["steps"]["bias"]
    assert tree["function"] is print


def test_initialize_takes_rules_and_refuses_what_none_covers():
    shapes = {
        "a": {"weight": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        "b": jax.ShapeDtypeStruct((2,), "f4"),
    }
    with pytest.raises(ValueError, match=r"^rules must cover every parameter; .* got none for a/weight$"):
        gpuinit.jax.initialize(shapes)
    rule = ("*/weight", partial(gpuinit.he_normal, in_axis=1, out_axis=0))
    tree = gpuinit.jax.initialize(shapes, 1, [rule, (lambda leaf, name: leaf.ndim == 1, 0.5)])
    assert same(tree["a"]["weight"], core((8, 4), seed=1, name="a/weight", in_axis=1, out_axis=0))
    assert same(tree["b"], np.full(2, 0.5, np.float32))
    tree = gpuinit.jax.initialize(shapes, 1, [rule], strict=False)
    assert tree["b"] is shapes["b"]


def test_initialize_under_jit_makes_the_same_when_the_program_runs():
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec("x"))
    shapes = {
        "kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
        "w": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding),
        "bias": jax.ShapeDtypeStruct((32,), jnp.float32),
    }
    seed = 2**63 + 5
    make = partial(gpuinit.jax.initialize, shapes, seed=seed)
    made, expected = jax.jit(make)(), make()
    assert all(same(made[name], expected[name]) for name in shapes)
    assert same(made["w"], core((64, 32), seed=seed, name="w"))
    assert all(np.size(constant) <= 2 for constant in jax.make_jaxpr(make)().consts)  # no weights
    assert jax.eval_shape(make)["kernel"].shape == (64, 32)


def test_sharded_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match=r"^sharding must be .*got 'x'"):
        gpuinit.jax.sharded(SHAPE, "x", seed=0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(TypeError, match=r"^seed must be an integer .*got None"):
        gpuinit.jax.sharded(SHAPE, sharding, seed=None)
    with pytest.raises(ValueError, match=r"^sharded must be called outside of jit; .*got a call that is"):
        jax.jit(lambda: gpuinit.jax.sharded(SHAPE, sharding, seed=0))()


@pytest.mark.parametrize("devices", [1, 2, 6, 8])
def test_any_mesh_gives_the_same_bits(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc's, so that what is freed does not count as used
    script = Path(__file__).with_name("jax_meshes.py")
    done = subprocess.run(
        [sys.executable, script, str(devices)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "equal"


def test_flax_linen_and_nnx_take_it():
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    from flax import nnx

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, kernel_init=gpuinit.jax.he_normal())(x)

    x = jnp.ones((1, 8))
    for run in (Model().init, jax.jit(Model().init)):
        kernel = run(key(), x)["params"]["Dense_0"]["kernel"]
        assert 0 < np.abs(kernel).max() <= 2 * np.sqrt(2 / 8) / 0.87962566
    shapes = jax.eval_shape(Model().init, key(), x)
    params = gpuinit.jax.initialize(shapes["params"], seed=9)
    assert same(params["Dense_0"]["kernel"], core((8, 4), seed=9, name="Dense_0/kernel"))
    assert Model().apply({"params": params}, x).shape == (1, 4)

    layer = nnx.Linear(8, 4, kernel_init=gpuinit.jax.he_normal(), rngs=nnx.Rngs(0))
    assert layer(x).shape == (1, 4)
    state = nnx.state(nnx.eval_shape(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0))))
    filled = gpuinit.jax.initialize(state, seed=9)
    assert same(filled["kernel"][...], core((8, 4), seed=9, name="kernel"))


def test_the_table_of_flax_takes_its_default_of_ours():
    """Flax names one axis in and out; JAX divides all by the axes that are out, so that fan_in is 32."""
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    init, seeds = gpuinit.jax.variance_scaling(1.0, "fan_in", "normal", out_axis=0), []

    def recording(key, *arguments):
        seeds.append(key)
        return init(key, *arguments)

    embed = linen.Embed(64, 32, embedding_init=recording)
    eager, jitted = (run(key(), jnp.array([3])) for run in (embed.init, jax.jit(embed.init)))
    seed = initializers.seed_of(np.asarray(jax.random.key_data(seeds[0])))
    for tables in (eager, jitted):
        table = tables["params"]["embedding"]
        assert same(table, core((64, 32), gpuinit.normal, seed=seed, stddev=32**-0.5))


def test_haiku_takes_it():
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")
    init = gpuinit.jax.he_normal()

    def forward(x):
        return hk.Linear(4, w_init=lambda shape, dtype: init(hk.next_rng_key(), shape, dtype))(x)

    model = hk.transform(forward)
    x = jnp.ones((1, 8))
    assert model.init(key(), x)["linear"]["w"].shape == (8, 4)
    params = gpuinit.jax.initialize(jax.eval_shape(model.init, key(), x), seed=9)
    assert same(params["linear"]["w"], core((8, 4), seed=9, name="linear/w"))


def test_equinox_takes_it():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    model = eqx.filter_eval_shape(lambda: eqx.nn.MLP(8, 2, 16, 1, key=jax.random.key(0)))
    axes = {"in_axis": 1, "out_axis": 0}
    rules = [("*/weight", partial(gpuinit.he_normal, **axes)), ("*/bias", 0)]
    model = gpuinit.jax.initialize(model, 9, rules)
    assert same(model.layers[0].weight, core((16, 8), seed=9, name="layers/0/weight", **axes))
    assert model(jnp.ones(8)).shape == (2,)


@pytest.mark.parametrize(
    "axes", [{"in_axis": 2, "out_axis": 0}, {"out_axis": -4}, {"in_axis": 3, "out_axis": 1}]
)
def test_an_axis_outside_the_shape_is_no_shared_one(axes):
    with pytest.raises(ValueError, match=r"must be an axis or a sequence of axes in \[-2, 2\), got "):
        gpuinit.jax.he_normal(**axes)(key(), (300, 400))


def test_the_one_axis_of_a_vector_may_be_in_and_out():
    made = gpuinit.jax.variance_scaling(1.0, "fan_in", "normal", in_axis=0)(jax.random.key(4), (512,))
    assert same(made, core((512,), gpuinit.normal, seed=4, stddev=1.0))  # JAX's fan_in is 1
