"""gpuinit.torch.initialize_ with a recipe: the model's own, found where models have it, or the caller's."""

from __future__ import annotations

import math
from functools import partial, partialmethod

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402


def normal(shape, name, std=1.0, seed=0):
    return gt.init.normal_(torch.empty(shape), std=std, seed=seed, name=name)


def uniform(shape, name, bound, seed=0):
    return gt.init.uniform_(torch.empty(shape), -bound, bound, seed=seed, name=name)


def poisoned(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(77)
    return model


def row(report, name):
    (found,) = [row for row in report if row.name == name]
    return found


# Where a recipe is found


class Scaled(nn.Linear):
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.5)
        nn.init.zeros_(self.bias)


def whole(name):
    """A model with an entry of that name, as torchtitan's, timm's and many others."""

    def init(self, scale=0.1, *, device=None):
        nn.init.normal_(self.layer.weight, std=scale)
        nn.init.ones_(self.layer.bias)
        self.other.weight.normal_(0, 2 * scale)
        self.other.bias.zero_()

    layers = {"layer": lambda: nn.Linear(4, 4), "other": lambda: Scaled(4, 4)}

    def make(self):
        nn.Module.__init__(self)
        for layer, build in layers.items():
            self.add_module(layer, build())

    return type("Model", (nn.Module,), {"__init__": make, name: init})()


@pytest.mark.parametrize("name", ["init_states", "init_weights", "initialize_weights"])
def test_a_model_s_own_entry_is_run(name):
    model = poisoned(whole(name))
    report = gt.initialize_(model, 3, recipe="own")
    assert tobytes(model.layer.weight) == tobytes(normal((4, 4), "layer.weight", 0.1, 3))
    assert tobytes(model.other.weight) == tobytes(normal((4, 4), "other.weight", 0.2, 3))
    assert (model.layer.bias == 1).all()
    assert report.notes == [f"Reset the parts of Model, then ran its {name}."]
    assert [row.written for row in report] == ["whole"] * 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in its compiler
def test_it_is_found_below_wrappers_and_other_modules():
    first, second = poisoned(whole("init_weights")), poisoned(whole("init_weights"))
    gt.initialize_(nn.DataParallel(torch.compile(first)), recipe="own")
    assert tobytes(first.layer.weight) == tobytes(normal((4, 4), "layer.weight", 0.1))
    report = gt.initialize_(nn.ModuleDict({"a": second, "b": poisoned(nn.Linear(2, 2))}), recipe="own")
    assert tobytes(second.layer.weight) == tobytes(normal((4, 4), "a.layer.weight", 0.1))
    assert [row.written for row in report] == ["whole"] * 6
    plain = gt.initialize_(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), recipe="own")
    assert plain.notes[0].startswith("Reset the parts of Sequential, which has no recipe of its own")
    assert report.notes[0] == "Reset the parts of Model, then ran its init_weights."


class Each(nn.Module):
    """As minGPT's: a method that is given one module after the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=2)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def test_a_method_for_each_module_is_applied():
    model = poisoned(Each())
    report = gt.initialize_(model, recipe="own")
    expected = gt.init.trunc_normal_(torch.empty(5, 4), std=0.02, seed=0, name="embed.weight")
    expected[2] = 0
    assert tobytes(model.embed.weight) == tobytes(expected)
    assert [row.written for row in report] == ["whole"] * 5
    told = "Reset the parts of Each, then ran its _init_weights on each; its constructor may do more."
    assert report.notes == [told]


def test_without_one_the_parts_are_reset_and_that_is_told():
    model = poisoned(
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2), Scaled(4, 2))
    )
    report = gt.initialize_(model, recipe="own")
    bound = 1 / math.sqrt(6)
    assert tobytes(model[0].weight) == tobytes(uniform((4, 6), "0.weight", bound))
    assert (model[1].running_var == 1).all()
    assert not model[1].running_mean.any()
    assert not model[2].out_proj.bias.any()  # the attention's own, after that of its projection
    assert tobytes(model[3].weight) == tobytes(normal((2, 4), "3.weight", 0.5))
    assert [row.written for row in report] == ["whole"] * len(report)
    assert report.notes == [
        "Reset the parts of Sequential, which has no recipe of its own; its constructor may do more."
    ]


class Partly(nn.Module):
    """As timm's resnet: its own recipe is for some of the parts, after the constructors of all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3)
        self.norm = nn.BatchNorm1d(2)
        self.head = whole("init_weights")

    def init_weights(self):
        nn.init.normal_(self.conv.weight)
        nn.init.zeros_(self.norm.weight)


def test_parts_that_a_recipe_leaves_out_are_as_their_constructors_have_them():
    model = poisoned(Partly())
    report = gt.initialize_(model, recipe="own")
    assert [row.written for row in report] == ["whole"] * 8
    assert tobytes(model.conv.weight) == tobytes(normal((2, 2, 3), "conv.weight"))
    assert tobytes(model.conv.bias) == tobytes(uniform((2,), "conv.bias", 1 / math.sqrt(6)))
    assert not model.norm.weight.any()
    assert (model.norm.running_var == 1).all()
    assert tobytes(model.head.layer.weight) == tobytes(normal((4, 4), "head.layer.weight", 0.1))


def test_a_parameter_whose_memory_is_replaced_and_then_written_is_told():
    """As transformers does to biases that are tied."""

    def recipe(model):
        model.bias.data = torch.empty(4)
        nn.init.zeros_(model.bias)
        model.weight.data = torch.empty(4, 4)
        nn.init.normal_(model.weight)

    model = poisoned(nn.Linear(4, 4))
    report = gt.initialize_(model, recipe=recipe)
    assert [(row.rule, row.written) for row in report] == [("normal_ std=1", "whole"), ("zero_", "whole")]
    assert tobytes(model.weight) == tobytes(normal((4, 4), "weight"))


def set_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.1)
        nn.init.zeros_(module.bias)


ENTRIES = {
    "static, for each": {"_init_weights": staticmethod(lambda m: set_weights(m))},
    "static, whole": {"recipe": None, "init_weights": staticmethod(lambda: None)},
    "of the class": {"_init_weights": classmethod(lambda cls, module: set_weights(module))},
    "whole, with an underscore": {"_init_weights": lambda self: set_weights(self.layer)},
    "for each, with options": {"init_weights": lambda self, module, std=1: set_weights(module)},
    "decorated": {"init_weights": torch.no_grad()(lambda self: set_weights(self.layer))},
    "a partial": {"init_weights": partialmethod(lambda self, scale: set_weights(self.layer), scale=2)},
}


@pytest.mark.parametrize("methods", ENTRIES.values(), ids=ENTRIES.keys())
def test_entries_of_every_kind_are_found(methods):
    def make(self):
        nn.Module.__init__(self)
        self.layer = nn.Linear(3, 3)

    model = poisoned(type("Model", (nn.Module,), {"__init__": make, **methods})())
    report = gt.initialize_(model, recipe="own")
    assert report.notes[0].startswith("Reset the parts of Model, then ran its ")
    expected = uniform((3, 3), "layer.weight", 1 / math.sqrt(3))
    if "recipe" not in methods:
        expected = normal((3, 3), "layer.weight", 0.1)
    assert tobytes(model.layer.weight) == tobytes(expected)


def test_frozen_parts_are_left_alone_but_for_what_a_recipe_copies_to_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.head = nn.Linear(4, 2)
            self.table = nn.Parameter(torch.empty(3), requires_grad=False)
            self.noise = nn.Parameter(torch.empty(3), requires_grad=False)

        def init_weights(self):
            self.table.copy_(torch.arange(3.0))  # as Whisper's sinusoids
            self.noise.copy_(torch.randn(3))
            self.noise.mul_(2)

    model = poisoned(Model())
    model.body.requires_grad_(False)
    report = gt.initialize_(model, recipe="own")
    for tensor in (*model.body.parameters(), model.body[1].running_var, model.noise):
        assert (tensor == 77).all()
    assert model.table.tolist() == [0, 1, 2]
    assert tobytes(model.head.weight) == tobytes(uniform((2, 4), "head.weight", 0.5))
    frozen = {row.name for row in report if row.written == "frozen"}
    assert frozen == {"noise", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"}
    assert any(note.startswith("Left alone, as they are frozen: ") for note in report.notes)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's own
def test_parameters_of_no_elements_are_no_gap():
    report = gt.initialize_(nn.Sequential(nn.Linear(0, 4)), recipe="own")
    assert [row.written for row in report] == ["whole", "whole"]


def test_a_spectral_norm_depends_on_the_seed_alone():
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
        gt.initialize_(model, recipe="own")
        found.append(tobytes(model.weight_u))
    assert found[0] == found[1]


def test_an_entry_that_needs_arguments_is_none():
    class Model(nn.Linear):
        def init_weights(self, std, mean):
            raise AssertionError

    assert gt.initialize_(Model(3, 3), recipe="own").notes == [
        "Model.init_weights needs arguments and was not run; give a function as the recipe."
    ]


def test_a_function_of_the_caller_s():
    model = poisoned(nn.Linear(4, 4))
    report = gt.initialize_(model, 5, recipe=lambda model: (model.weight.normal_(), model.bias.zero_()))
    assert tobytes(model.weight) == tobytes(normal((4, 4), "weight", seed=5))
    assert report.notes == []


def test_a_constructor_s_draws_are_keyed_where_they_are_copied():
    """For a model whose recipe is its constructor: build one again, and take its weights."""

    def build(backwards=False):
        layers = [("a", lambda: nn.Linear(4, 4)), ("b", lambda: nn.Conv1d(2, 2, 3))]
        return nn.ModuleDict({name: make() for name, make in layers[:: -1 if backwards else 1]})

    found = []
    for backwards in (False, True):
        model = poisoned(build())
        again = partial(build, backwards)
        report = gt.initialize_(
            model, recipe=lambda model, again=again: model.load_state_dict(again().state_dict())
        )
        assert [row.written for row in report] == ["temporary"] * 4
        found.append([tobytes(parameter) for parameter in model.parameters()])
    assert found[0] == found[1]
    assert found[0][0] == tobytes(uniform((4, 4), "a.weight.#0", 0.5))


def test_order_torch_s_seed_and_a_second_run_change_nothing():
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        gt.initialize_(model, recipe="own")
        if seed == 2:
            gt.initialize_(model, recipe="own")
        found.append([tobytes(parameter) for parameter in model.parameters()])
    assert found[0] == found[1] == found[2]


# What a recipe leaves out


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.empty(4))
        self.token = nn.Parameter(torch.empty(1, 1, 4))
        self.frozen = nn.Parameter(torch.full((3,), 7.0), requires_grad=False)

    def init_weights(self):
        self.layer.reset_parameters()


def test_what_it_never_wrote_is_an_error_or_told():
    with pytest.raises(
        ValueError,
        match=r"^recipe must write every parameter, or rules cover it; append .*, got none for gamma, token$",
    ):
        gt.initialize_(Leaves(), recipe="own")
    model = poisoned(Leaves())
    report = gt.initialize_(model, recipe="own", strict=False)
    assert {row.name: row.written for row in report} == {
        "gamma": "not written",
        "token": "not written",
        "frozen": "frozen",
        "layer.weight": "whole",
        "layer.bias": "whole",
    }
    assert report.notes[1:] == [
        "Left alone, as they are frozen: frozen.",
        "The recipe never wrote gamma, token.",
    ]
    assert (model.gamma == 77).all()


def test_rules_are_for_what_it_never_wrote():
    model = poisoned(Leaves())
    rules = [("*.weight", nn.init.zeros_), ("gamma", nn.init.ones_), ("*", partial(gt.normal_, stddev=0.1))]
    report = gt.initialize_(model, recipe="own", rules=rules)
    assert tobytes(model.layer.weight) == tobytes(uniform((4, 4), "layer.weight", 0.5))
    assert (model.gamma == 1).all()
    assert tobytes(model.token) == tobytes(normal((1, 1, 4), "token", 0.1))
    assert (model.frozen == 77).all()
    assert row(report, "token").rule == "normal_(stddev=0.1)"
    assert [row.name for row in report] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("recipe", ["mine", 3, ""])
def test_a_recipe_that_is_none(recipe):
    with pytest.raises(TypeError, match=r'recipe must be None, "own" or a function of the model, got '):
        gt.initialize_(nn.Linear(3, 3), recipe=recipe)


def test_a_rule_of_torch_s_draws_from_the_stream_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rules = [("*.bias", nn.init.normal_), ("0.*", nn.init.orthogonal_), ("*", nn.init.kaiming_uniform_)]
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        gt.initialize_(model, rules=rules)
        assert torch.equal(torch.get_rng_state(), before)
        found.append([tobytes(parameter) for parameter in model.parameters()])
    assert found[0] == found[1]
    assert tobytes(model[1].bias) == tobytes(normal((4,), "1.bias"))
    expected = gt.init.kaiming_uniform_(torch.empty(4, 4), seed=0, name="1.weight")
    assert tobytes(model[1].weight) == tobytes(expected)


# Padding rows of tables that are tied


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("order", [("table", "head"), ("head", "table"), ("head", "table", "again")])
def test_the_padding_row_is_zero_whoever_else_is_reset(order, kind):
    layers = {
        "table": lambda: kind(6, 4, padding_idx=2),
        "head": lambda: nn.Linear(4, 6, bias=False),
        "again": lambda: nn.Linear(4, 6),
    }
    model = nn.ModuleDict({name: layers[name]() for name in order})
    for layer in model.values():
        layer.weight = model[order[0]].weight
    gt.initialize_(poisoned(model), recipe="own")
    assert [row for row in range(6) if not model["table"].weight[row].any()] == [2]


@pytest.mark.parametrize("shape", [(4,), ()])
def test_what_else_embeddings_share_has_no_padding_row(shape):
    class Scaled(nn.Embedding):
        def __init__(self, scale):
            super().__init__(9, 4, padding_idx=1)
            self.scale = scale

        def reset_parameters(self):
            super().reset_parameters()
            if hasattr(self, "scale"):
                nn.init.ones_(self.scale)

    scale = nn.Parameter(torch.zeros(shape))
    model = nn.Sequential(Scaled(scale), Scaled(scale))
    gt.initialize_(model, recipe="own")
    assert (scale == 1).all()
    assert not model[0].weight[1].any()


def test_a_recipe_of_the_model_s_own_has_the_last_word_on_a_padding_row():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4, padding_idx=2)
            self.head = nn.Linear(4, 6)
            self.head.weight = self.table.weight

        def init_weights(self):
            nn.init.ones_(self.table.weight)
            nn.init.zeros_(self.head.bias)

    model = Model()
    gt.initialize_(model, recipe="own")
    assert (model.table.weight == 1).all()


def test_a_model_of_transformers_whose_weights_are_tied_keeps_its_padding_row():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, pad_token_id=3, tie_word_embeddings=True, **words)
    model = transformers.LlamaForCausalLM(config)
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    assert not table[3].any()
    gt.initialize_(poisoned(model), recipe="own")
    assert [row for row in range(20) if not table[row].any()] == [3]
