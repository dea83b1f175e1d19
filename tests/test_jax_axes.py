"""gpuinit.jax.initialize: fans of the modules of Flax, Haiku and Equinox, and axes that cannot be told."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest

import gpuinit

jax = pytest.importorskip("jax", reason='JAX is not installed: pip install "gpuinit[jax]"')
linen = pytest.importorskip("flax.linen", reason="Flax is not installed")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from jax_helpers import core, same  # noqa: E402

import gpuinit.jax  # noqa: E402

HE = jax.nn.initializers.he_normal()


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def stds(tree, *rules):
    """The standard deviations of the report, by name."""
    made, report = gpuinit.jax.initialize(tree, 3, [*rules, *gpuinit.jax.DEFAULT_RULES], return_report=True)
    assert jax.tree.structure(made) == jax.tree.structure(tree)
    return {row.name: row.std for row in report}


def shapes_of(module, *arguments):
    return jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]


# One layer each, and an input of ones: with a kernel of ones every output counts the weights that it sums,
# its fan_in, where it is far from the edges. That holds where Flax's own initialisers take other axes, too.
LAYERS = {
    "Dense": (linen.Dense(5), (2, 7)),
    "DenseGeneral": (linen.DenseGeneral((5, 3)), (2, 7)),
    "DenseGeneral of two axes": (linen.DenseGeneral(5, axis=(-2, -1)), (2, 7, 3)),
    "DenseGeneral of a batch": (linen.DenseGeneral((4, 6), axis=-1, batch_dims=(0,)), (2, 9, 7)),
    "Einsum": (linen.Einsum((5, 6, 7), "abc,cde->abde"), (3, 4, 5)),
    "Einsum of (out, in)": (linen.Einsum((5, 7), "...i,oi->...o"), (2, 7)),
    "Einsum in another order": (linen.Einsum((6, 5, 7), "abc,dce->abed"), (3, 4, 5)),
    "Conv of one axis": (linen.Conv(6, (3,)), (1, 9, 4)),
    "Conv of two axes": (linen.Conv(6, (3, 5)), (1, 9, 9, 4)),
    "Conv of three axes": (linen.Conv(6, (3, 1, 2)), (1, 9, 9, 9, 4)),
    "depthwise Conv": (linen.Conv(8, (3, 3), feature_group_count=4), (1, 9, 9, 4)),
    "ConvLocal": (linen.ConvLocal(6, (3,), padding="VALID"), (1, 9, 4)),
    "ConvTranspose": (linen.ConvTranspose(6, (3, 3)), (1, 9, 9, 4)),
    "ConvTranspose, transposed": (linen.ConvTranspose(6, (3, 3), transpose_kernel=True), (1, 9, 9, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_fans_are_the_numbers_that_an_output_sums(layer):
    module, shape = LAYERS[layer]
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes_of(module, jnp.ones(shape)))
    ones["bias"] *= 0
    fan_in = module.apply({"params": ones}, jnp.ones(shape)).max()
    name = f"{type(module).__name__}_0"
    found = stds({name: ones})
    assert found[f"{name}/kernel"] == pytest.approx(math.sqrt(2 / fan_in), rel=1e-6)
    assert found[f"{name}/bias"] == 0
    if layer != "Einsum of (out, in)":  # two axes, of which no name says more
        assert stds(ones)["kernel"] == found[f"{name}/kernel"]


def stack(module, axis=0, **words):
    return linen.vmap(
        module, in_axes=0, variable_axes={"params": axis}, split_rngs={"params": True}, axis_size=3, **words
    )


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        x = linen.Dense(192, kernel_init=HE)(x)
        x = linen.MultiHeadDotProductAttention(4, kernel_init=HE, normalize_qk=True)(x)
        return linen.Dense(128, kernel_init=HE)(x), None


def scanned(axis):
    return linen.scan(Block, {"params": axis}, split_rngs={"params": True}, length=3)


class Bare(linen.Module):
    """Attention without biases: its names and shapes tell."""

    @linen.compact
    def __call__(self, x, _=None):
        attention = linen.MultiHeadDotProductAttention(4, kernel_init=HE, use_bias=False, qkv_features=64)
        return attention(x), None


class Net(linen.Module):
    """Convolutions without biases, beside norms."""

    @linen.compact
    def __call__(self, x):
        for name in (None, None, "conv_proj", "convs_0", "convolution"):
            conv = linen.Conv(64, (3, 3), use_bias=False, kernel_init=HE, name=name)
            x = linen.BatchNorm(use_running_average=True)(conv(x))
        return linen.Dense(200, kernel_init=HE)(x)


MODELS = {
    "attention": (linen.MultiHeadDotProductAttention(8, kernel_init=HE), (2, 5, 256)),
    "attention without biases": (Bare(), (2, 5, 256)),
    "attention without biases in a stack": (
        linen.scan(Bare, {"params": 0}, split_rngs={"params": True}, length=3)(name="layers"),
        (2, 5, 256),
    ),
    "convolutions": (Net(), (1, 9, 9, 32)),
    "nn.scan": (scanned(0)(name="layers"), (2, 5, 128)),
    "nn.scan on axis 1": (scanned(1)(name="layers"), (2, 5, 128)),
    "nn.scan on axis -1": (scanned(-1)(name="layers"), (2, 5, 128)),
    "nn.vmap of Dense": (stack(linen.Dense)(96, kernel_init=HE), (3, 5, 128)),
    "nn.vmap of Dense on axis 1": (stack(linen.Dense, 1)(96, kernel_init=HE), (3, 5, 128)),
    "nn.vmap of Conv": (stack(linen.Conv)(96, (3,), kernel_init=HE), (3, 2, 9, 64)),
    "nn.vmap of Conv on the last axis": (stack(linen.Conv, -1)(96, (3, 3), kernel_init=HE), (3, 2, 9, 9, 32)),
    "nn.vmap of attention": (
        stack(linen.MultiHeadDotProductAttention)(4, kernel_init=HE),
        (3, 2, 5, 128),
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_spreads_are_those_of_he_normal_in_flax(model):
    """Of 2**13 weights and more theirs has a standard error under 0.8 %, and ours must be within 3 %."""
    module, shape = MODELS[model]
    theirs = module.init(jax.random.key(1), jnp.ones(shape))["params"]
    found = stds(theirs)
    kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            assert leaf.size >= 2**13, name
            assert found[name] == pytest.approx(np.asarray(leaf).std(), rel=0.03), name
            kernels += 1
    assert kernels


class Everything(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            8, 256, kernel_init=HE, use_bias=False, decode=False, rngs=rngs
        )
        self.general = nnx.LinearGeneral((8, 16), (4, 64), axis=(-2, -1), use_bias=False, rngs=rngs)
        self.batch = nnx.LinearGeneral(64, (4, 8), batch_axis={0: 5}, use_bias=False, rngs=rngs)
        self.einsum = nnx.Einsum("nta,hab->nthb", (8, 24, 4), rngs=rngs)
        self.shared = nnx.Einsum("nga,gab->ngb", (3, 24, 4), rngs=rngs)
        self.flipped = nnx.Einsum("...i,oi->...o", (8, 24), rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs),
                nnx.ConvTranspose(3, 8, (3, 3), use_bias=False, rngs=rngs),
                nnx.ConvTranspose(3, 8, (3, 3), use_bias=False, transpose_kernel=True, rngs=rngs),
                nnx.Linear(3, 8, rngs=rngs),
            ]
        )
        self.embed = nnx.Embed(10, 4, rngs=rngs)

        @nnx.split_rngs(splits=6)
        @nnx.vmap
        def stacked(rngs):
            return nnx.Linear(7, 6, use_bias=False, rngs=rngs)

        @nnx.split_rngs(splits=6)
        @nnx.vmap
        def convolutions(rngs):
            return nnx.ConvTranspose(7, 5, (3,), use_bias=False, transpose_kernel=True, rngs=rngs)

        @nnx.split_rngs(splits=6)
        @partial(nnx.vmap, out_axes=1)
        def attentions(rngs):
            return nnx.MultiHeadAttention(4, 32, use_bias=False, decode=False, rngs=rngs)

        self.stacked = stacked(rngs)
        self.convolutions = convolutions(rngs)
        self.attentions = attentions(rngs)


FANS_OF_EVERYTHING = {
    **{f"attention/{part}": 256 for part in ("query", "key", "value", "out")},
    **{f"attentions/{part}": 32 for part in ("query", "key", "value", "out")},
    "general": 128,
    "batch": 64,
    "einsum": 24,
    "shared": 24,
    "flipped": 24,
    "layers/0": 27,
    "layers/1": 27,
    "layers/2": 27,
    "layers/3": 3,
    "stacked": 7,
    "convolutions": 21,
}


def test_modules_of_nnx_tell_their_axes():
    model = nnx.eval_shape(lambda: Everything(nnx.Rngs(0)))
    found = stds(model)
    for module, fan_in in FANS_OF_EVERYTHING.items():
        assert found[f"{module}/kernel"] == pytest.approx(math.sqrt(2 / fan_in)), module
    assert {name for name, std in found.items() if std and name.endswith("kernel")} == {
        f"{module}/kernel" for module in FANS_OF_EVERYTHING
    }
    filled = gpuinit.jax.initialize(model, 3)
    assert isinstance(filled, Everything)
    expected = core((6, 3, 5, 7), seed=3, name="convolutions/kernel", in_axis=3, out_axis=2, batch_axis=0)
    assert same(filled.convolutions.kernel[...], expected)
    glorot = stds(
        model, *((f"{name}/kernel", gpuinit.glorot_normal) for name in ("general", "shared", "layers/2"))
    )
    assert glorot["shared/kernel"] == pytest.approx(math.sqrt(2 / (24 + 4)))
    assert glorot["general/kernel"] == pytest.approx(math.sqrt(2 / (128 + 256)))
    assert glorot["layers/2/kernel"] == pytest.approx(math.sqrt(2 / (9 * (3 + 8))))


def test_the_state_of_nnx_tells_less_than_the_modules():
    model = nnx.eval_shape(lambda: Everything(nnx.Rngs(0)))
    state = nnx.state(model)
    known = ("attention", "embed", "flipped")
    assert stds({module: state[module] for module in known})["attention/query/kernel"] == math.sqrt(2 / 256)
    for module in state.keys() - known:
        with pytest.raises(ValueError, match=f"^rules must name the axes .*got none for {module}/"):
            gpuinit.jax.initialize({module: state[module]}, 3)


class Cells(linen.Module):
    cell: linen.RNNCellBase

    @linen.compact
    def __call__(self, x):
        return linen.RNN(self.cell)(x)


def test_recurrent_kernels_have_the_variance_of_orthogonal_ones():
    units = 96
    for cell in (linen.LSTMCell, linen.OptimizedLSTMCell, linen.GRUCell, linen.MGUCell, linen.SimpleCell):
        shapes = shapes_of(Cells(cell(units)), jnp.ones((1, 3, 50)))
        for row in gpuinit.jax.initialize(shapes, return_report=True)[1]:
            if row.name.endswith("kernel"):
                is_state = row.name.startswith("cell/h")
                assert row.rule == ("lecun_uniform" if is_state else "he_normal"), row
                expected = units**-0.5 if is_state else math.sqrt(2 / 50)
                assert row.std == pytest.approx(expected), row
    theirs = Cells(linen.SimpleCell(units)).init(jax.random.key(0), jnp.ones((1, 3, 50)))["params"]
    assert np.asarray(theirs["cell"]["h"]["kernel"]).std() == pytest.approx(units**-0.5, rel=0.02)
    for cell in (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell):
        model = nnx.eval_shape(lambda cell=cell: cell(50, units, rngs=nnx.Rngs(0)))
        for tree in (model, nnx.state(model)):
            found = {name: std for name, std in stds(tree).items() if name.endswith("kernel")}
            for name, std in found.items():
                is_state = name.removeprefix("dense_").startswith("h")
                assert std == pytest.approx(units**-0.5 if is_state else math.sqrt(2 / 50)), (cell, name)
    cell = linen.ConvLSTMCell(16, (3, 3))
    carry = cell.initialize_carry(jax.random.key(0), (1, 6, 6, 5))
    found = stds(shapes_of(cell, carry, jnp.ones((1, 6, 6, 5))))
    assert found["hh/kernel"] == pytest.approx((9 * 16) ** -0.5)
    assert found["ih/kernel"] == pytest.approx(math.sqrt(2 / 45))


def test_a_layer_with_the_name_of_a_state_is_none_without_its_input():
    tree = {"hi": {"kernel": f32(8, 8)}, "h": {"kernel": f32(8, 8)}, "i": {"kernel": f32(8, 4)}}
    assert set(stds(tree).values()) == {0.5}


def test_haiku_modules():
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")

    def forward(x):
        x = hk.Conv2D(8, (3, 5), with_bias=False)(x)
        x = hk.Conv2DTranspose(6, 3)(x)
        x = hk.DepthwiseConv2D(2, 3)(x)
        x = hk.SeparableDepthwiseConv2D(2, 3)(x)
        x = hk.Conv2D(7, 3, data_format="NCHW")(x)
        x = hk.Conv2DTranspose(5, 3, data_format="NCHW")(x)  # its bias is (5, 1, 1)
        x = hk.Linear(5)(x)
        cell = hk.Conv2DLSTM((5, 9), 4, 3)
        return cell(x[0][None], cell.initial_state(1))

    shapes = jax.eval_shape(hk.transform(forward).init, jax.random.key(0), jnp.ones((1, 9, 9, 4)))
    found = stds(shapes)
    separable = "separable_depthwise_conv2_d/~/depthwise_conv2_d"
    for module, fan_in in {
        "conv2_d": 3 * 5 * 4,
        "conv2_d_transpose": 9 * 8,
        "depthwise_conv2_d": 9,
        separable: 3,
        f"{separable}_1": 3,
        "conv2_d_1": 9 * 9,
        "conv2_d_transpose_1": 9 * 7,
    }.items():
        assert found[f"{module}/w"] == pytest.approx(math.sqrt(2 / fan_in)), module
    assert found["conv2_dlstm/hidden_to_hidden/w"] == pytest.approx((9 * 4) ** -0.5)
    shapes = {"conv2_d_transpose": {"w": f32(3, 3, 6, 8)}}
    with pytest.raises(ValueError, match=r"^rules must name the axes .*got none for conv2_d_transpose/w"):
        gpuinit.jax.initialize(shapes)


UNKNOWN = {
    "a name that says nothing": {"kernel": f32(4, 8, 16)},
    "Einsum of two axes": {"Einsum_0": {"kernel": f32(8, 16)}},
    "DenseGeneral": {"DenseGeneral_0": {"kernel": f32(16, 4, 8)}},
    "a stack of Dense": {"layers": {"Dense_0": {"kernel": f32(3, 16, 8)}}},
    "a part of attention": {"query": {"kernel": f32(16, 4, 8)}, "key": {"kernel": f32(16, 4, 8)}},
    "attention by convolutions": {
        name: {"kernel": f32(1, 16, 4)} for name in ("query", "key", "value", "out")
    },
    "attention in stacks that differ": {
        name: {"kernel": f32(*shape)}
        for name, shape in zip(
            ("query", "key", "value", "out"), [(3, 16, 4, 8)] * 3 + [(2, 4, 8, 16)], strict=True
        )
    },
    "a stack of Conv or one": {"layers": {"Conv_0": {"kernel": f32(3, 3, 8, 16)}}},
    "a stack of Conv of three axes or one": {"a": {"conv": {"kernel": f32(2, 3, 3, 8, 16)}}, "b": f32(1)},
    "beside what a stack has": {
        "layers": {
            "Conv_0": {"kernel": f32(2, 3, 8, 16)},
            "Dense_0": {"kernel": f32(2, 8, 4), "bias": f32(2, 4)},
        }
    },
    "a lifted Conv": {"VmapConv_0": {"kernel": f32(3, 8, 16)}, "Dense_0": {"kernel": f32(8, 16)}},
    "ConvTranspose": {"ConvTranspose_0": {"kernel": f32(3, 8, 16)}},
    "a transposed convolution": {"conv_transpose": {"kernel": f32(3, 3, 8, 16)}, "norm": {"bias": f32(8)}},
    "conv_t": {"conv_t": {"kernel": f32(3, 8, 16)}},
    "deconv": {"deconv": {"kernel": f32(3, 8, 16)}},
    "conv1d of too many axes": {"conv1d": {"kernel": f32(3, 3, 8, 16)}, "Dense_0": {"kernel": f32(8, 16)}},
    "a bias of no output": {"kernel": f32(4, 8, 16), "bias": f32(4)},
    "a bias of other lengths": {"kernel": f32(4, 8, 16), "bias": f32(5)},
    "one bias for all": {"kernel": f32(4, 8, 16), "bias": f32(1)},
    "two axes and the bias of the first": {"kernel": f32(8, 16), "bias": f32(8)},
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_axes_that_cannot_be_told_are_an_error_with_rules_that_work(kind, monkeypatch):
    monkeypatch.setattr("gpuinit.backends.cpu.fill", None)
    tree = UNKNOWN[kind]
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"^rules must name the axes .* got none for ") as raised:
            gpuinit.jax.initialize(tree, strict=strict)
    monkeypatch.undo()
    pasted = re.search(r"(\[\(.*\*gpuinit\.jax\.DEFAULT_RULES\])", str(raised.value))[1]
    rules = eval(pasted, {"gpuinit": gpuinit, "partial": partial})
    report = gpuinit.jax.initialize(tree, 0, rules, strict=False, return_report=True)[1]
    for row in report:
        if row.name.endswith("kernel") and len(row.shape) > 2:
            shapes = {row.name: row.std for row in report}
            square = len(row.shape) > 3 and len(set(row.shape[:-2])) == 1  # read as a convolution's
            fan_in = row.shape[-2] * (math.prod(row.shape[:-2]) if square else 1)
            if row.name in str(raised.value):
                assert shapes[row.name] == pytest.approx(math.sqrt(2 / fan_in)), row
    if "two axes" in kind:
        assert report[-1].std == pytest.approx(math.sqrt(2 / 16))


def test_the_bias_is_believed_before_a_name():
    """As of ConvTranspose(transpose_kernel=True) that is called conv, and of a stack of Conv_0."""
    for kernel, bias, fan_in in (
        ((3, 6, 8), (6,), 24),
        ((3, 5, 6, 8), (6,), 120),
        ((4, 3, 6, 8), (4, 8), 18),
    ):
        tree = {"conv": {"kernel": f32(*kernel), "bias": f32(*bias)}, "Dense_0": {"kernel": f32(8, 4)}}
        assert stds(tree)["conv/kernel"] == pytest.approx(math.sqrt(2 / fan_in))


def test_rules_of_the_caller_name_axes_too():
    tree = {"mlp": {"kernel": f32(4, 8, 16)}, "Conv_0": {"kernel": f32(3, 8, 16)}}
    with pytest.raises(ValueError, match=r"partial\(gpuinit.variance_scaling, scale=0.5, batch_axis=0\)"):
        gpuinit.jax.initialize(tree, 0, [("*", partial(gpuinit.variance_scaling, scale=0.5))])
    rules = [("mlp/*", partial(gpuinit.lecun_normal, batch_axis=0)), ("*", gpuinit.glorot_uniform)]
    found = stds(tree, *rules)
    assert found["mlp/kernel"] == pytest.approx(8**-0.5)
    assert found["Conv_0/kernel"] == pytest.approx(math.sqrt(2 / (3 * 24)))
    assert stds(tree, ("*", partial(gpuinit.normal, stddev=0.5)))["mlp/kernel"] == 0.5
    # Of a bias and no name fan_in is known, and fan_out is not.
    tree = {"kernel": f32(4, 8, 16), "bias": f32(8, 16)}
    assert stds(tree, ("kernel", gpuinit.lecun_normal))["kernel"] == 0.5
    with pytest.raises(ValueError, match=r"gpuinit\.glorot_normal, batch_axis=0"):
        gpuinit.jax.initialize(tree, 0, [("kernel", gpuinit.glorot_normal), ("bias", 0)])


def test_equinox_weights_are_refused_without_axes():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    conv = eqx.filter_eval_shape(lambda: eqx.nn.Conv2d(4, 8, 3, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"^rules must cover every parameter; .*weight"):
        gpuinit.jax.initialize(conv)
    with pytest.raises(ValueError, match=r"^rules must name the axes "):
        gpuinit.jax.initialize(
            eqx.nn.Linear(4, 8, key=jax.random.key(0)), 0, [("weight", gpuinit.he_normal), ("*", 0)]
        )
    axes = {"in_axis": 1, "out_axis": 0}
    rules = [("*weight", partial(gpuinit.he_normal, **axes)), ("*bias", 0)]
    made = gpuinit.jax.initialize(conv, 3, rules)
    assert same(made.weight, core((8, 4, 3, 3), seed=3, name="weight", **axes))


def test_what_is_told_keeps_its_bits():
    """Kernels of two axes and of convolutions, with the axes of gpuinit.he_normal."""
    shapes = shapes_of(Net(), jnp.ones((1, 9, 9, 32)))
    made = gpuinit.jax.initialize(shapes, 7)
    for module in ("Conv_0", "Conv_1", "conv_proj", "convs_0", "convolution", "Dense_0"):
        shape = shapes[module]["kernel"].shape
        assert same(made[module]["kernel"], core(shape, seed=7, name=f"{module}/kernel"))
    layer = shapes_of(linen.Conv(8, (3, 3)), jnp.ones((1, 9, 9, 4)))
    assert same(gpuinit.jax.initialize(layer, 7)["kernel"], core((3, 3, 4, 8), seed=7, name="kernel"))


@pytest.mark.parametrize("name", ["StdConv_0", "ConvBlock_3", "DepthwiseConv_0", "Conv2D_1", "conv_init"])
def test_convolutions_of_other_names_are_known_beside_what_is_not_stacked(name):
    tree = {name: {"kernel": f32(3, 3, 8, 64)}, "Dense_0": {"kernel": f32(8, 64)}}
    report = gpuinit.jax.initialize(tree, return_report=True)[1]
    assert {row.name: row.std for row in report}[f"{name}/kernel"] == pytest.approx(math.sqrt(2 / 72))


def test_a_stack_made_beside_what_is_not_stacked_is_no_convolution():
    """As by nn.scan over a function: its parameters lie in the scope of the caller."""
    tree = {"Conv_0": {"kernel": f32(6, 3, 32, 32)}, "Dense_0": {"kernel": f32(32, 10), "bias": f32(10)}}
    with pytest.raises(ValueError, match="Conv_0"):
        gpuinit.jax.initialize(tree)


def test_the_rules_to_paste_go_before_the_caller_s():
    tree = {"layers": [{"weight": f32(8, 4), "bias": f32(8)}, {"weight": f32(8, 8), "bias": f32(8)}]}
    rules = [("*/weight", gpuinit.he_normal), ("*bias", 0)]
    with pytest.raises(ValueError, match=r", \*rules\]") as raised:
        gpuinit.jax.initialize(tree, 0, rules)
    pasted = re.search(r"(\[\(.*\*rules\])", str(raised.value))[1]
    pasted = eval(pasted, {"gpuinit": gpuinit, "partial": partial, "rules": rules})
    report = gpuinit.jax.initialize(tree, 0, pasted, return_report=True)[1]
    assert {row.name: row.std for row in report}["layers/0/weight"] == pytest.approx(math.sqrt(2 / 4))


def test_cells_of_equinox_are_no_in_and_out():
    tree = {"weight_ih": f32(24, 4), "weight_hh": f32(24, 8), "bias": f32(24)}
    with pytest.raises(ValueError, match="weight_ih"):
        gpuinit.jax.initialize(tree, 0, [("weight*", gpuinit.he_normal), ("bias", 0)])
