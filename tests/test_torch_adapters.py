"""Adapters of PEFT and torchtune under gpuinit.torch.initialize_, by stand-ins with their structure."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.torch import init  # noqa: E402


class BaseTunerLayer:
    __module__ = "peft.tuners.tuners_utils"

    def get_base_layer(self):
        layer = self.base_layer
        while isinstance(layer, BaseTunerLayer):
            layer = layer.base_layer
        return layer


class Dora(nn.Module):
    __module__ = "peft.tuners.lora.dora"

    def __init__(self, weight, fan_in_fan_out):
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self.weight = weight


class LoraLayer(nn.Module, BaseTunerLayer):
    """A layer with factors A and B for every adapter, and with DoRA's magnitudes."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base_layer, adapters=("default",), *, bias=False, dora=False):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        out = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        for name in adapters:
            shape = (len(out.weight),)
            if isinstance(out, nn.Embedding):
                self.lora_embedding_A[name] = nn.Parameter(torch.ones(2, out.num_embeddings))
                self.lora_embedding_B[name] = nn.Parameter(torch.ones(out.embedding_dim, 2))
                shape = (out.embedding_dim,)
            elif isinstance(out, nn.Conv2d):
                self.lora_A[name] = nn.Conv2d(out.in_channels, 2, out.kernel_size, bias=False)
                self.lora_B[name] = nn.Conv2d(2, out.out_channels, 1, bias=bias)
                shape = (1, out.out_channels, 1, 1)
            else:
                self.lora_A[name] = nn.Linear(out.in_features, 2, bias=False)
                self.lora_B[name] = nn.Linear(2, out.out_features, bias=bias)
            if dora:
                weight = nn.Parameter(torch.full(shape, 77.0))
                self.lora_magnitude_vector[name] = Dora(weight, isinstance(out, nn.Embedding))
        base_layer.requires_grad_(False)

    def reset_lora_parameters(self, name, init_lora_weights):
        """As PEFT's."""
        if name in self.lora_A:
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(self.lora_A[name].weight, a=math.sqrt(5))
            elif init_lora_weights == "gaussian":
                nn.init.normal_(self.lora_A[name].weight, std=1 / 2)
            if init_lora_weights:
                for parameter in self.lora_B[name].parameters():
                    nn.init.zeros_(parameter)
        if name in self.lora_embedding_A:
            nn.init.zeros_(self.lora_embedding_A[name])
            nn.init.normal_(self.lora_embedding_B[name])


class AdaLoraLayer(LoraLayer):
    __module__ = "peft.tuners.adalora.layer"


class IA3Layer(nn.Module, BaseTunerLayer):
    """One of PEFT's tuners that have plain layers."""

    __module__ = "peft.tuners.ia3.layer"

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.ia3_l = nn.ModuleDict({"default": nn.Linear(3, 3)})


class AuxiliaryTrainingWrapper(nn.Module):
    __module__ = "peft.utils.other"


class BaseTuner(nn.Module):
    __module__ = "peft.tuners.tuners_utils"

    def __init__(self, model, init_lora_weights=True):
        super().__init__()
        self.model = model
        self.peft_config = {"default": SimpleNamespace(init_lora_weights=init_lora_weights)}


class PeftModel(nn.Module):
    __module__ = "peft.peft_model"

    def __init__(self, tuner):
        super().__init__()
        self.base_model = tuner


def model(make=LoraLayer, init_lora_weights=True, **words):
    layers = {"table": nn.Embedding(7, 4), "linear": nn.Linear(4, 6), "conv": nn.Conv2d(4, 6, 3)}
    layers = {name: make(layer, **words) for name, layer in layers.items()}
    return PeftModel(BaseTuner(nn.ModuleDict(layers | {"head": nn.Linear(6, 2)}), init_lora_weights))


def values(module):
    return {name: tobytes(tensor) for name, tensor in module.named_parameters()}


def row_names(report):
    return [row.name for row in report]


def kaiming(shape, name):
    return init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), seed=3, name=name)


@pytest.mark.parametrize("recipe", [None, "own"])
def test_factors_are_those_of_peft(recipe):
    made = model(bias=True)
    layers = made.base_model.model
    rows = gt.initialize_(made, 3, recipe=recipe)
    assert {row.name: row.std for row in rows if row.name.startswith("linear.")} == {
        "linear.weight": None,
        "linear.bias": None,
        "linear.lora_A.default.weight": pytest.approx(1 / math.sqrt(3 * 4)),
        "linear.lora_B.default.weight": 0,
        "linear.lora_B.default.bias": 0,
    }
    for name, shape in (("linear", (2, 4)), ("conv", (2, 4, 3, 3))):
        expected = kaiming(shape, f"{name}.lora_A.default.weight")
        assert tobytes(layers[name].lora_A["default"].weight) == tobytes(expected)
        assert expected.abs().max() <= 1 / math.sqrt(expected[0].numel())
        assert not any(parameter.any() for parameter in layers[name].lora_B.parameters())
    assert not layers["table"].lora_embedding_A["default"].any()
    expected = init.normal_(torch.empty(4, 2), seed=3, name="table.lora_embedding_B.default")
    assert tobytes(layers["table"].lora_embedding_B["default"]) == tobytes(expected)


def test_the_base_has_the_weights_that_it_has_without():
    bare, adapted = model(lambda layer: layer), model()
    adapted.requires_grad_(True)
    gt.initialize_(bare, 3)
    gt.initialize_(adapted, 3)
    for name, value in values(bare.base_model.model).items():
        layer, _, own = name.partition(".")
        layers = adapted.base_model.model
        base = layers[layer] if layer == "head" else layers[layer].base_layer
        assert tobytes(getattr(base, own)) == value


def test_adapters_and_layers_are_not_alike():
    made = model(adapters=("one", "two"))
    gt.initialize_(made, 3)
    found = [tobytes(part.weight) for part in made.modules() if getattr(part, "weight", None) is not None]
    drawn = [value for value in found if any(value)]
    assert len(set(drawn)) == len(drawn)


def test_an_adapter_round_an_adapter_has_a_name_of_its_own():
    made = PeftModel(BaseTuner(nn.ModuleDict({"linear": LoraLayer(LoraLayer(nn.Linear(4, 6)))})))
    assert row_names(gt.initialize_(made)) == [
        "linear.weight",
        "linear.bias",
        "linear.base_layer.lora_A.default.weight",
        "linear.base_layer.lora_B.default.weight",
        "linear.lora_A.default.weight",
        "linear.lora_B.default.weight",
    ]


@pytest.mark.parametrize("recipe", [None, "own"])
def test_the_magnitudes_of_dora_are_the_norms_of_the_base(recipe):
    made = model(dora=True)
    rows = gt.initialize_(made, 3, recipe=recipe)
    assert {row.written for row in rows} == {"whole", "frozen"}
    layers = made.base_model.model
    for name, norms in {
        "table": layers["table"].base_layer.weight.norm(dim=0),
        "linear": layers["linear"].base_layer.weight.norm(dim=1),
        "conv": layers["conv"].base_layer.weight.flatten(1).norm(dim=1).view(1, 6, 1, 1),
    }.items():
        magnitude = layers[name].lora_magnitude_vector["default"].weight
        assert magnitude.shape == norms.shape
        assert torch.allclose(magnitude, norms, rtol=1e-6)


def test_the_magnitudes_follow_a_base_that_is_drawn():
    made = model(dora=True).requires_grad_(True)
    gt.initialize_(made, 3)
    layer = made.base_model.model["linear"]
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight.norm(dim=1))


def test_magnitudes_of_a_base_without_memory_are_an_error_before_anything_is_written():
    made = model(dora=True)
    layer = made.base_model.model["conv"].base_layer
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    before = values(made.base_model.model["linear"])
    with pytest.raises(ValueError, match=r"base must have 6 outputs and lie in memory.*got shape .* on meta"):
        gt.initialize_(made)
    assert values(made.base_model.model["linear"]) == before
    made.to("meta")
    assert {row.written for row in gt.initialize_(made)} == {"meta, not written", "frozen"}


@pytest.mark.parametrize("init_lora_weights", ["pissa", "olora", "eva", "gaussian", False])
def test_factors_that_are_not_peft_s_default_are_not_guessed(init_lora_weights):
    made = model(init_lora_weights=init_lora_weights)
    before = values(made)
    with pytest.raises(ValueError, match=r"rules must cover every parameter.*lora_A"):
        gt.initialize_(made)
    assert values(made) == before
    rules = [("*.lora_?.*", nn.init.ones_), ("*lora_embedding*", nn.init.zeros_), *gt.DEFAULT_RULES]
    report = gt.initialize_(made, rules=rules)
    assert {row.rule for row in report if ".lora_A" in row.name} == {"ones_"}


def test_a_recipe_draws_what_the_configuration_says():
    made = model(init_lora_weights="gaussian")
    report = gt.initialize_(made, 3, recipe="own")
    expected = init.normal_(torch.empty(2, 4), std=0.5, seed=3, name="linear.lora_A.default.weight")
    layer = made.base_model.model["linear"]
    assert tobytes(layer.lora_A["default"].weight) == tobytes(expected)
    assert not layer.lora_B["default"].weight.any()
    assert "Ran reset_lora_parameters of adapter default." in report.notes
    made = model(init_lora_weights="pissa")
    before = values(made)
    with pytest.raises(ValueError, match=r"recipe must be a function .* linear\.lora_A\.default .*'pissa'"):
        gt.initialize_(made, recipe="own")
    assert values(made) == before


@pytest.mark.parametrize("make", [AdaLoraLayer, IA3Layer])
def test_other_tuners_are_not_guessed(make):
    made = PeftModel(BaseTuner(nn.ModuleDict({"linear": make(nn.Linear(4, 6)), "head": nn.Linear(6, 2)})))
    report = gt.initialize_(made, strict=False)
    unknown = [row.name for row in report if row.written == "not written"]
    assert unknown == [row.name for row in report if row.name.count(".") == 3]
    assert len(unknown) == 2
    with pytest.raises(ValueError, match="rules must cover every parameter"):
        gt.initialize_(made)


def test_a_prompt_is_not_guessed():
    made = PeftModel(nn.Linear(3, 3))
    made.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(3, 3)})
    report = gt.initialize_(made, strict=False)
    assert [row.written for row in report] == ["whole", "whole", "not written"]


def test_a_layer_that_is_trained_beside_an_adapter_is_not_drawn_anew():
    """It starts as a copy of the base's."""
    made = model()
    head = made.base_model.model["head"]
    made.base_model.model["head"] = wrapper = AuxiliaryTrainingWrapper()
    wrapper.original_module = head.requires_grad_(False)
    wrapper.modules_to_save = nn.ModuleDict({"default": nn.Linear(6, 2)})
    before = values(wrapper)
    with pytest.raises(ValueError, match=r"rules must cover .*head\.modules_to_save\.default\.weight"):
        gt.initialize_(made)
    report = gt.initialize_(made, strict=False)
    assert [row.name for row in report if row.written == "not written"] == [
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    ]
    assert values(wrapper) == before


# Without PEFT: by the names alone


@pytest.mark.parametrize("words", [("lora_A", "lora_B"), ("lora_a", "lora_b")])
def test_bare_factors(words):
    made = nn.ModuleDict({"proj": nn.Linear(4, 6), words[0]: nn.Linear(4, 2), words[1]: nn.Linear(2, 6)})
    gt.initialize_(made, 3, rules=[("*.bias", nn.init.zeros_), *gt.DEFAULT_RULES])
    assert tobytes(made[words[0]].weight) == tobytes(kaiming((2, 4), f"{words[0]}.weight"))
    assert not made[words[1]].weight.any()
    assert made["proj"].weight.any()


@pytest.mark.parametrize("name", ["lora_up", "lora_layer", "lora_E"])
def test_what_else_is_called_so_is_not_guessed(name):
    made = nn.ModuleDict({"proj": nn.Linear(4, 6), name: nn.ModuleDict({"up": nn.Linear(2, 6)})})
    report = gt.initialize_(made, strict=False)
    assert [row.written for row in report] == ["whole", "whole", "not written", "not written"]
    made = nn.ParameterDict({"lora_A": torch.ones(2, 2), "lora_B": torch.ones(2, 2)})
    assert {row.written for row in gt.initialize_(made, strict=False)} == {"not written"}


class AdapterModule:
    __module__ = "torchtune.modules.peft._utils"


class DoRALinear(nn.Module, AdapterModule):
    """torchtune's."""

    __module__ = "torchtune.modules.peft.dora"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.lora_a, self.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.magnitude = nn.Parameter(torch.ones(6))

    def initialize_parameters(self):
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def initialize_dora_magnitude(self):
        self.magnitude.copy_(self.weight.norm(dim=1))


@pytest.mark.parametrize("recipe", [None, "own"])
def test_torchtune(recipe):
    made = nn.Sequential(DoRALinear())
    rows = gt.initialize_(made, 3, recipe=recipe)
    assert [row.written for row in rows] == ["frozen", "whole", "whole", "whole"]
    assert tobytes(made[0].lora_a.weight) == tobytes(kaiming((2, 4), "0.lora_a.weight"))
    assert not made[0].lora_b.weight.any()
    assert torch.allclose(made[0].magnitude, made[0].weight.norm(dim=1))
