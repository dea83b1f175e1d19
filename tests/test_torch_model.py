"""gpuinit.torch.initialize_: names, rules, report. What needs several processes is in another file."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch.nn.utils.parametrize import register_parametrization  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.distributions import TRUNCATED_STD  # noqa: E402
from gpuinit.rules import Uncovered, refuse_uncovered  # noqa: E402
from gpuinit.torch.names import WRAPPERS  # noqa: E402


class Net(nn.Module):
    def __init__(self, *, extra=False, backwards=False):
        super().__init__()
        layers = {
            "embed": lambda: nn.Embedding(10, 8),
            "one": lambda: nn.Linear(8, 8),
            "two": lambda: nn.Linear(8, 8),
            "conv": lambda: nn.Conv2d(4, 8, 3),
        }
        if extra:
            layers = {"zero": lambda: nn.Linear(8, 8)} | layers
        for name in reversed(layers) if backwards else layers:
            self.add_module(name, layers[name]())


class Own(nn.Module):
    """A module that the default rules do not know, with parameters of these shapes."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def weights(model):
    return {name: tobytes(parameter) for name, parameter in model.named_parameters()}


def names(report):
    return [row.name for row in report]


def stds(report):
    return {row.name: row.std for row in report}


# Streams


def test_a_parameter_is_that_of_its_name_and_of_nothing_else():
    models = [Net(), Net(extra=True), Net(backwards=True)]
    for model in models:
        gt.initialize_(model, seed=3)
    first, more, backwards = map(weights, models)
    assert first == backwards == {name: more[name] for name in first}
    assert len({first["one.weight"], first["two.weight"], more["zero.weight"]}) == 3
    gt.initialize_(models[0], seed=4)
    assert weights(models[0])["one.weight"] != first["one.weight"]


def test_a_parameter_is_what_the_function_makes_under_its_name():
    model = Net()
    gt.initialize_(model)
    assert tobytes(model.conv.weight) == tobytes(
        gt.he_normal_(torch.empty(8, 4, 3, 3), seed=0, name="conv.weight")
    )


def test_a_seed_of_none_is_drawn_from_torch():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = Net()
        torch.manual_seed(seed)
        gt.initialize_(model, seed=None)
        found.append(weights(model))
    assert found[0] == found[1]
    assert found[0]["one.weight"] != found[2]["one.weight"]


def test_bfloat16_is_float32_rounded():
    full, half = Net(), Net().bfloat16()
    gt.initialize_(full)
    gt.initialize_(half)
    assert weights(full.bfloat16()) == weights(half)


# Names


EMA = torch.optim.swa_utils.AveragedModel


class Outer(nn.Module):
    """A child that only looks like what a wrapper holds."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)


def checkpointed():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.ModuleDict({"a": checkpoint_wrapper(nn.Linear(4, 4)), "b": nn.Linear(4, 4)})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        (lambda: EMA(Net()), ["embed.weight", "one.weight", "one.bias", "two.weight"]),
        (lambda: torch.compile(Net()), ["embed.weight", "one.weight", "one.bias", "two.weight"]),
        (lambda: nn.DataParallel(Net()), ["embed.weight", "one.weight", "one.bias", "two.weight"]),
        (
            lambda: nn.DataParallel(torch.compile(Net())),
            ["embed.weight", "one.weight", "one.bias", "two.weight"],
        ),
        (lambda: nn.Sequential(torch.compile(nn.Linear(3, 3))), ["0.weight", "0.bias"]),
        (Outer, ["module.weight", "module.bias"]),
        (checkpointed, ["a.weight", "a.bias", "b.weight", "b.bias"]),
        (lambda: nn.Linear(3, 3), ["weight", "bias"]),
    ],
)
def test_names_are_those_of_the_bare_model(wrapped, bare):
    assert names(gt.initialize_(wrapped()))[: len(bare)] == bare


def wrapper(package, kind, child):
    """As a class of another package that holds a model."""

    def init(self, model):
        nn.Module.__init__(self)
        self.add_module(child, model)

    return type(kind, (nn.Module,), {"__init__": init, "__module__": f"{package}.somewhere"})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        EMA,
        torch.ao.quantization.QuantWrapper,
        nn.DataParallel,
        torch.compile,
        lambda model: EMA(nn.DataParallel(torch.compile(model))),
        lambda model: type("Mine", (EMA,), {})(model),
        *(wrapper(*row) for row in WRAPPERS),
    ],
)
@pytest.mark.parametrize("recipe", [None, "own"])
def test_a_wrapped_model_has_the_weights_of_its_model(wrap, recipe):
    """At the top, and where it is a part."""
    bare, wrapped = nn.ModuleDict({"a": Net(), "b": Net()}), nn.ModuleDict({"a": wrap(Net()), "b": Net()})
    whole = wrap(Net())
    for model in (bare, wrapped, whole):
        rows = gt.initialize_(model, 3, recipe=recipe)
    assert names(rows) == names(gt.initialize_(Net()))
    assert list(weights(bare).values()) == list(weights(wrapped).values())
    gt.initialize_(bare["a"], 3, recipe=recipe)
    assert list(weights(bare["a"]).values()) == list(weights(whole).values())


@pytest.mark.parametrize("child", sorted({child for *_, child in WRAPPERS}))
def test_a_child_of_a_wrapper_s_word_keeps_its_name_elsewhere(child):
    model = wrapper("mine", "DataParallel", child)(nn.Linear(3, 3))
    assert names(gt.initialize_(model)) == [f"{child}.weight", f"{child}.bias"]
    model = wrapper("torch", "Mine", child)(nn.Linear(3, 3))
    assert names(gt.initialize_(model)) == [f"{child}.weight", f"{child}.bias"]
    with gt.streams(model) as report:
        nn.init.normal_(model.get_parameter(f"{child}.weight"))
    assert names(report) == [f"{child}.weight", f"{child}.bias"]


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
@pytest.mark.parametrize("fill", [gt.initialize_, lambda model: gt.streams(model).__enter__()])
def test_no_two_have_one_name_where_a_wrapper_is_left_out(kind, fill):
    class Scaled(nn.DataParallel):
        def __init__(self, model):
            super().__init__(model)
            self.weight = kind(torch.ones(1))

    model = Scaled(nn.Linear(3, 3))
    before = weights(model)
    with pytest.raises(ValueError, match="rename one, got weight in a Scaled and in a Linear"):
        fill(model)
    assert weights(model) == before


def test_names_and_order_are_those_of_named_parameters():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    assert names(gt.initialize_(model)) == [name for name, _ in model.named_parameters()]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.norm


def test_what_is_tied_is_filled_once_under_its_first_name():
    model = Tied()
    report = gt.initialize_(model)
    assert names(report) == ["embed.weight", "norm.weight", "norm.bias"]
    assert stds(report)["embed.weight"] == pytest.approx(0.02)
    expected = gt.truncated_normal_(torch.empty(10, 8), 0.02 / TRUNCATED_STD, seed=0, name="embed.weight")
    assert tobytes(model.head.weight) == tobytes(expected)


def test_a_module_below_itself_ends():
    model = Net()
    model.one.parent = model
    assert names(gt.initialize_(model)) == names(gt.initialize_(Net()))


# Default rules


@pytest.mark.parametrize(
    ("module", "std"),
    [
        (lambda: nn.Linear(12, 5), math.sqrt(2 / 12)),
        (lambda: nn.Conv1d(6, 4, 5), math.sqrt(2 / 30)),
        (lambda: nn.Conv2d(8, 16, 3, groups=4), math.sqrt(2 / 18)),
        (lambda: nn.Conv2d(32, 32, 3, groups=32), math.sqrt(2 / 9)),
        (lambda: nn.Conv3d(3, 4, 2), math.sqrt(2 / 24)),
        (lambda: nn.ConvTranspose1d(6, 4, 5), math.sqrt(2 / 30)),
        (lambda: nn.ConvTranspose2d(8, 16, 3), math.sqrt(2 / 72)),
        (lambda: nn.ConvTranspose2d(8, 16, 3, groups=4), math.sqrt(2 / 18)),
        (lambda: nn.ConvTranspose3d(3, 4, 2), math.sqrt(2 / 24)),
        (lambda: nn.Embedding(50, 4), 0.02),
        (lambda: nn.EmbeddingBag(50, 4), 0.02),
    ],
)
def test_the_default_rules_of_weights(module, std):
    made = module()
    report = gt.initialize_(made)
    assert stds(report)["weight"] == pytest.approx(std)
    assert 0.7 * std < made.weight.std() < 1.3 * std
    assert made.weight.abs().max() <= 2 * std / TRUNCATED_STD * (1 + 1e-6)
    if getattr(made, "bias", None) is not None:
        assert not made.bias.any()
        assert stds(report)["bias"] == 0


def test_attention_is_covered():
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
    found = stds(gt.initialize_(module))
    assert found == {
        "q_proj_weight": pytest.approx(0.5),
        "k_proj_weight": pytest.approx(math.sqrt(2 / 6)),
        "v_proj_weight": pytest.approx(math.sqrt(2 / 4)),
        "in_proj_bias": 0,
        "bias_k": 0,
        "bias_v": 0,
        "out_proj.weight": pytest.approx(0.5),
        "out_proj.bias": 0,
    }
    assert stds(gt.initialize_(nn.MultiheadAttention(8, 2)))["in_proj_weight"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.BatchNorm2d(5),
        lambda: nn.SyncBatchNorm(5),
        lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
        lambda: nn.BatchNorm1d(5, affine=False),
        lambda: nn.LayerNorm(5),
        lambda: nn.LayerNorm(5, bias=False),
        lambda: nn.GroupNorm(1, 5),
        lambda: nn.RMSNorm(5),
    ],
)
def test_norm_layers_are_reset(module):
    made, fresh = module(), module()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.fill_(77)
    gt.initialize_(made)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("rules", [None, [("*", gt.he_normal_)]])
@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_the_padding_row_stays_zero(make, rules):
    module = make(10, 4, padding_idx=-3)
    gt.initialize_(module, rules=rules)
    zero = [row for row in range(10) if not module.weight[row].any()]
    assert zero == [7]


class Transpose(nn.Module):
    def forward(self, weight):
        return weight.T

    def right_inverse(self, weight):
        return weight.T


class Halved(nn.Module):
    def forward(self, weight):
        return weight[:5] * 2


def padded(padding_idx, kind=nn.Embedding, **words):
    return kind(10, 4, padding_idx=padding_idx, **words)


def tied(**layers):
    """Layers of one table, in this order."""
    model = nn.ModuleDict(layers)
    first, *others = model.values()
    for other in others:
        other.weight = first.weight
    return model


def viewed(first, second, view):
    """Two layers with parameters of their own that share memory."""
    second.weight = nn.Parameter(view(first.weight.detach()))
    return nn.ModuleDict({"first": first, "second": second})


def by_transpose():
    """A table that is the transpose of a layer's weight."""
    model = nn.ModuleDict({"linear": nn.Linear(10, 4, bias=False), "table": padded(2)})
    register_parametrization(model["table"], "weight", Transpose())
    model["table"].parametrizations.weight.original = model["linear"].weight
    return model


def by_attribute():
    """The same where the table is no parameter, as it is set after `del`."""
    model = nn.ModuleDict({"linear": nn.Linear(10, 4, bias=False), "table": padded(2)})
    del model["table"].weight
    model["table"].weight = model["linear"].weight.T
    return model


def by_buffer():
    model = nn.ModuleDict({"linear": nn.Linear(4, 10, bias=False), "table": padded(2)})
    del model["table"].weight
    model["table"].register_buffer("weight", model["linear"].weight.detach())
    return model


def moved(table, padding_idx):
    """The row is set later, and torch counts a negative one from the end."""
    table.padding_idx = padding_idx
    return table


def linear():
    return nn.Linear(4, 10, bias=False)


TABLES = {
    "Linear first": (lambda: tied(head=linear(), table=padded(2)), [2]),
    "Linear later": (lambda: tied(table=padded(2), head=linear()), [2]),
    "Linear twice": (lambda: tied(head=linear(), table=padded(-1), tail=linear()), [9]),
    "an EmbeddingBag": (lambda: tied(head=linear(), bag=padded(2, nn.EmbeddingBag)), [2]),
    "two rows": (lambda: tied(one=padded(2), two=padded(7)), [2, 7]),
    "one row of two": (lambda: tied(one=nn.Embedding(10, 4), two=padded(7), head=linear()), [7]),
    "a row set later": (lambda: moved(nn.Embedding(10, 4), -3), [7]),
    "a view later": (lambda: viewed(padded(2), linear(), lambda table: table), [2]),
    "a view before": (lambda: viewed(linear(), padded(2), lambda table: table), [2]),
    "a transpose later": (
        lambda: viewed(padded(2), nn.Linear(10, 4, bias=False), lambda table: table.T),
        [2],
    ),
    "a parametrised transpose": (by_transpose, [2]),
    "an attribute": (by_attribute, [2]),
    "a buffer": (by_buffer, [2]),
    "weight norm of rows": (lambda: parametrizations.weight_norm(padded(2)), [2]),
    "weight norm of columns": (lambda: parametrizations.weight_norm(padded(2), dim=1), [2]),
    "weight norm of all": (lambda: parametrizations.weight_norm(padded(2), dim=None), [2]),
    "spectral norm": (lambda: parametrizations.spectral_norm(padded(2)), [2]),
    "pruning": (lambda: prune.identity(padded(2), "weight"), [2]),
}


def tables(model):
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    for part in embeddings:  # hooks make the weight as a layer is called
        for hook in part._forward_pre_hooks.values():
            hook(part, ())
    return [part.weight.detach() for part in embeddings]


@pytest.mark.parametrize(("make", "rows"), TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("initializer", [gt.he_normal_, nn.init.ones_, nn.init.normal_])
def test_the_padding_row_is_zero_whoever_else_has_the_table(make, rows, initializer):
    model = make()
    gt.initialize_(model, rules=[("*", initializer)])
    for table in tables(model):
        assert [row for row in range(10) if not table[row].any()] == rows


def test_the_rest_of_a_tied_table_is_that_of_its_first_name():
    model = tied(head=linear(), table=padded(2))
    gt.initialize_(model)
    expected = gt.he_normal_(torch.empty(10, 4), seed=0, name="head.weight")
    expected[2] = 0
    assert tobytes(model["table"].weight) == tobytes(expected)


def test_the_padding_row_of_a_table_that_is_left_alone_is_too():
    model = filled_with(tied(head=linear(), table=padded(2)), 7)
    model["other"] = nn.Linear(3, 3)
    gt.initialize_(model)
    assert (model["table"].weight == 7).all()


@pytest.mark.parametrize("normalize", [parametrizations.orthogonal, None])
def test_a_padding_row_that_no_parameter_has_is_refused(normalize):
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "table": padded(2)})
    if normalize:
        normalize(model["table"])
    else:
        register_parametrization(model["table"], "weight", Halved(), unsafe=True)
    before = weights(model)
    with pytest.raises(ValueError, match=r"padding_idx must be None where .* made by (_Orthogonal|Halved)"):
        gt.initialize_(model, rules=[("*", gt.he_normal_)])
    assert weights(model) == before


class Moved(nn.Module):
    """Neither shape nor memory tells that its row is not 0."""

    def forward(self, weight):
        return weight.exp()


class Factors(nn.Module):
    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        return weight[:, :2], weight[:2]


class Fails(nn.Module):
    def forward(self, weight):
        if self.training:
            return weight
        raise KeyError("weight")


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight / weight.norm()


@pytest.mark.parametrize("kind", [Moved, Factors, Fails])
def test_a_padding_row_that_a_parametrisation_does_not_keep_is_refused(kind):
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "table": padded(2)})
    register_parametrization(model["table"], "weight", kind())
    model.eval()
    before = weights(model)
    wanted = rf"^padding_idx must be None where .* got a table made by {kind.__name__} from shape \(10, "
    with pytest.raises(ValueError, match=wanted):
        gt.initialize_(model, rules=[("*", nn.init.normal_)])
    assert weights(model) == before
    model["table"].padding_idx = None
    gt.initialize_(model, rules=[("*", nn.init.normal_)])


def test_one_that_it_keeps_is_zero_whatever_the_memory_held():
    model = nn.ModuleDict({"table": padded(2)})
    register_parametrization(model["table"], "weight", Twice())
    model["table"].parametrizations.weight.original.data.fill_(math.nan)
    gt.initialize_(model, rules=[("*", nn.init.normal_)])
    assert [row for row in range(10) if not model["table"].weight[row].any()] == [2]


# Rules of the caller


def test_the_first_rule_that_fits_is_taken():
    rules = [
        ("one.*", nn.init.zeros_),
        (lambda module, name: isinstance(module, nn.Linear) and name.endswith("bias"), nn.init.ones_),
        ("*.weight", partial(gt.truncated_normal_, stddev=0.01)),
        ("*", nn.init.zeros_),
    ]
    report = gt.initialize_(Net(), rules=rules)
    assert [(row.name, row.rule, row.std) for row in report] == [
        ("embed.weight", "truncated_normal_(stddev=0.01)", pytest.approx(0.01 * TRUNCATED_STD)),
        ("one.weight", "zeros_", 0),
        ("one.bias", "zeros_", 0),
        ("two.weight", "truncated_normal_(stddev=0.01)", pytest.approx(0.01 * TRUNCATED_STD)),
        ("two.bias", "ones_", 0),
        ("conv.weight", "truncated_normal_(stddev=0.01)", pytest.approx(0.01 * TRUNCATED_STD)),
        ("conv.bias", "zeros_", 0),
    ]


def test_rules_can_be_put_before_the_default_ones():
    report = gt.initialize_(
        nn.Sequential(nn.Linear(4, 4), nn.PReLU()), rules=[("1.*", nn.init.ones_), *gt.DEFAULT_RULES]
    )
    assert [row.rule for row in report] == ["he_normal_", "zeros_", "ones_"]


def test_an_initialiser_is_given_what_it_takes():
    given = []

    def plain(tensor):
        given.append({})

    def keyed(tensor, seed, *, name):
        given.append({"seed": seed, "name": name})

    def everything(tensor, **keywords):
        given.append(keywords)

    module = nn.Linear(3, 3, bias=False)
    for initializer in (plain, keyed, everything, partial(everything, seed=1), torch.Tensor.zero_):
        (row,) = gt.initialize_(module, seed=9, rules=[("weight", initializer)])
        assert row.std is None
    assert given == [
        {},
        {"seed": 9, "name": "weight"},
        {"seed": 9, "name": "weight", "module": module},
        {"seed": 1, "name": "weight", "module": module},
    ]
    assert not module.weight.any()


def test_the_std_of_the_uniform_distribution():
    report = gt.initialize_(nn.Linear(3, 3, bias=False), rules=[("*", gt.he_uniform_)])
    assert stds(report)["weight"] == pytest.approx(math.sqrt(2 / 3))


def test_what_no_rule_covers_is_an_error_before_anything_is_written():
    own = Own(weight_ih_l0=(16, 3), weight_hh_l0=(16, 4), bias_ih_l0=16, bias_hh_l0=16)
    model = nn.Sequential(nn.Linear(4, 4), Own(weight=1), own)
    before = weights(model)
    with pytest.raises(
        ValueError,
        match=r"^rules must cover every parameter.*strict=False.*got none for 1\.weight, 2\.weight_ih_l0, ",
    ):
        gt.initialize_(model)
    assert weights(model) == before
    report = gt.initialize_(model, strict=False)
    assert report[2] == gt.Row("1.weight", (1,), "float32", "-", None, "not written")
    after = weights(model)
    assert {name for name in after if after[name] != before[name]} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("rules", ["*", {"*": gt.he_normal_}, [("*",)], [("*", 3)], [(3, gt.he_normal_)], 3])
def test_rules_that_are_none(rules):
    with pytest.raises(TypeError, match=r"rules must be None or a sequence of pairs .*, got "):
        gt.initialize_(nn.Linear(3, 3), rules=rules)


def test_an_error_names_the_parameter():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.empty(3, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"got torch\.complex64") as raised:
        gt.initialize_(model)
    assert raised.value.__notes__ == ["This is parameter 0.weight, of a Linear."]


def test_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got Tensor"):
        gt.initialize_(torch.empty(3))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_flattened_parameters_are_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    with pytest.raises(TypeError, match="use fully_shard, got a FullyShardedDataParallel"):
        gt.initialize_(nn.Sequential(nn.Linear(3, 3), flat))


# Frozen parameters


def filled_with(module, value, *, frozen=True):
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(value)
    return module.requires_grad_(not frozen)


FROZEN = {
    "table": lambda: nn.Embedding(6, 4, padding_idx=2),
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "stack": lambda: Own(weight=(2, 3, 4)),
}


@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize(
    "rules",
    [
        None,
        list(gt.DEFAULT_RULES),
        [("1.*", nn.init.ones_), *gt.DEFAULT_RULES],
        [("*", gt.he_normal_)],
        [("1.*", nn.init.ones_), *gt.DEFAULT_RULES, ("*", nn.init.ones_)],
    ],
)
def test_what_is_frozen_is_left_alone(make, rules):
    model = nn.Sequential(filled_with(make(), 7), nn.Linear(4, 4))
    report = gt.initialize_(model, rules=rules)
    assert all((tensor == 7).all() for tensor in model[0].state_dict().values())
    assert {row[3:] for row in report if row.name.startswith("0.")} == {("-", None, "frozen")}
    assert {row.written for row in report if row.name.startswith("1.")} == {"whole"}


@pytest.mark.parametrize("pattern", ["0.*", "*weight", lambda module, name: name == "0.weight", "**"])
def test_a_rule_of_the_callers_reaches_what_is_frozen(pattern):
    model = nn.Sequential(filled_with(nn.Embedding(6, 4, padding_idx=2), 7))
    (row,) = gt.initialize_(model, rules=[(pattern, nn.init.ones_), *gt.DEFAULT_RULES])
    assert row[3:] == ("ones_", 0, "whole")
    assert model[0].weight.sum(1).tolist() == [4, 4, 0, 4, 4, 4]


def test_the_first_rule_that_fits_is_taken_for_what_is_frozen_too():
    model = filled_with(nn.Linear(4, 4), 7)
    report = gt.initialize_(model, rules=[("*", nn.init.ones_), ("*weight", nn.init.ones_)])
    assert [row.written for row in report] == ["frozen", "frozen"]
    assert (model.weight == 7).all()


def test_what_is_frozen_need_not_be_covered_nor_drawable():
    model = nn.Sequential(nn.Linear(4, 4), Own(weight=3))
    model[1].weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    assert gt.initialize_(model)[2] == gt.Row("1.weight", (3,), "int8", "-", None, "frozen")
    assert model[1].weight.tolist() == [1, 1, 1]


def test_running_statistics_are_kept_where_all_of_a_batch_norm_is_frozen():
    def mean(norm, rules=None):
        gt.initialize_(norm, rules=rules)
        return norm.running_mean.tolist()

    assert mean(filled_with(nn.BatchNorm1d(1), 7)) == [7]
    assert mean(filled_with(nn.BatchNorm1d(1), 7), [("weight", nn.init.ones_)]) == [0]
    assert mean(filled_with(nn.BatchNorm1d(1), 7, frozen=False)) == [0]
    assert mean(filled_with(nn.BatchNorm1d(1, affine=False), 7)) == [0]
    half = filled_with(nn.BatchNorm1d(1), 7)
    half.weight.requires_grad_(True)
    assert mean(half) == [0]


def test_the_vectors_of_a_spectral_norm_are_found_where_only_its_bias_is_frozen():
    found = []
    for seed, frozen in ((0, False), (1, True)):
        torch.manual_seed(seed)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        layer.bias.requires_grad_(not frozen)
        gt.initialize_(layer)
        found.append([tobytes(buffer) for buffer in layer.buffers()])
    assert found[0] == found[1]


# Fans of what is no convolution's kernel


def shaped(*shape):
    return nn.Sequential(nn.Linear(2, 2, bias=False), Own(weight=shape))


def kept(function, **words):
    """A partial that another does not flatten."""
    made = partial(function, **words)
    made.label = "kept"
    assert partial(made).func is made
    return made


OURS = [
    getattr(gt, name) for name in gt.__all__ if name.startswith(("he_", "glorot_", "lecun_", "variance_"))
]
OTHERS = [
    getattr(module, name)
    for module in (nn.init, gt.init)
    for name in ("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_")
]


@pytest.mark.parametrize("shape", [(8, 16, 64), (2, 4, 16, 64)])
@pytest.mark.parametrize(
    "initializer",
    [*OURS, *OTHERS, partial(gt.variance_scaling_, scale=2.0), partial(kept(gt.he_normal_), seed=3)],
)
def test_a_stack_needs_axes_and_the_error_names_them(initializer, shape):
    model = shaped(*shape)
    before = weights(model)
    with pytest.raises(ValueError, match=r"^rules must name the axes .*, got \w+_ for shape \(") as raised:
        gt.initialize_(model, rules=[("*", initializer)])
    assert raised.value.__notes__ == ["This is parameter 1.weight, of a Own."]
    assert weights(model) == before
    remedies = re.findall(r"(partial\(.*?out_axis=\d\)) for (?:a stack|one) of \((\w+), ", str(raised.value))
    assert [first for _, first in remedies] == ["out", "in"]
    for remedy, first in remedies:
        fixed = eval(remedy, vars(gt) | {"partial": partial})
        report = gt.initialize_(shaped(*shape), rules=[("1.*", fixed), *gt.DEFAULT_RULES])
        matrix = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(64, 16, bias=False))
        words = {**fixed.keywords, "in_axis": 1, "out_axis": 0, "batch_axis": ()}
        if first == "in":
            words |= {"in_axis": 0, "out_axis": 1}
        expected = gt.initialize_(matrix, rules=[("1.*", partial(fixed.func, **words)), *gt.DEFAULT_RULES])
        assert report[1].std == expected[1].std


def test_the_error_keeps_the_arguments_of_a_rule_but_not_those_of_torchs():
    rule = partial(partial(gt.variance_scaling_, scale=2.0), mode="fan_out")
    with pytest.raises(
        ValueError, match=r"partial\(variance_scaling_, scale=2\.0, mode='fan_out', batch_axis=0, "
    ):
        gt.initialize_(shaped(2, 3, 4), rules=[("*", rule)])
    with pytest.raises(ValueError, match=r"partial\(he_normal_, batch_axis=0, .*got kaiming_normal_ for "):
        gt.initialize_(shaped(2, 3, 4), rules=[("*", partial(nn.init.kaiming_normal_, nonlinearity="relu"))])


@pytest.mark.parametrize("axes", [{"in_axis": 2}, {"in_axis": 1, "out_axis": 0}, {"batch_axis": 2}])
def test_any_axis_that_is_named_is_taken(axes):
    made = gt.he_normal_(torch.empty(2, 3, 4), seed=1, name="weight", **axes)
    for rule in (partial(gt.he_normal_, seed=1, **axes), partial(kept(gt.he_normal_, seed=1, **axes))):
        model = Own(weight=(2, 3, 4))
        gt.initialize_(model, rules=[("*", rule)])
        assert tobytes(model.weight) == tobytes(made)


class Derived(nn.Conv2d):
    """A convolution of the user's own."""


@pytest.mark.parametrize("initializer", [gt.he_normal_, gt.init.kaiming_normal_, nn.init.kaiming_normal_])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(3, 4, 2, bias=False),
        lambda: Derived(3, 4, 2, bias=False),
        lambda: nn.ConvTranspose3d(3, 4, 2, bias=False),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 2, bias=False)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 2, bias=False)),
    ],
)
def test_convolutions_need_no_axes(make, initializer):
    report = gt.initialize_(nn.Sequential(make()), rules=[("*", initializer)])
    assert {row.written for row in report} == {"whole"}


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_what_has_at_most_two_axes_needs_none(shape):
    (row,) = gt.initialize_(Own(weight=shape), rules=[("*", gt.he_normal_)])
    assert row.written == "whole"


@pytest.mark.parametrize("initializer", [gt.normal_, gt.truncated_normal_, gt.uniform_, nn.init.zeros_])
def test_what_has_no_fans_needs_no_axes(initializer):
    (row,) = gt.initialize_(Own(weight=(2, 3, 4)), rules=[("*", initializer)])
    assert row.written == "whole"


def test_a_function_is_given_the_layer_of_what_is_parametrised():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    seen = {}
    gt.initialize_(layer, rules=[(lambda module, name: seen.update({name: module}) is None, nn.init.ones_)])
    names = ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    assert seen == dict.fromkeys(names, layer)


# All or nothing


def with_last(weight, initializer=gt.he_normal_):
    """A model whose last parameter is this, and rules by which it comes last."""
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(5, 4, padding_idx=1), Own(weight=1)
    )
    model[3].weight = weight
    return model, [("3.*", initializer), *gt.DEFAULT_RULES]


def of(dtype, **words):
    return nn.Parameter(torch.zeros(3, 4, dtype=dtype), **words)


@pytest.mark.parametrize(
    ("weight", "initializer", "message"),
    [
        (lambda: of(torch.int8, requires_grad=False), gt.he_normal_, "got torch.int8"),
        (lambda: of(torch.complex64), partial(gt.uniform_, limit=1.0), "got torch.complex64"),
        (lambda: of(torch.complex64), gt.init.kaiming_uniform_, "got torch.complex64"),
        (lambda: nn.Parameter(torch.zeros(4).expand(3, 4)), gt.he_normal_, "share memory"),
        (nn.UninitializedParameter, gt.he_normal_, "run the lazy module once"),
        (nn.UninitializedParameter, nn.init.zeros_, "run the lazy module once"),
        (lambda: nn.UninitializedParameter(requires_grad=False), nn.init.zeros_, "run the lazy module once"),
        (lambda: of(torch.float32), partial(gt.he_normal_, seed=-1), "got -1"),
        (lambda: of(torch.float32), partial(gt.he_normal_, in_axis=7), "got 7"),
        (lambda: of(torch.float32), partial(gt.normal_, stddev=-1.0), "got -1"),
        (lambda: of(torch.float16), partial(gt.truncated_normal_, stddev=1e5), "float16"),
        (lambda: of(torch.float32), partial(gt.init.normal_, generator=torch.Generator()), "generator must"),
        (lambda: nn.Parameter(torch.zeros(3, 4, 5)), nn.init.kaiming_normal_, "axes"),
    ],
)
def test_after_an_error_nothing_is_written(weight, initializer, message):
    model, rules = with_last(weight(), initializer)
    filled_with(model[:3], 7, frozen=False)
    called = []
    rules.insert(0, ("0.bias", lambda tensor: called.append(tensor)))
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        gt.initialize_(model, seed=None, rules=rules)
    assert raised.value.__notes__ == ["This is parameter 3.weight, of a Own."]
    assert all((tensor == 7).all() for tensor in model[:3].state_dict().values())
    assert torch.equal(torch.get_rng_state(), state)
    assert not called


def test_what_is_lazy_is_refused_by_name_whatever_covers_it():
    for strict in (True, False):
        with pytest.raises(TypeError, match="run the lazy module once") as raised:
            gt.initialize_(nn.Sequential(nn.LazyLinear(3)), rules=[], strict=strict)
        assert raised.value.__notes__ == ["This is parameter 0.weight, of a LazyLinear."]


def test_the_check_draws_no_seed():
    torch.manual_seed(5)
    expected = gt.he_normal_(torch.empty(3, 4), name="weight")
    torch.manual_seed(5)
    model = Own(weight=(3, 4))
    gt.initialize_(model, rules=[("*", partial(gt.he_normal_, seed=None))])
    assert tobytes(model.weight) == tobytes(expected)


@pytest.mark.parametrize("make", [partial(nn.ConvTranspose2d, 3, 4, 2), partial(nn.Linear, 3, 4)])
def test_the_default_rules_are_checked_before(make):
    model = nn.Sequential(nn.Linear(2, 2), make(dtype=torch.complex64))
    before = weights(model)
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        gt.initialize_(model)
    assert weights(model) == before


# The error for what no rule covers


def mixture(layers):
    """The names and shapes of a mixture of experts."""
    blocks = [
        nn.ModuleDict(
            {
                "attention": nn.Linear(4, 4),
                "router": Router(weight=(8, 4)),
                "experts": Experts(gate_up_proj=(8, 6, 4), down_proj=(8, 4, 3)),
                "input_layernorm": Scale(weight=4),
                "post_attention_layernorm": Scale(weight=4),
            }
        )
        for _ in range(layers)
    ]
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks), "norm": Scale(weight=4)})})


class Router(Own):
    pass


class Experts(Own):
    pass


class Scale(Own):
    pass


MIXTURE = """\
rules must cover every parameter; append [("*norm.weight", initialiser), \
("*.router.weight", initialiser), \
("*.gate_up_proj", partial(he_normal_, batch_axis=0, in_axis=2, out_axis=1)), \
("*.down_proj", partial(he_normal_, batch_axis=0, in_axis=2, out_axis=1))], \
or pass strict=False to skip them, got none for 161 parameters:
Scale.weight (4,): 65, e.g. model.layers.0....
Router.weight (8, 4): 32, e.g. model.layers.0....
Experts.gate_up_proj (8, 6, 4): 32, e.g. model.layers.0....
Experts.down_proj (8, 4, 3): 32, e.g. model.layers.0...."""


def test_the_error_for_many_parameters_groups_them():
    model = mixture(32)
    with pytest.raises(ValueError, match="strict=False") as raised:
        gt.initialize_(model)
    assert str(raised.value) == MIXTURE
    pasted = re.search(r"\[.*\]", MIXTURE)[0]
    rules = eval(pasted, {"partial": partial, "he_normal_": gt.he_normal_, "initialiser": nn.init.ones_})
    found = stds(gt.initialize_(model, rules=[*gt.DEFAULT_RULES, *rules]))
    assert found["model.layers.3.experts.down_proj"] == pytest.approx(math.sqrt(2 / 3))
    assert found["model.layers.3.attention.weight"] == pytest.approx(math.sqrt(2 / 4))


def test_the_error_counts_what_it_does_not_show():
    shapes = {f"very_long_name_of_a_parameter_{letter}": (2, 3, 4) for letter in "abcdefghi"}
    with pytest.raises(ValueError, match=r"got none for 10 parameters:\n(.*: 1, e\.g\. .*\n){4}and 6 more$"):
        gt.initialize_(nn.Sequential(Own(**shapes), Own(token=(1, 1, 4))), rules=[])


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (lambda: Own(pos_embed=(1, 5, 4)), '[("pos_embed", initialiser)]'),
        (lambda: Own(proj=(3, 5, 4)), '[("proj", partial(he_normal_, batch_axis=0, in_axis=2, out_axis=1))]'),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 2, bias=False)), '[("*.weight", initialiser)]'),
        (
            lambda: nn.ModuleDict({"a": Own(w=3), "b": Own(w=(3, 4)), "c": nn.ModuleDict({"b": Own(w=3)})}),
            '[("a.w", initialiser), ("c.b.w", initialiser), ("b.w", initialiser)]',
        ),
        (
            lambda: nn.ModuleDict({"a": Own(w=3), "b": Scale(w=3)}),
            '[("a.w", initialiser), ("b.w", initialiser)]',
        ),
    ],
)
def test_the_rules_in_the_error(model, pairs):
    with pytest.raises(ValueError, match=re.escape(f"append {pairs}, or pass")):
        gt.initialize_(model(), rules=[])


def test_names_with_slashes_and_no_owners():
    names = [f"layers/{number}/scale" for number in range(9)]
    with pytest.raises(
        ValueError, match=r'\("\*/scale", initialiser\).*9 parameters:\nscale \(3,\): 9, e\.g\. '
    ):
        refuse_uncovered([Uncovered(name, (3,)) for name in names])
    refuse_uncovered([])


# The report


TABLE = """\
name                                    shape  dtype     rule               std
embed.weight                            10x8   bfloat16  truncated_normal_  0.02
norm.weight                             8      bfloat16  ones_              0
norm.bias                               8      bfloat16  zeros_             0
...aaaaaaaaaaaaaaaaaaaaaaaaaaaa.weight  2x8    bfloat16  he_normal_         0.5
...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.bias  2      bfloat16  zeros_             0
5 parameters, 114 elements"""

SMALL = """\
name  shape  dtype    rule   std  written
a     ()     float32  ones_  0    whole
b     3      float32  -      -    not written
2 parameters, 4 elements"""


def test_the_report_is_a_table_of_at_most_80_columns():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "norm": nn.LayerNorm(8), "a" * 90: nn.Linear(8, 2)})
    assert str(gt.initialize_(model.bfloat16())) == TABLE
    assert max(map(len, TABLE.splitlines())) == 80


def test_a_small_report():
    model = nn.ParameterDict({"a": torch.empty(()), "b": torch.empty(3)})
    assert str(gt.initialize_(model, rules=[("a", nn.init.ones_)], strict=False)) == SMALL


def test_a_meta_model_has_a_report_and_no_memory():
    with torch.device("meta"):
        model = Net()
    report = gt.initialize_(model)
    assert [tuple(row) for row in report[:2]] == [
        (
            "embed.weight",
            (10, 8),
            "float32",
            f"truncated_normal_(stddev={0.02 / TRUNCATED_STD:.4g})",
            pytest.approx(0.02),
            "meta, not written",
        ),
        ("one.weight", (8, 8), "float32", "he_normal_", pytest.approx(0.5), "meta, not written"),
    ]
    assert model.one.weight.is_meta
    assert [row._replace(written="whole") for row in report] == gt.initialize_(Net())


def test_a_fake_model_is_not_written_either():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = nn.Linear(3, 3)
    assert {row.written for row in gt.initialize_(model)} == {"meta, not written"}


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("fill", [gt.initialize_, lambda model: gt.streams(model).__enter__()])
def test_what_has_memory_is_not_filled_in_a_fake_mode(allowed, fill):
    from torch._subclasses import FakeTensorMode

    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = weights(model)
    with FakeTensorMode(allow_non_fake_inputs=allowed), pytest.raises(ValueError, match="outside of FakeTen"):
        fill(model)
    assert weights(model) == before


def test_a_model_partly_on_meta_says_what_was_not_written():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    with torch.no_grad():
        for tensor in model.buffers():
            tensor.fill_(7)
    model[0].to("meta")
    for name, parameter in model[1].named_parameters():  # as accelerate offloads it, without its statistics
        model[1].register_parameter(name, nn.Parameter(parameter.to("meta")))
    report = gt.initialize_(model)
    assert [row.written for row in report] == ["meta, not written"] * 4 + ["whole"] * 4
    assert model[1].running_mean.tolist() == [7] * 3
    assert model[2].running_mean.tolist() == [0] * 3
    (note,) = report.notes
    assert note.startswith(
        "Not written, as they are on meta or fake: 0.weight, 0.bias, 1.weight, 1.bias. Give"
    )
    with gt.streams(model) as streamed:
        nn.init.normal_(model[0].weight)
    assert streamed[0].written == "meta, not written"
    assert note in streamed.notes


ROWS = [
    gt.Row("model.layers.11.mlp.experts.gate_up_proj", (8, 1024, 256), "bfloat16", "whole_", 0.02),
    gt.Row("decoder.embed_positions.weight", (448, 384), "float32", "-", None, "frozen"),
    gt.Row("model.norm.weight", (4096,), "bfloat16", "truncated_normal_ std=0.02", 1.234e-10, "part"),
    gt.Row("proj", (8,), "float32", "he_normal_(in_axis=1)", 0.5, "meta, not written"),
]


def test_what_was_written_is_a_last_column_of_the_table():
    lines = str(gt.Report(ROWS)).splitlines()
    assert lines[0].split() == ["name", "shape", "dtype", "rule", "std", "written"]
    assert [line.split()[-1] for line in lines[1:5]] == ["whole", "frozen", "part", "meta"]
    assert re.search(r" \w+\.\.\. std=0\.02 +1\.234e-10 +part$", lines[3])
    assert re.search(r" he_normal_ +0\.5 ", lines[4])
    assert max(map(len, lines)) <= 80
    assert str(gt.Report(ROWS[:1])).splitlines()[0].split() == ["name", "shape", "dtype", "rule", "std"]


@pytest.mark.parametrize("written", ["whole", "not written", "meta, not written"])
@pytest.mark.parametrize(
    "rule", ["-", "r" * 60, "normal_ std=0.02 mean=0.5", "r" * 40 + " std=0.02 a=-2 b=2"]
)
@pytest.mark.parametrize("shape", [(), (2**40,) * 3, (1024,) * 9])
def test_no_report_has_more_than_80_columns(shape, rule, written):
    row = gt.Row("n" * 70, shape, "float8_e4m3fnuz", rule, 1.234e-300, written)
    report = gt.Report([row], ["A note of many words. " * 9, "x" * 90])
    assert max(map(len, str(report).splitlines())) <= 80


@pytest.mark.parametrize("numbers", ["std=0.02", "std=0.02 a=-2 b=2"])
def test_numbers_of_a_rule_are_shown(numbers):
    row = gt.Row("n" * 70, (8, 14336, 4096), "bfloat16", f"truncated_normal_ {numbers}", 0.02, "not written")
    assert f"... {numbers}  0.02  not written" in str(gt.Report([row]))


def test_notes_are_under_the_table():
    report = gt.initialize_(nn.Linear(3, 3))
    assert report.notes == []
    table = str(report)
    report.notes.append("Compute the buffers again.")
    assert str(report) == f"{table}\nCompute the buffers again."
    assert isinstance(report, list)
    assert report == gt.initialize_(nn.Linear(3, 3))


def test_a_rule_in_the_error_does_not_reach_what_is_frozen():
    model = nn.ModuleDict({"body": Own(scale=3), "head": Own(scale=3)})
    model["body"].requires_grad_(False)
    with pytest.raises(ValueError, match=r'append \[\("head\.scale", initialiser\)\], or pass'):
        gt.initialize_(model)


def test_a_rule_in_the_error_is_for_those_that_it_suits():
    model = nn.ModuleList([Own(w=(8, 64, 256)), *(Own(w=(1, 1, 256)) for _ in range(3)), Own(**{"a[0]": 2})])
    with pytest.raises(ValueError, match="rules must cover") as raised:
        gt.initialize_(model)
    pairs = re.search(r"append (\[.*\]), or pass", str(raised.value))[1]
    rules = eval(pairs, {"partial": partial, "he_normal_": gt.he_normal_, "initialiser": nn.init.zeros_})
    report = gt.initialize_(model, rules=rules)
    assert [row.rule.partition("(")[0] for row in report] == [
        "he_normal_",
        "zeros_",
        "zeros_",
        "zeros_",
        "zeros_",
    ]
    assert model[0].w.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)


def test_the_axes_in_the_error_keep_what_a_partial_has_by_place():
    rule = partial(gt.variance_scaling_, 3.0, mode="fan_out")
    with pytest.raises(ValueError, match=r"partial\(variance_scaling_, 3\.0, mode='fan_out', batch_axis=0"):
        gt.initialize_(Own(w=(8, 64, 256)), rules=[("*", rule)])


def test_a_model_of_inference_mode_is_filled_there_or_not_at_all():
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    before = weights(model)
    with pytest.raises(ValueError, match=r"module must be filled in inference mode.*, got it outside"):
        gt.initialize_(model)
    assert weights(model) == before
    with torch.inference_mode():
        gt.initialize_(model)
    assert tobytes(model.weight) == tobytes(gt.he_normal_(torch.empty(4, 4), seed=0, name="weight"))
