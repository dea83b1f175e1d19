"""torch.compile, make_fx and torch.export over the functions of gpuinit.torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import gpuinit  # noqa: E402
import gpuinit.torch as gt  # noqa: E402

FAMILY = [getattr(gt, name) for name in gt.__all__ if name.endswith("_") and name != "initialize_"]
INIT = [getattr(gt.init, name) for name in gt.init.__all__]
INIT = [function for function in INIT if "seed" in inspect.signature(function).parameters]
CASES = [partial(function, seed=3, name="w") for function in FAMILY + INIT]
CASES += [gt.he_normal_, partial(gt.truncated_normal_, stddev=0.1, lower=-1.0, seed=1)]
CORE = [getattr(gpuinit, name) for name in gpuinit.__all__ if name != "FallbackWarning"]


def into(function, tensor, shape=None):
    return function(shape or tuple(tensor.shape), seed=3, out=tensor)


CASES += [partial(into, function) for function in CORE]


def test_all_are_here():
    assert (len(FAMILY), len(INIT), len(CORE)) == (10, 7, 10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_bits_are_those_without_compile(backend):
    """Every function between two operations of a graph, one after the other, as a model's reset has them."""

    def run(weights, fills):
        sums = []
        for weight, fill in zip(weights, fills, strict=True):
            before = weight * 3
            fill(weight)
            sums.append((before + weight).sum())
        return sums

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend)
    for _ in range(2):
        ours, theirs = ([torch.ones(i + 2, 5) for i in range(len(CASES))] for _ in range(2))
        torch.manual_seed(0)
        expected = run(ours, CASES)
        torch.manual_seed(0)
        assert all(map(torch.equal, compiled(theirs, CASES), expected))
        assert all(map(torch.equal, theirs, ours))
    assert not torch.equal(ours[0], torch.ones(2, 5))


@pytest.mark.parametrize("fill", [CASES[0], *CASES[-13:]])
def test_one_function_alone(fill):
    """Where Dynamo has not yet given up on functions that it met with many shapes."""

    def run(weight):
        fill(weight)
        return weight * 2

    torch._dynamo.reset()
    for _ in range(2):
        torch.manual_seed(0)
        expected = run(torch.ones(6, 5))
        torch.manual_seed(0)
        assert torch.equal(torch.compile(run, backend="eager")(torch.ones(6, 5)), expected)


def test_a_whole_model():
    def run(model):
        return gt.initialize_(model, 3), model[0].weight * 2

    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 9)) for _ in range(2)]
    torch._dynamo.reset()
    report, weight = torch.compile(run, backend="eager")(models[0])
    expected = run(models[1])
    assert (str(report), weight.tolist()) == (str(expected[0]), expected[1].tolist())
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_new_arrays_between_operations(backend):
    def run(x):
        return x * 3 + torch.from_numpy(gpuinit.he_normal((3, 4), seed=3, device="cpu"))

    expected = run(torch.ones(3, 4))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.compile(run, backend=backend)(torch.ones(3, 4)), expected)


def test_a_recipe_in_streams():
    def run(model):
        with gt.streams(model, 3) as report:
            for layer in model:
                layer.reset_parameters()
        return str(report), model[0].weight * 2

    models = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 9)) for _ in range(2)]
    torch._dynamo.reset()
    report, weight = torch.compile(run, backend="eager")(models[0])
    expected = run(models[1])
    assert (report, weight.tolist()) == (expected[0], expected[1].tolist())
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_a_compiled_recipe_in_streams():
    def run(model):
        for layer in model:
            layer.reset_parameters()

    models = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 9)) for _ in range(2)]
    torch._dynamo.reset()
    for model, recipe in zip(models, (run, torch.compile(run, backend="aot_eager")), strict=True):
        with gt.streams(model, 3):
            recipe(model)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


# Doors, and a model in them. A graph that goes on without the fill would be silent.


LAYER = nn.Linear(4, 3)  # made here, as torch's own draws are errors in some of what traces


def in_streams(draw, weight):
    with gt.streams(LAYER, 3):
        draw(LAYER.weight)
    return weight + LAYER.weight


def whole_model(weight):
    gt.initialize_(LAYER, 3)
    return weight + LAYER.weight


DOORS = {f"{fill.func.__module__}.{fill.func.__name__}": fill for fill in CASES[:17]}
DOORS |= {f"out= of {function.__name__}": partial(into, function, shape=(3, 4)) for function in CORE}
FUNCTIONS = list(DOORS)
DOORS["initialize_"] = whole_model
DOORS |= {
    f"streams, {name}": partial(in_streams, draw)
    for name, draw in {
        "normal_": nn.init.normal_,
        "trunc_normal_": nn.init.trunc_normal_,
        "bernoulli_": lambda weight: weight.data.bernoulli_(0.5),
        "a copy": lambda weight: weight.data.copy_(torch.rand(3, 4)),
        "he_normal_": gt.he_normal_,
    }.items()
}


class Refills(nn.Module):
    def __init__(self, door):
        super().__init__()
        self.door = door
        self.register_buffer("held", torch.zeros(3, 4))

    def forward(self, weight):
        return self.door(weight) * 2


class RefillsItsOwn(Refills):
    def forward(self, weight):
        return self.door(self.held) + weight


def trace_by_torch_fx(door):
    return torch.fx.symbolic_trace(RefillsItsOwn(door))(torch.zeros(3, 4))


def zeros():
    return torch.zeros(3, 4)


TRACED = {
    "make_fx": lambda door: make_fx(Refills(door))(zeros()),
    "make_fx before dispatch": lambda door: make_fx(Refills(door), pre_dispatch=True)(zeros()),
    "make_fx of fakes": lambda door: make_fx(Refills(door), tracing_mode="fake")(zeros()),
    "make_fx of any shape": lambda door: make_fx(Refills(door), tracing_mode="symbolic")(zeros()),
    "make_fx of a buffer": lambda door: make_fx(RefillsItsOwn(door))(zeros()),
    "export": lambda door: torch.export.export(Refills(door), (zeros(),)),
    "export of a buffer": lambda door: torch.export.export(RefillsItsOwn(door), (zeros(),)),
    "torch.jit.trace": lambda door: torch.jit.trace(Refills(door), zeros(), check_trace=False),
    "torch.jit.trace of a buffer": lambda door: torch.jit.trace(
        RefillsItsOwn(door), zeros(), check_trace=False
    ),
    "torch.fx": trace_by_torch_fx,
    "functionalize": lambda door: torch.func.functionalize(Refills(door))(zeros()),
    "vmap": lambda door: torch.func.vmap(Refills(door))(torch.zeros(2, 3, 4)),
    "grad": lambda door: torch.func.grad(lambda weight: Refills(door)(weight).sum())(zeros()),
    "jvp": lambda door: torch.func.jvp(Refills(door), (zeros(),), (zeros(),)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("trace", TRACED)
def test_what_would_miss_the_fill_in_silence_is_an_error(trace, door):
    wanted = r"(tensor|out|module) must be filled outside of .*, got a traced \w+"
    with pytest.raises(RuntimeError, match=wanted):
        TRACED[trace](DOORS[door])


@pytest.mark.parametrize("fill", CASES[:17] + CASES[-10:])  # with seeds
def test_a_tensor_that_all_of_a_batch_share_is_filled(fill):
    def run(x):
        weight = torch.empty(2, 3)
        fill(weight)
        return x * weight

    torch.manual_seed(0)
    expected = torch.stack([run(torch.ones(2, 3))] * 2)
    assert torch.equal(torch.vmap(run)(torch.ones(2, 2, 3)), expected)
    assert torch.equal(torch.vmap(torch.vmap(run))(torch.ones(1, 2, 2, 3))[0], expected)


@pytest.mark.parametrize("trace", ["grad", "jvp", "functionalize"])
def test_one_that_other_transforms_see_is_not(trace):
    held = torch.zeros(3, 4)
    transforms = {
        "grad": lambda run: torch.func.grad(lambda x: run(x).sum())(zeros()),
        "jvp": lambda run: torch.func.jvp(run, (zeros(),), (zeros(),)),
        "functionalize": lambda run: torch.func.functionalize(run)(zeros()),
    }
    with pytest.raises(RuntimeError, match="must be filled outside of"):
        transforms[trace](lambda x: x * CASES[0](held))
    with pytest.raises(RuntimeError, match="must be filled outside of"):
        transforms[trace](torch.vmap(lambda x: x * CASES[0](held)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_afterwards_all_is_as_before():
    for door in DOORS.values():
        door(zeros())


@pytest.mark.parametrize("door", [*FUNCTIONS, "initialize_", "streams"])
def test_a_full_graph_is_torch_s_error(door):
    model = nn.Linear(4, 3)

    def in_block(weight):
        with gt.streams(model, 3):
            return weight * 2

    doors = DOORS | {"initialize_": lambda weight: gt.initialize_(model), "streams": in_block}
    torch._dynamo.reset()
    compiled = torch.compile(doors[door], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a fill is in no graph"):
        compiled(zeros())


def test_a_strict_export_is_torch_s_error():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.export.export(Refills(CASES[0]), (zeros(),), strict=True)


def test_the_compiler_is_not_loaded_by_us():
    code = "import gpuinit.torch as gt, sys, torch; gt.he_normal_(torch.empty(3)); "
    code += "gt.initialize_(torch.nn.Linear(2, 3)); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
