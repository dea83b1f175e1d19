"""gpuinit.torch.initialize_: names, rules, report. What needs several processes is in another file."""

from __future__ import annotations

import math
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.distributions import TRUNCATED_STD  # noqa: E402


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
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.LSTM(3, 4))
    before = weights(model)
    with pytest.raises(
        ValueError,
        match=r"^rules must cover every parameter.*strict=False.*got none for 1\.weight, 2\.weight_ih_l0, ",
    ):
        gt.initialize_(model)
    assert weights(model) == before
    report = gt.initialize_(model, strict=False)
    assert report[2] == gt.Row("1.weight", (1,), "float32", "-", None)
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
name  shape  dtype    rule   std
a     ()     float32  ones_  0
b     3      float32  -      -
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
        ),
        ("one.weight", (8, 8), "float32", "he_normal_", pytest.approx(0.5)),
    ]
    assert model.one.weight.is_meta
    assert report == gt.initialize_(Net())
