"""gpuinit.jax.initialize: the names of leaves, its report, and what must not be filled."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

import gpuinit

jax = pytest.importorskip("jax", reason='JAX is not installed: pip install "gpuinit[jax]"')

import jax.numpy as jnp  # noqa: E402
from jax_helpers import core, same  # noqa: E402

import gpuinit.jax  # noqa: E402


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: object


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A pytree without keys: its children are numbered."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Text:
    """A key that is written like another."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


class Bare:
    pass


K = f32(8, 4)
Pair = namedtuple("Pair", ["kernel"])

COLLISIONS = {
    "a key that holds the separator": {"a/kernel": K, "a": {"kernel": K}},
    "further down": {"x": [{"a/b": {"kernel": K}, "a": {"b": {"kernel": K}}}]},
    "leaves by integer and text": OrderedDict([(0, K), ("0", K)]),
    "layers by integer and text": OrderedDict([(1, {"kernel": K}), ("1", {"kernel": K})]),
    "a list and a text": {"a/0": {"kernel": K}, "a": [{"kernel": K}]},
    "a tuple and a dict": {"a": ({"kernel": K},), "a/0": {"kernel": K}},
    "an attribute and a key": {"a": Layer(K), "a/kernel": K},
    "a named tuple and a key": {"a": Pair(K), "a/kernel": K},
    "a node without keys": {"a": Opaque({"kernel": K}), "a/0": {"kernel": K}},
    "keys of one text": OrderedDict([(Text("a"), {"kernel": K}), ("a", {"kernel": K})]),
    "a number that is real": OrderedDict([(1.5, {"kernel": K}), ("1.5", {"kernel": K})]),
    "no name at all": {"": {"kernel": K}, "/kernel": K},
}
RULES = [("*", gpuinit.he_normal)]


@pytest.mark.parametrize("kind", COLLISIONS)
def test_two_leaves_of_one_name_are_an_error(kind, monkeypatch):
    monkeypatch.setattr("gpuinit.backends.cpu.fill", None)
    for strict in (True, False):
        with pytest.raises(
            ValueError, match=r"^tree must give every leaf a name .*got '.*' for both "
        ) as error:
            gpuinit.jax.initialize(COLLISIONS[kind], 0, RULES, strict=strict)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(COLLISIONS[kind])]
    assert sum(path in str(error.value) for path in paths) == 2
    assert len(set(paths)) == 2


def test_the_names_of_the_issue_are_shown():
    message = r"got 'a/kernel' for both \['a'\]\['kernel'\] and \['a/kernel'\]$"
    with pytest.raises(ValueError, match=message):
        gpuinit.jax.initialize({"a/kernel": K, "a": {"kernel": K}})


def test_a_box_of_flax_is_no_part_of_a_name_and_may_collide():
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    boxed = {"a": {"kernel": linen.Partitioned(K, names=("x", "y"))}}
    made = gpuinit.jax.initialize(boxed, 3)
    assert same(made["a"]["kernel"].value, core((8, 4), seed=3, name="a/kernel"))
    with pytest.raises(ValueError, match=r"got 'a/kernel' for both \['a'\]\['kernel'\] and \['a/kernel'\]"):
        gpuinit.jax.initialize(boxed | {"a/kernel": K})


def test_constants_of_one_name_are_equal_anyway():
    tree = {"a/bias": f32(4), "a": {"bias": f32(4), "kernel": K}}
    made = gpuinit.jax.initialize(tree, 3)
    assert same(made["a"]["kernel"], core((8, 4), seed=3, name="a/kernel"))


def test_leaves_left_alone_may_have_one_name():
    tree = {"a/steps": jnp.int32(1), "a": {"steps": jnp.int32(2)}, "b/x": K, "b": {"x": K}}
    made = gpuinit.jax.initialize(tree, strict=False)
    assert made["b"]["x"] is K


def test_names_that_are_their_own_keep_their_weights():
    tree = {"a/kernel": K, "b": {1: {"kernel": K}}, "c": [Layer(K), Opaque(Pair(K))], "d": {"e/f": {"w": K}}}
    made = gpuinit.jax.initialize(tree, 3)
    names = ("a/kernel", "b/1/kernel", "c/0/kernel", "c/1/0/kernel", "d/e/f/w")
    for leaf, name in zip(jax.tree.leaves(made), names, strict=True):
        assert same(leaf, core((8, 4), seed=3, name=name))


def test_a_key_whose_text_is_its_address_is_refused():
    for key in (Bare(), lambda: None):
        with pytest.raises(ValueError, match=r"^tree must have keys that are written alike .*got '<.* at 0x"):
            gpuinit.jax.initialize(OrderedDict([(key, {"kernel": K})]))


# The report


def test_the_report_has_a_row_for_every_array():
    tree = {
        "Conv_0": {"kernel": f32(3, 8, 16), "bias": f32(16)},
        "attention": {"kernel": jax.ShapeDtypeStruct((64, 4, 8), jnp.bfloat16), "bias": f32(4, 8)},
        "table": {"embedding": f32(32, 8)},
        "norm": {"scale": jnp.zeros(3)},
        "other": {"x": np.zeros(3, np.float32), "steps": jnp.int32(3)},
        "key": jax.random.key(0),
        "name": print,
    }
    made, report = gpuinit.jax.initialize(tree, 3, strict=False, return_report=True)
    rows = {row.name: row for row in report}
    assert [row.name for row in report] == [
        *("Conv_0/bias", "Conv_0/kernel", "attention/bias", "attention/kernel", "key", "norm/scale"),
        *("other/steps", "other/x", "table/embedding"),
    ]
    assert rows["Conv_0/kernel"] == (
        *("Conv_0/kernel", (3, 8, 16), "float32", "he_normal", (2 / 24) ** 0.5, "whole"),
    )
    assert rows["attention/kernel"].dtype == "bfloat16"
    assert rows["attention/kernel"].std == pytest.approx((2 / 64) ** 0.5)
    assert rows["attention/kernel"].rule.startswith("he_normal(in_axis=(0,), ")
    assert rows["attention/bias"][2:] == ("float32", "0", 0.0, "whole")
    assert rows["table/embedding"].rule == "truncated_normal(stddev=0.02274)"
    assert rows["table/embedding"].std == pytest.approx(0.02)
    for name, dtype in {"key": "key<fry>", "other/steps": "int32", "other/x": "float32"}.items():
        assert rows[name][2:] == (dtype, "-", None, "not written")
    plain = gpuinit.jax.initialize(tree, 3, strict=False)
    assert jax.tree.structure(plain) == jax.tree.structure(made)
    assert same(made["attention"]["kernel"], np.asarray(plain["attention"]["kernel"]))
    table = str(report).splitlines()
    assert table[0].split() == ["name", "shape", "dtype", "rule", "std", "written"]
    assert max(map(len, table)) <= 80


def test_spreads_in_the_report_are_those_of_the_weights():
    tree = {
        "w": f32(128, 96),
        "u": f32(4096),
        "Conv_0": {"kernel": f32(3, 3, 64, 32), "bias": f32(32)},
    }
    rules = [("u", partial(gpuinit.uniform, low=1, high=3)), *gpuinit.jax.DEFAULT_RULES]
    made, report = gpuinit.jax.initialize(tree, 3, rules, return_report=True)
    for row, leaf in zip(report, jax.tree.leaves(made), strict=True):
        assert row.std == pytest.approx(np.asarray(leaf).std(), rel=0.04)  # 4096 draws: 4 standard errors


def test_a_report_under_jit_is_made_while_tracing():
    reports = []

    def make():
        made, report = gpuinit.jax.initialize({"kernel": K}, 3, return_report=True)
        reports.append(report)
        return made

    made = jax.jit(make)()
    assert same(made["kernel"], core((8, 4), seed=3, name="kernel"))
    assert [row[:5] for row in reports[0]] == [("kernel", (8, 4), "float32", "he_normal", 0.5)]


def test_a_function_that_is_not_of_gpuinit_has_no_spread():
    def fill(shape, *, out, **_):
        out[...] = 2

    made, report = gpuinit.jax.initialize({"w": f32(3, 3, 3)}, 0, [("w", fill)], return_report=True)
    assert (report[0].rule, report[0].std) == ("fill", None)
    assert same(made["w"], np.full((3, 3, 3), 2, np.float32))


def test_everything_is_checked_before_anything_is_made(monkeypatch):
    monkeypatch.setattr("gpuinit.backends.cpu.fill", None)
    tree = {"a": {"kernel": K}, "b": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float16)}}
    with pytest.raises(ValueError, match=r"^stddev must leave .*finite in float16") as error:
        gpuinit.jax.initialize(tree, 0, [("*", partial(gpuinit.normal, stddev=1e5))])
    assert error.value.__notes__ == ["This is leaf b/kernel."]
    with pytest.raises(TypeError, match=r"^rules must be .*got \('\*', 'zeros'\)$"):
        gpuinit.jax.initialize(tree, 0, [("*", "zeros")])


# What must not be filled


def test_own_names_are_whole():
    for name in ("gate_kernel", "log_scale", "sigma_bias", "recurrent_kernel", "lora_b", "wi_0", "kernels"):
        with pytest.raises(ValueError, match=rf"^rules must cover every parameter; .*got none for a/{name}$"):
            gpuinit.jax.initialize({"a": {name: K}})


def test_states_of_optax_are_not_parameters():
    optax = pytest.importorskip("optax", reason="optax is not installed")
    params = gpuinit.jax.initialize({"a": {"kernel": K, "bias": f32(4)}})
    for optimiser in (
        optax.adam(1e-3),
        optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)),
        optax.multi_transform({"x": optax.adam(1e-3)}, lambda tree: jax.tree.map(lambda _: "x", tree)),
    ):
        tree = {"params": params, "state": optimiser.init(params)}
        with pytest.raises(ValueError, match=r"^rules must cover every parameter; .*state/"):
            gpuinit.jax.initialize(tree)
        for rules in (None, [("*", gpuinit.he_normal)]):
            made = gpuinit.jax.initialize(tree, 3, rules, strict=False)
            assert same(made["params"]["a"]["kernel"], core((8, 4), seed=3, name="params/a/kernel"))
            for leaf, old in zip(*map(jax.tree.leaves, (made["state"], tree["state"])), strict=True):
                assert leaf is old


def test_states_of_the_optimiser_of_nnx_are_not_parameters():
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    optimiser = nnx.Optimizer(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param)
    for tree in (optimiser, nnx.state(optimiser)):
        with pytest.raises(ValueError, match=r"^rules must cover every parameter; .*opt_state/0/mu/kernel"):
            gpuinit.jax.initialize(tree)


def test_modules_that_are_no_pytrees_are_refused():
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    from flax import nnx

    class Model(nnx.Module, pytree=False):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((8, 4)))

    for tree, name in ((linen.Dense(3), "Dense"), ({"a": Model()}, "Model")):
        with pytest.raises(TypeError, match=rf"^tree must be of shapes or arrays; .*got a {name}$"):
            gpuinit.jax.initialize(tree)
    made = gpuinit.jax.initialize(nnx.state(Model()), 3)
    assert same(made["kernel"][...], core((8, 4), seed=3, name="kernel"))


def test_weights_that_modules_share_stay_shared():
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Model(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
            self.b = self.a

    model = Model()
    with pytest.raises(
        ValueError, match=r"^tree must have no weight twice.*got \.a\.bias again as \.b\.bias$"
    ):
        gpuinit.jax.initialize(model)
    nnx.update(model, gpuinit.jax.initialize(nnx.state(model), 3))
    assert model.a is model.b
    assert same(model.b.kernel[...], core((8, 4), seed=3, name="a/kernel"))
