"""torch.compile, make_fx and torch.export over the functions of gpuinit.torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import gpuinit.torch as gt  # noqa: E402

FAMILY = [getattr(gt, name) for name in gt.__all__ if name.endswith("_") and name != "initialize_"]
INIT = [getattr(gt.init, name) for name in gt.init.__all__]
INIT = [function for function in INIT if "seed" in inspect.signature(function).parameters]
CASES = [partial(function, seed=3, name="w") for function in FAMILY + INIT]
CASES += [gt.he_normal_, partial(gt.truncated_normal_, stddev=0.1, lower=-1.0, seed=1)]


def test_all_are_here():
    assert (len(FAMILY), len(INIT)) == (10, 7)


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


@pytest.mark.parametrize("fill", [CASES[0], *CASES[-3:]])
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


def test_a_full_graph_is_torch_s_error():
    torch._dynamo.reset()
    compiled = torch.compile(lambda weight: gt.he_normal_(weight, seed=3), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        compiled(torch.zeros(3, 4))


class Refills(nn.Module):
    def forward(self, weight):
        return gt.he_normal_(weight, seed=3) * 2


TRACED = {
    "make_fx": lambda: make_fx(Refills())(torch.zeros(3, 4)),
    "make_fx of fakes": lambda: make_fx(Refills(), tracing_mode="fake")(torch.zeros(3, 4)),
    "make_fx of any shape": lambda: make_fx(Refills(), tracing_mode="symbolic")(torch.zeros(3, 4)),
    "export": lambda: torch.export.export(Refills(), (torch.zeros(3, 4),)),
    "functionalize": lambda: torch.func.functionalize(Refills())(torch.zeros(3, 4)),
    "vmap": lambda: torch.func.vmap(Refills())(torch.zeros(3, 4)),
    "grad": lambda: torch.func.grad(lambda weight: Refills()(weight).sum())(torch.zeros(3, 4)),
}


@pytest.mark.parametrize("trace", TRACED)
def test_what_would_miss_the_fill_in_silence_is_an_error(trace):
    with pytest.raises(
        RuntimeError, match=r"tensor must be filled outside of .*, got a traced (Fake)?Tensor"
    ):
        TRACED[trace]()


def test_a_strict_export_is_torch_s_error():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.export.export(Refills(), (torch.zeros(3, 4),), strict=True)


def test_the_compiler_is_not_loaded_by_us():
    code = "import gpuinit.torch as gt, sys, torch; gt.he_normal_(torch.empty(3)); "
    code += "gt.initialize_(torch.nn.Linear(2, 3)); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
