"""The default rules of gpuinit.torch.initialize_ beyond plain layers, and buffers that follow the weights."""

from __future__ import annotations

import math
import sys
import types
import warnings
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch.nn.utils.parametrize import register_parametrization  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.distributions import TRUNCATED_STD  # noqa: E402

SEED = 3
HOOKS = "layer"  # the name under which `hooked` puts a layer into a model


def hooked(layer):
    """A model with the layer, so that names have a prefix."""
    return nn.ModuleDict({HOOKS: layer})


def initialized(layer, **words):
    """The layer, and the standard deviations of the report under the layer's own names."""
    report = gt.initialize_(hooked(layer), SEED, **words)
    return layer, {row.name.removeprefix(f"{HOOKS}."): row.std for row in report}


def expected(fill, shape, name):
    return tobytes(fill(torch.empty(shape), seed=SEED, name=f"{HOOKS}.{name}"))


def uncovered(layer):
    """The names that no rule covers, under the layer's own names."""
    report = gt.initialize_(hooked(layer), SEED, strict=False)
    return {row.name.removeprefix(f"{HOOKS}.") for row in report if row.rule == "-"}


def old(normalize, *arguments, **words):
    """A layer normalised by a hook, whose function may be deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return normalize(*arguments, **words)


he_transposed_ = partial(gt.variance_scaling_, in_axis=0, out_axis=1)


# Layers


class Conv1D(nn.Module):
    """As transformers.pytorch_utils has it: (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.ones(nf))


def test_a_conv1d_of_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.SimpleNamespace(Conv1D=Conv1D))
    layer, stds = initialized(Conv1D(7, 50))
    assert stds == {"weight": pytest.approx(math.sqrt(2 / 50)), "bias": 0}
    assert tobytes(layer.weight) == expected(partial(gt.he_normal_, in_axis=0, out_axis=1), (50, 7), "weight")
    assert not layer.bias.any()


@pytest.mark.parametrize("module", [None, types.SimpleNamespace()])
def test_a_conv1d_of_others(monkeypatch, module):
    if module is None:
        monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    else:  # an import under way
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    assert uncovered(Conv1D(7, 50)) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("make", "hidden", "count"),
    [
        (lambda: nn.LSTM(3, 8), 8, 4),
        (lambda: nn.LSTM(3, 8, 2, bidirectional=True, proj_size=4), 8, 20),
        (lambda: nn.GRU(3, 5, 2, bias=False), 5, 4),
        (lambda: nn.RNN(3, 6, bidirectional=True), 6, 8),
        (lambda: nn.LSTMCell(3, 7), 7, 4),
        (lambda: nn.GRUCell(3, 7), 7, 4),
        (lambda: nn.RNNCell(3, 7, bias=False), 7, 2),
        (lambda: nn.GRUCell(3, 0), 0, 4),
    ],
)
def test_recurrent_layers_are_uniform_as_torch_makes_them(make, hidden, count):
    layer, stds = initialized(make())
    limit = 1 / math.sqrt(hidden) if hidden else 0.0
    assert stds == dict.fromkeys(dict(layer.named_parameters()), pytest.approx(limit / math.sqrt(3)))
    made = {name: tobytes(parameter) for name, parameter in layer.named_parameters()}
    assert len(made) == count
    assert made == {
        name: expected(partial(gt.uniform_, limit=limit), parameter.shape, name)
        for name, parameter in layer.named_parameters()
    }
    assert not hidden or len(set(made.values())) == count
    for parameter in layer.parameters():
        assert not hidden or -limit <= parameter.min() < 0 < parameter.max() <= limit


def test_a_parameter_that_a_derived_class_adds_to_a_recurrent_one_is_not_known():
    layer = nn.GRUCell(3, 4)
    layer.gain = nn.Parameter(torch.ones(4))
    assert uncovered(layer) == {"gain"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(3, 3), ("weight", "bias")),
        (lambda: nn.Conv2d(3, 3, 3), ("weight", "bias")),
        (lambda: nn.ConvTranspose1d(3, 3, 3), ("weight", "bias")),
        (lambda: nn.Bilinear(3, 3, 3), ("weight", "bias")),
        (lambda: nn.MultiheadAttention(4, 2), ("proj_weight", "proj_bias", "weight", "bias")),
        (lambda: nn.GRU(3, 4), ("weight", "bias", "weight_ih", "weight_ih_l")),
        (lambda: nn.LSTMCell(3, 4), ("weight", "bias", "weight_ih")),
        (lambda: nn.PReLU(), ("weight",)),
        (lambda: nn.LayerNorm(3), ("weight", "bias")),
        (lambda: nn.BatchNorm1d(3), ("weight", "bias")),
        (lambda: nn.Embedding(3, 3), ("weight",)),
        (lambda: Conv1D(3, 3), ("weight", "bias")),
    ],
)
@pytest.mark.parametrize("form", ["sigma_{}", "gate_{}", "log_{}", "{}_mask", "x{}"])
@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_a_parameter_that_only_sounds_like_one_of_the_layer_s_is_not_known(
    monkeypatch, make, words, form, shape
):
    """As the sigma_weight of a noisy layer, whose first value is none of the layer's."""
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.SimpleNamespace(Conv1D=Conv1D))
    layer = make()
    known = set(dict(layer.named_parameters()))
    added = {form.format(word) for word in words}
    for name in added:
        layer.register_parameter(name, nn.Parameter(torch.ones(shape)))
    assert uncovered(layer) == added
    assert known


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
        lambda: nn.RNN(3, 4),
        lambda: nn.LSTMCell(3, 4),
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True),
        lambda: nn.MultiheadAttention(4, 2),
    ],
)
def test_all_of_a_layer_s_own_are_known(make):
    assert uncovered(make()) == set()


def test_bilinear():
    layer, stds = initialized(nn.Bilinear(6, 10, 8))
    assert stds == {"weight": pytest.approx(math.sqrt(2 / 60)), "bias": 0}
    fill = partial(gt.he_normal_, in_axis=(1, 2), out_axis=0)
    assert tobytes(layer.weight) == expected(fill, (8, 6, 10), "weight")
    assert not layer.bias.any()
    # Outputs on inputs of variance 1 have variance 2, as those of a linear layer. Their mean square over
    # 4000 x 8 is that of weights with 480 independent terms: its relative deviation is about
    # sqrt(2 / 480) = 0.065, so 0.3 is 4.6 of them, a chance of 4e-6. With fan_in = 6 it would be 20.
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4000, 6, generator=generator)
    second = torch.randn(4000, 10, generator=generator)
    assert 1.4 < layer(first, second).square().mean() < 2.6


def test_prelu_starts_at_its_own_slope():
    layer, _ = initialized(nn.PReLU(3, init=0.1))
    assert tobytes(layer.weight) == tobytes(torch.full((3,), 0.1))


# Weight norm

NORMALISED = [
    (lambda: nn.Linear(12, 5), gt.he_normal_, 2 / 12),
    (lambda: nn.Conv1d(6, 4, 5), gt.he_normal_, 2 / 30),
    (lambda: nn.Conv2d(8, 16, 3, groups=4), gt.he_normal_, 2 / 18),
    (lambda: nn.ConvTranspose2d(8, 6, 3), partial(he_transposed_, scale=2.0), 2 / 72),
    (lambda: nn.ConvTranspose1d(8, 16, 3, groups=4), partial(he_transposed_, scale=8.0), 2 / 6),
    (lambda: nn.Bilinear(3, 4, 5), partial(gt.he_normal_, in_axis=(1, 2), out_axis=0), 2 / 12),
]


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(("make", "fill", "variance"), NORMALISED)
@pytest.mark.parametrize(
    ("normalize", "magnitude", "direction"),
    [
        (nn.utils.weight_norm, "weight_g", "weight_v"),
        (
            parametrizations.weight_norm,
            "parametrizations.weight.original0",
            "parametrizations.weight.original1",
        ),
    ],
)
def test_a_weight_norm_has_the_variance_of_the_bare_layer(
    normalize, magnitude, direction, make, fill, variance, dim
):
    layer = old(normalize, make(), dim=dim)
    shape = layer.weight.shape
    _, stds = initialized(layer)
    assert stds[direction] == pytest.approx(math.sqrt(variance))
    assert tobytes(layer.get_parameter(direction)) == expected(fill, shape, direction)
    size = layer.get_parameter(magnitude).numel()
    assert size == (1 if dim is None else shape[dim])
    constant = math.sqrt(variance) * math.sqrt(shape.numel() / size)
    assert layer.get_parameter(magnitude).reshape(-1).tolist() == pytest.approx([constant] * size)
    for hook in layer._forward_pre_hooks.values():  # what an old one does before every forward
        hook(layer, None)
    # Every g is the norm of its elements, whatever was drawn: the mean square of the weights is the variance
    # but for rounding, with no chance of a false alarm.
    assert layer.weight.square().mean().item() == pytest.approx(variance, rel=1e-5)
    assert layer.weight.min() < 0 < layer.weight.max()
    assert not layer.bias.any()


def test_weight_norm_of_a_recurrent_weight():
    layer = old(nn.utils.weight_norm, nn.LSTM(3, 16), "weight_hh_l0")
    initialized(layer)
    fill = partial(gt.uniform_, limit=0.25)
    assert tobytes(layer.weight_hh_l0_v) == expected(fill, (64, 16), "weight_hh_l0_v")
    assert tobytes(layer.weight_ih_l0) == expected(fill, (64, 3), "weight_ih_l0")
    for hook in layer._forward_pre_hooks.values():
        hook(layer, None)
    assert layer.weight_hh_l0.square().mean().item() == pytest.approx(1 / 16 / 3, rel=1e-5)


def test_a_magnitude_is_the_same_for_every_seed():
    found = []
    for seed in (0, 1):
        layer = parametrizations.weight_norm(nn.Linear(12, 5))
        gt.initialize_(layer, seed)
        found.append([tobytes(parameter) for parameter in layer.parametrizations.weight.parameters()])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_magnitude_in_bfloat16_is_rounded():
    full, half = (
        parametrizations.weight_norm(nn.Linear(12, 5)).to(dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for layer in (full, half):
        gt.initialize_(layer, SEED)
    for one, other in zip(full.parameters(), half.parameters(), strict=True):
        assert tobytes(one.bfloat16()) == tobytes(other)


# Spectral norm and orthogonal weights


def spectral(make, normalize, torch_seed, **words):
    """A layer initialised from a fixed seed, after torch made it from another."""
    torch.manual_seed(torch_seed)
    layer, _ = initialized(old(normalize, make()), **words)
    layer.eval()  # as training goes on with the iteration
    for hook in layer._forward_pre_hooks.values():
        hook(layer, None)
    return layer


SPECTRAL = [nn.utils.spectral_norm, parametrizations.spectral_norm]
ORTHOGONAL = [
    partial(parametrizations.orthogonal, orthogonal_map=name)
    for name in ("matrix_exp", "cayley", "householder")
]


def state(layer):
    return {name: tobytes(tensor) for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize(("make", "fill", "variance"), NORMALISED)
@pytest.mark.parametrize("normalize", SPECTRAL)
def test_spectral_norm(normalize, make, fill, variance):
    layer = spectral(make, normalize, 0)
    (direction,) = {"weight_orig", "parametrizations.weight.original"} & layer.state_dict().keys()
    original = layer.get_parameter(direction)
    assert tobytes(original) == expected(fill, original.shape, direction)
    assert original.square().mean().item() == pytest.approx(variance, rel=0.5)
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    # An estimate is from below: the greatest singular value is 1 or just above. The seeds are fixed, so there
    # is no false alarm; without the iteration it is 3 and more.
    assert 0.9999 < torch.linalg.matrix_norm(layer.weight.movedim(dim, 0).flatten(1), 2) < 1.1


@pytest.mark.parametrize("rules", [None, [("*", gt.he_normal_)]])
@pytest.mark.parametrize("normalize", [*SPECTRAL, *ORTHOGONAL[:2]])
def test_torchs_seed_does_not_reach_the_weight(normalize, rules):
    one, other = (spectral(lambda: nn.Linear(9, 7), normalize, number, rules=rules) for number in (0, 1))
    assert tobytes(one.weight) == tobytes(other.weight)
    assert state(one) == state(other)
    torch.manual_seed(0)
    layer = old(normalize, nn.Linear(9, 7))
    gt.initialize_(layer, SEED + 1, rules=rules)
    assert tobytes(layer.weight) != tobytes(one.weight)


def test_the_singular_vectors_are_those_of_torchs_own_iteration():
    layer, _ = initialized(parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)))
    (made,) = layer.parametrizations.weight
    found = tobytes(made._u), tobytes(made._v)
    with torch.no_grad():
        name = f"{HOOKS}.parametrizations.weight.0._v"
        gt.normal_(made._v, 1.0, seed=SEED, name=name)
        made._power_method(layer.parametrizations.weight.original.flatten(1), 15)
    assert found == (tobytes(made._u), tobytes(made._v))


def test_the_spectral_norm_of_a_vector_needs_no_estimate():
    layer, _ = initialized(
        parametrizations.spectral_norm(nn.Linear(3, 3), "bias"), rules=[("*", gt.he_normal_)]
    )
    assert layer.bias.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("normalize", [*SPECTRAL, *ORTHOGONAL])
def test_buffers_of_what_is_left_alone_are_left_alone(normalize):
    layer = old(normalize, nn.Linear(9, 7))
    before = state(layer)
    assert "bias" in before
    initialized(layer, rules=[("*.bias", nn.init.ones_)], strict=False)
    after = state(layer)
    assert {name for name in after if after[name] != before[name]} == {"bias"}


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8)])
@pytest.mark.parametrize("normalize", ORTHOGONAL)
def test_an_orthogonal_weight(normalize, shape):
    layer = spectral(lambda: nn.Linear(*shape), normalize, 0)
    weight = layer.weight if shape[0] >= shape[1] else layer.weight.T
    assert torch.allclose(weight @ weight.T, torch.eye(min(shape)), atol=1e-5)
    assert tobytes(layer.parametrizations.weight.original) == tobytes(0 - torch.eye(*reversed(shape)))


def test_orthogonal_weights_are_not_those_of_a_bare_decomposition():
    # LAPACK's has a first element that is never above 0. One of 32 is, but for a chance of 2**-32.
    model = nn.ModuleList(parametrizations.orthogonal(nn.Linear(4, 4)) for _ in range(32))
    gt.initialize_(model, SEED)
    firsts = [layer.weight[0, 0] for layer in model]
    assert min(firsts) < 0 < max(firsts)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def chain(layer):
    parametrizations.spectral_norm(layer)
    return register_parametrization(layer, "weight", Twice())


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: chain(nn.Linear(3, 3)), {"parametrizations.weight.original"}),
        (
            lambda: register_parametrization(nn.Linear(3, 3), "weight", Twice()),
            {"parametrizations.weight.original"},
        ),
        (
            lambda: parametrizations.orthogonal(nn.Linear(3, 3), use_trivialization=False),
            {"parametrizations.weight.original"},
        ),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(3, 3), "bias"),
            {"parametrizations.bias.original"},
        ),
        (lambda: old(nn.utils.weight_norm, nn.Embedding(3, 3)), {"weight_g", "weight_v"}),
        (
            lambda: nn.ParameterDict({"weight_g": torch.ones(3), "weight": torch.ones(3, 3)}),
            {"weight_g", "weight"},
        ),
    ],
)
def test_what_is_made_in_ways_that_are_not_known_is_not_covered(layer, names):
    assert uncovered(layer()) == names


# Norms


class ShiftedRMSNorm(nn.Module):
    """Gemma's: it scales by 1 + weight."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 77.0))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class ResettableNorm(ShiftedRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.shift = nn.Parameter(torch.full((size,), 77.0))

    def forward(self, x):
        return super().forward(x) + self.shift - 2

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.shift, 2)


class HeirNorm(ResettableNorm):
    """Neither forward nor recipe of its own."""


class OtherForwardNorm(ResettableNorm):
    """Its recipe is older than its forward."""

    def forward(self, x):
        return x * self.weight + self.shift


class ShiftedLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


class ResettableScale(ShiftedLayerNorm):
    """A norm by what it is, not by its name."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class OtherRecipe(nn.LayerNorm):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.5)
        nn.init.zeros_(self.bias)


class HalfBatchNorm(nn.BatchNorm1d):
    """Neither forward nor recipe of its own."""


class NormedLinear(nn.Module):
    """No norm, for all its name: its parameter is a matrix."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, size))

    def reset_parameters(self):
        nn.init.zeros_(self.weight)


class PreNorm(nn.Module):
    """No norm, for all its name: its recipe writes a layer below it."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.layer = nn.Linear(size, size)

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.layer.weight)


class ExtraLayerNorm(nn.LayerNorm):
    """torch's recipe does not know its gain."""

    def __init__(self, size):
        super().__init__(size)
        self.gain = nn.Parameter(torch.ones(size))


class Gain(ShiftedRMSNorm):
    def forward(self, x):
        return x * self.weight

    def reset_parameters(self):
        nn.init.zeros_(self.weight)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (ResettableNorm, {"weight": 0, "shift": 2}),
        (HeirNorm, {"weight": 0, "shift": 2}),
        (ResettableScale, {"weight": 0, "bias": 0}),
        (OtherRecipe, {"weight": 0.5, "bias": 0}),
        (HalfBatchNorm, {"weight": 1, "bias": 0}),
    ],
)
def test_a_norm_has_its_own_first_value(make, values):
    layer = make(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(77)
    initialized(layer)
    assert {name: tobytes(parameter) for name, parameter in layer.named_parameters()} == {
        name: tobytes(torch.full((4,), float(value))) for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (ShiftedRMSNorm, {"weight"}),
        (OtherForwardNorm, {"weight", "shift"}),
        (ShiftedLayerNorm, {"weight", "bias"}),
        (NormedLinear, {"weight"}),
        (PreNorm, {"scale"}),
        (ExtraLayerNorm, {"gain"}),
        (Gain, {"weight"}),  # no name of a norm
    ],
)
def test_a_norm_that_does_not_say_its_first_value_is_not_covered(make, names):
    with pytest.raises(ValueError, match=r"rules must cover every parameter.*got none for "):
        gt.initialize_(make(4))
    assert uncovered(make(4)) == names


@pytest.mark.parametrize("first", ["weight", "shift"])
def test_a_norm_that_is_reset_keeps_what_other_rules_fill(first):
    layer = ResettableNorm(4)
    rules = [(f"*.{first}", nn.init.ones_), *gt.DEFAULT_RULES]
    initialized(layer, rules=rules)
    wanted = {"weight": 0.0, "shift": 2.0} | {first: 1.0}
    assert {name: parameter.tolist() for name, parameter in layer.named_parameters()} == {
        name: [value] * 4 for name, value in wanted.items()
    }


def test_a_subclass_of_a_linear_layer_is_one():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    layer, _ = initialized(Router(6, 3))
    assert tobytes(layer.weight) == expected(gt.he_normal_, (3, 6), "weight")
    assert layer.weight.abs().max() <= 2 * math.sqrt(2 / 6) / TRUNCATED_STD


@pytest.mark.parametrize("make", [lambda: nn.GRUCell(3, 4), lambda: nn.LSTM(3, 4)])
def test_pruned_recurrent_weights(make):
    layer = make()
    name = next(name for name, _ in layer.named_parameters() if name.startswith("weight_hh"))
    shape = tuple(getattr(layer, name).shape)
    prune.identity(layer, name)
    initialized(layer)
    fill = partial(gt.uniform_, limit=0.5)
    assert tobytes(getattr(layer, f"{name}_orig")) == expected(fill, shape, f"{name}_orig")


def test_norms_in_what_is_called_like_an_adapter():
    layer = nn.ModuleDict({"lora_mlp": nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3))})
    for parameter in layer.parameters():
        parameter.data.fill_(7)
    initialized(layer)
    assert [parameter.unique().tolist() for parameter in layer.parameters()] == [[1], [0]] * 2
