"""gpuinit.torch.init: the names, arguments and distributions of torch.nn.init, with gpuinit's numbers."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

import gpuinit

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.torch import fill, init  # noqa: E402

DRAWING = (
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
)
DRAWING_NOTHING = {
    "_calculate_correct_fan",
    "_calculate_fan_in_and_fan_out",
    "calculate_gain",
    "constant",
    "constant_",
    "dirac",
    "dirac_",
    "eye",
    "eye_",
    "ones_",
    "zeros_",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")
NONLINEARITIES = ("linear", "conv1d", "conv2d", "conv3d", "sigmoid", "tanh", "relu", "leaky_relu", "selu")
NONLINEARITIES += ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


# Names and signatures


@pytest.mark.parametrize("name", DRAWING)
def test_signatures_are_those_of_torch_and_a_seed_and_a_name(name):
    theirs = inspect.signature(getattr(nn.init, name)).parameters.values()
    *ours, seed, stream = inspect.signature(getattr(init, name)).parameters.values()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.name, one.kind, one.default) == (other.name, other.kind, other.default)
    for added, word in ((seed, "seed"), (stream, "name")):
        assert (added.name, added.kind, added.default) == (word, added.KEYWORD_ONLY, None)


def test_all_of_torch_is_here_or_refused_and_nothing_of_torch_draws():
    functions = dict(inspect.getmembers(nn.init, inspect.isfunction))
    assert {name for name in functions if getattr(init, name, None) is functions[name]} == DRAWING_NOTHING
    for name in functions.keys() - DRAWING_NOTHING - set(DRAWING):
        with pytest.raises(AttributeError, match=rf"'gpuinit.torch.init' has no attribute '{name}'; "):
            getattr(init, name)
    assert {name for name in DRAWING if getattr(init, name) is not functions[name]} == set(DRAWING)


def test_a_missing_name_says_what_to_use():
    with pytest.raises(
        AttributeError, match=r"'orthogonal_'; torch\.nn\.init\.orthogonal_ draws torch's num"
    ):
        init.orthogonal_(torch.empty(3, 3))
    with pytest.raises(AttributeError, match=r"'xavier_normal'; use xavier_normal_, "):
        init.xavier_normal(torch.empty(3, 3))
    with pytest.raises(AttributeError, match=r"has no attribute 'Tensor'$"):
        init.Tensor  # noqa: B018
    with pytest.raises(ImportError, match="sparse_"):
        from gpuinit.torch.init import sparse_  # noqa: F401


def test_what_is_exported_is_there():
    assert set(init.__all__) == set(DRAWING) | {name for name in DRAWING_NOTHING if name in init.__all__}
    assert all(hasattr(init, name) for name in init.__all__)
    assert gt.init is init
    assert "init" in gt.__all__


# The same bits as the core


def xavier_std(fan_in, fan_out, gain=1.0):
    return gain * math.sqrt(2 / (fan_in + fan_out))


SHAPE = (7, 5, 3)  # fans 15 and 21
UNIFORM, NORMAL, TRUNCATED = gpuinit.uniform, gpuinit.normal, gpuinit.truncated_normal
ROOT = math.sqrt(3)
CASES = {
    "uniform_": (init.uniform_, (), {}, UNIFORM, (0.0, 1.0)),
    "uniform_ of ends": (init.uniform_, (-1.0,), {"b": 3.0}, UNIFORM, (-1.0, 3.0)),
    "normal_": (init.normal_, (), {}, NORMAL, (1.0, 0.0)),
    "normal_ with a mean": (init.normal_, (1.5, 0.25), {}, NORMAL, (0.25, 1.5)),
    "trunc_normal_": (init.trunc_normal_, (), {}, TRUNCATED, (1.0,)),
    "trunc_normal_ at 2 std": (init.trunc_normal_, (0.0, 0.02, -0.04, 0.04), {}, TRUNCATED, (0.02,)),
    "trunc_normal_ whose bounds cut nothing": (init.trunc_normal_, (), {"std": 0.02}, NORMAL, (0.02,)),
    "trunc_normal_ beside its mean": (
        init.trunc_normal_,
        (1.0, 0.5),
        {"a": 0.5, "b": 2.25},
        TRUNCATED,
        (0.5, 1.0, -1.0, 2.5),
    ),
    "trunc_normal_ off its mean": (init.trunc_normal_, (0, 1, 3, 4), {}, TRUNCATED, (1.0, 0.0, 3.0, 4.0)),
    "trunc_normal_ of one bound": (
        init.trunc_normal_,
        (0.0, 0.5, -math.inf, 0.5),
        {},
        TRUNCATED,
        (0.5, 0.0, -math.inf, 1.0),
    ),
    "trunc_normal_ of std 0": (init.trunc_normal_, (0.5, 0.0), {}, NORMAL, (0.0, 0.5)),
    "trunc_normal_ of std 0 above b": (init.trunc_normal_, (5.0, 0.0), {}, NORMAL, (0.0, 2.0)),
    "trunc_normal_ of std 0 below a": (init.trunc_normal_, (-5.0, 0.0), {}, NORMAL, (0.0, -2.0)),
    "trunc_normal_ of one point": (init.trunc_normal_, (0.3, 0.7, 1.1, 1.1), {}, NORMAL, (0.0, 1.1)),
    "xavier_normal_": (init.xavier_normal_, (), {}, NORMAL, (xavier_std(15, 21),)),
    "xavier_normal_ with a gain": (init.xavier_normal_, (5 / 3,), {}, NORMAL, (xavier_std(15, 21, 5 / 3),)),
    "xavier_uniform_": (init.xavier_uniform_, (), {}, UNIFORM, (ROOT * xavier_std(15, 21),)),
    "xavier_uniform_ of 0": (init.xavier_uniform_, (0,), {}, UNIFORM, (0.0,)),
    "kaiming_normal_": (init.kaiming_normal_, (), {}, NORMAL, (math.sqrt(2.0) / math.sqrt(15),)),
    "kaiming_normal_ of fan_out": (
        init.kaiming_normal_,
        (0.5, "FAN_OUT"),
        {},
        NORMAL,
        (math.sqrt(2 / 1.25) / math.sqrt(21),),
    ),
    "kaiming_uniform_": (init.kaiming_uniform_, (), {}, UNIFORM, (ROOT * (math.sqrt(2.0) / math.sqrt(15)),)),
    "kaiming_uniform_ for tanh": (
        init.kaiming_uniform_,
        (),
        {"nonlinearity": "tanh"},
        UNIFORM,
        (ROOT * (5 / 3 / math.sqrt(15)),),
    ),
    "0-d tensors": (
        init.trunc_normal_,
        tuple(map(torch.tensor, (1.0, 0.5, 0.5, 2.25))),
        {},
        TRUNCATED,
        (0.5, 1.0, -1.0, 2.5),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_gpuinit(place, case, dtype):
    function, arguments, words, core, numbers = CASES[case]
    tensor = place(torch.empty(SHAPE, dtype=getattr(torch, dtype)))
    assert function(tensor, *arguments, **words, seed=11, name="layer.weight") is tensor
    expected = core(SHAPE, *numbers, seed=11, name="layer.weight", dtype=dtype, device="cpu")
    assert tobytes(tensor) == tobytes(expected)


@pytest.mark.parametrize(
    "layout",
    [
        lambda: torch.empty(8, 6, 3, 5).to(memory_format=torch.channels_last),
        lambda: torch.empty(40, 30).T,
        lambda: torch.empty(20, 30)[:, 2:25],
    ],
)
@pytest.mark.parametrize("name", DRAWING)
def test_the_layout_does_not_matter(place, name, layout):
    tensor = place(layout())
    plain = torch.empty(tensor.shape)
    getattr(init, name)(tensor, seed=5)
    assert tobytes(tensor) == tobytes(getattr(init, name)(plain, seed=5))
    assert tobytes(tensor) != tobytes(getattr(init, name)(plain, seed=6))
    assert tobytes(tensor) != tobytes(getattr(init, name)(plain, seed=5, name="other"))


@pytest.mark.parametrize(
    ("shape", "fan_in", "fan_out"),
    [
        ((7, 5), 5, 7),
        ((7, 5, 3), 15, 21),
        ((7, 5, 3, 2), 30, 42),
        ((7, 5, 3, 2, 4), 120, 168),
        ((1, 1, 9), 9, 9),
    ],
)
def test_fans_are_torch_s(shape, fan_in, fan_out):
    def expect(function, arguments, std):
        assert tobytes(function(torch.empty(shape), *arguments, seed=0)) == tobytes(
            gpuinit.normal(shape, std, seed=0, device="cpu")
        )

    assert nn.init._calculate_fan_in_and_fan_out(torch.empty(shape)) == (fan_in, fan_out)
    expect(init.xavier_normal_, (), math.sqrt(2 / (fan_in + fan_out)))
    expect(init.kaiming_normal_, (0, "fan_in", "linear"), 1 / math.sqrt(fan_in))
    expect(init.kaiming_normal_, (0, "fan_out", "linear"), 1 / math.sqrt(fan_out))


# Distributions


N_SHAPE = (128, 64, 4, 8)  # 2**18 elements, fans 2048 and 4096
SIGMAS = 6  # a false alarm once in 5e8 for a right sampler; the seeds are fixed


def worst_score(weights, mean, std, kurtosis):
    """Of mean and standard deviation, in standard errors from the exact ones."""
    x = weights.detach().double().numpy().ravel()
    mean_score = (x.mean() - mean) / (std / math.sqrt(x.size))
    variance_score = (np.mean((x - mean) ** 2) - std**2) / (std**2 * math.sqrt((kurtosis - 1) / x.size))
    return max(abs(mean_score), abs(variance_score))


def expect_moments(weights, mean, std, kurtosis):
    assert worst_score(weights, mean, std, kurtosis) < SIGMAS
    # The controls: 2 % of the standard deviation is 14 standard errors of it, and 10 of the mean.
    assert worst_score((weights - mean) * 1.02 + mean, mean, std, kurtosis) > SIGMAS
    assert worst_score(weights + 0.02 * std, mean, std, kurtosis) > SIGMAS


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_kaiming_has_the_gain_of_every_nonlinearity(nonlinearity, mode):
    slope = 0.3
    gain = nn.init.calculate_gain(nonlinearity, slope)
    std = gain / math.sqrt({"fan_in": 2048, "fan_out": 4096}[mode])
    arguments = (slope, mode, nonlinearity)
    normal = init.kaiming_normal_(torch.empty(N_SHAPE), *arguments, seed=0)
    expect_moments(normal, 0, std, 3)
    uniform = init.kaiming_uniform_(torch.empty(N_SHAPE), *arguments, seed=0)
    expect_moments(uniform, 0, std, 1.8)
    bound = float(np.float32(math.sqrt(3) * std))
    assert 0.9999 * bound < uniform.abs().max() <= bound
    assert normal.abs().max() > 4 * std  # not cut: a normal number is, once in 16000


@pytest.mark.parametrize("gain", [1.0, 0.2, math.sqrt(2), 5 / 3])
def test_xavier_has_its_gain(gain):
    std = xavier_std(2048, 4096, gain)
    normal = init.xavier_normal_(torch.empty(N_SHAPE), gain=gain, seed=0)
    expect_moments(normal, 0, std, 3)
    uniform = init.xavier_uniform_(torch.empty(N_SHAPE), gain=gain, seed=0)
    expect_moments(uniform, 0, std, 1.8)
    assert 0.9999 * math.sqrt(3) * std < uniform.abs().max() <= np.float32(math.sqrt(3) * std)
    assert normal.abs().max() > 4 * std


@pytest.mark.parametrize(("a", "b"), [(0, 1), (-3, 2), (5, 5.5), (-0.01, 0.01)])
def test_uniform_lies_between_a_and_b(a, b):
    weights = init.uniform_(torch.empty(N_SHAPE), a, b, seed=0)
    expect_moments(weights, (a + b) / 2, (b - a) / math.sqrt(12), 1.8)
    assert np.float32(a) <= weights.min() < a + (b - a) / 1000
    assert b - (b - a) / 1000 < weights.max() <= np.float32(b)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-3, 0.1), (0.5, 7)])
def test_normal_has_its_mean_and_std(mean, std):
    weights = init.normal_(torch.empty(N_SHAPE), mean, std, seed=0)
    expect_moments(weights, mean, std, 3)
    assert (weights - mean).abs().max() > 4 * std


def kolmogorov_smirnov(first, second):
    """The largest distance between two empirical distribution functions, in units of its scale."""
    n = len(first)
    steps = np.where(np.argsort(np.concatenate([first, second]), kind="stable") < n, 1, -1)
    return np.abs(np.cumsum(steps)).max() / n * math.sqrt(n / 2)


LIKE_TORCH = {
    "uniform_": (-2.0, 0.5),
    "normal_": (0.5, 2.0),
    "trunc_normal_": (0.5, 2.0, -1.0, 1.75),
    "trunc_normal_ off its mean": (0.0, 1.0, 1.5, 2.5),
    "trunc_normal_ that cuts nothing": (0.0, 0.02),
    "xavier_normal_": (1.5,),
    "xavier_uniform_": (1.5,),
    "kaiming_normal_": (0.2, "fan_out"),
    "kaiming_uniform_": (0.2, "fan_out"),
}


@pytest.mark.parametrize("case", LIKE_TORCH)
def test_the_distribution_is_torch_s_for_the_same_arguments(case):
    name, arguments = case.split()[0], LIKE_TORCH[case]
    ours = getattr(init, name)(torch.empty(N_SHAPE), *arguments, seed=0).numpy().ravel()
    generator = torch.Generator().manual_seed(0)
    theirs = getattr(nn.init, name)(torch.empty(N_SHAPE), *arguments, generator=generator).numpy().ravel()
    # n = 2**18; P(K > 2.3) = 2 exp(-2 * 2.3**2) = 5e-5
    assert kolmogorov_smirnov(ours, theirs) < 2.3
    middle = theirs.mean()
    assert kolmogorov_smirnov(ours, (theirs - middle) * 1.05 + middle) > 2.3
    assert kolmogorov_smirnov(ours, theirs + 0.05 * theirs.std()) > 2.3


# Bounds of trunc_normal_


@pytest.mark.parametrize(("mean", "std", "a", "b"), [(0, 1, -2, 2), (0.9, 0.3, 0, 1), (0.1, 0.02, 0.1, 0.13)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_beyond_a_or_b(dtype, mean, std, a, b):
    weights = init.trunc_normal_(torch.empty(N_SHAPE, dtype=getattr(torch, dtype)), mean, std, a, b, seed=0)
    low, high = (torch.tensor(end, dtype=weights.dtype) for end in (a, b))  # as torch compares
    assert low <= weights.min() < a + 0.05 * (b - a) + 0.001 * (mean == 0.9)
    assert b - 0.05 * (b - a) < weights.max() <= high


def random_bounds(count):
    draw = random.Random(0)
    for _ in range(count):
        mean, std = draw.choice([0.0, draw.uniform(-3, 3)]), 10 ** draw.uniform(-3, 1)
        yield mean, std, mean + std * draw.uniform(-5, 4), draw.randint(4, 40)


def test_bounds_of_a_few_float64_apart_hold_every_weight():
    """So near that a bound which is rounded to standard deviations and back would show, wherever it lies."""
    tensor = torch.empty(50, dtype=torch.float64)
    for mean, std, a, steps in random_bounds(300):
        b = a + steps * max(math.ulp(a), std * 2**-50)
        weights = init.trunc_normal_(tensor, mean, std, a, b, seed=0)
        assert a <= weights.min() <= weights.max() <= b


def test_bounds_are_rounded_inwards_by_less_than_one_step():
    draw = random.Random(1)
    for _ in range(2000):
        mean, std, bound = draw.uniform(-3, 3), 10 ** draw.uniform(-3, 3), draw.uniform(-9, 9)
        for inwards in (math.inf, -math.inf):
            x = init.deviations(bound, mean, std, inwards)
            error = (Fraction(x) * Fraction(std) + Fraction(mean) - Fraction(bound)) / Fraction(std)
            assert 0 <= error * int(math.copysign(1, inwards)) <= math.ulp(x)
    assert init.deviations(math.inf, 0.0, 1.0, -math.inf) == math.inf
    assert init.deviations(-1e300, 0.0, 1e-300, math.inf) == -math.inf


# Generators


def test_the_same_state_of_a_generator_gives_the_same_weights():
    def made(state, function, *arguments):
        generator = torch.Generator().manual_seed(state)
        return [tobytes(function(torch.empty(6, 6), *arguments, generator)) for _ in range(2)]

    for name, arguments in {
        "uniform_": (0, 1),
        "normal_": (0, 1),
        "trunc_normal_": (0, 1, -2, 2),
        "xavier_normal_": (1,),
        "xavier_uniform_": (1,),
        "kaiming_normal_": (0, "fan_in", "relu"),
        "kaiming_uniform_": (0, "fan_in", "relu"),
    }.items():
        torch.manual_seed(8)
        before = torch.get_rng_state()
        first, second = made(7, getattr(init, name), *arguments)
        assert [first, second] == made(7, getattr(init, name), *arguments)
        assert first not in made(8, getattr(init, name), *arguments)
        assert first != second
        assert torch.equal(before, torch.get_rng_state())
        assert tobytes(getattr(init, name)(torch.empty(6, 6), *arguments)) != first
        torch.manual_seed(7)
        assert tobytes(getattr(init, name)(torch.empty(6, 6), *arguments)) == first


def test_a_generator_of_another_device_is_asked_there(monkeypatch):
    asked = []

    class Elsewhere:
        device = torch.device("cuda", 1)

    def randint(*arguments, generator, **words):
        asked.append((words.pop("device"), generator))
        return torch.tensor([3, 4])

    monkeypatch.setattr(torch, "randint", randint)
    generator = Elsewhere()
    assert fill.draw_seed(generator) == 3 + (4 << 32)
    fill.draw_seed()
    assert asked == [(torch.device("cuda", 1), generator), ("cpu", None)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch built for it")
def test_a_generator_of_a_gpu():
    """On a real device, for a tensor of the CPU too."""
    generator = torch.Generator("cuda").manual_seed(7)
    first, second = (tobytes(init.normal_(torch.empty(40), generator=generator)) for _ in range(2))
    generator.manual_seed(7)
    assert first == tobytes(init.normal_(torch.empty(40), generator=generator)) != second


def test_a_seed_leaves_the_generators_alone():
    before = torch.get_rng_state()
    init.normal_(torch.empty(40), seed=0)
    assert torch.equal(before, torch.get_rng_state())


# Tensors


@pytest.mark.parametrize("name", DRAWING)
def test_a_parameter_is_filled_and_records_nothing(name):
    weight = nn.Parameter(torch.zeros(3, 4))
    version = weight._version
    assert getattr(init, name)(weight) is weight
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight._version > version
    assert weight.detach().count_nonzero() > 6


@pytest.mark.parametrize("name", DRAWING)
def test_meta_tensors_are_left_alone(name):
    state, tensor = torch.get_rng_state(), torch.empty(3, 4, device="meta")
    assert getattr(init, name)(tensor) is tensor
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0, 3), (0, 0)])
@pytest.mark.parametrize("name", DRAWING)
def test_zero_elements_are_left_alone(name, shape):
    state, tensor = torch.get_rng_state(), torch.empty(shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(init, name)(tensor) is tensor
    assert torch.equal(state, torch.get_rng_state())
    messages = [str(warning.message) for warning in caught]
    assert messages == ["Initializing zero-element tensors is a no-op"] * name.startswith("kaiming")
    assert {warning.filename for warning in caught} <= {__file__}


def outcome(function, shape):
    """What a function does to a tensor of this shape: the error, or the warnings and whether it drew."""
    state, tensor = torch.get_rng_state(), torch.empty(shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            returned = function(tensor, *[1.0] * (function.__name__ == "constant_"))
        except (ArithmeticError, ValueError) as error:
            return type(error)
    drew = not torch.equal(state, torch.get_rng_state())
    return [str(warning.message) for warning in caught], returned is tensor, drew


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0), (3, 0, 2), (2, 0, 0, 3), (), (4,)], ids=str)
@pytest.mark.parametrize("name", [name for name in init.__all__ if name.endswith("_")])
def test_what_torch_does_without_elements_or_axes_is_done_here(name, shape):
    expected = outcome(getattr(nn.init, name), shape)
    if expected is ZeroDivisionError:  # of xavier, where both fans are 0, which is no mistake
        expected = [], True, False
    assert outcome(getattr(init, name), shape) == expected


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_zero_elements_of_one_axis_have_no_fans_and_need_none():
    init.kaiming_normal_(torch.empty(0))
    with pytest.raises(ValueError, match="mode must be"):
        init.kaiming_normal_(torch.empty(0), mode="fan")


ERRORS = [
    ("uniform_", (2.0, 1.0), {}, ValueError, r"b must be at least a, got a 2\.0 and b 1\.0"),
    ("uniform_", (None, 1.0), {}, TypeError, "a must be a finite number, got None"),
    ("uniform_", (0.0, math.inf), {}, ValueError, "b must be a finite number, got inf"),
    ("normal_", (0.0, -1.0), {}, ValueError, r"std must be a finite number >= 0, got -1\.0"),
    ("normal_", (math.nan,), {}, ValueError, "mean must be a finite number, got nan"),
    ("normal_", ("0",), {}, TypeError, "mean must be a finite number, got '0'"),
    ("normal_", (), {"seed": -1}, ValueError, "seed must be .*, got -1"),
    ("normal_", (), {"name": 3}, TypeError, "name must be .*, got 3"),
    ("normal_", (), {"generator": 3}, TypeError, r"generator must be None or a torch\.Generator, got 3"),
    (
        "normal_",
        (),
        {"generator": torch.Generator(), "seed": 0},
        ValueError,
        "generator must be None where a seed is given, got <torch",
    ),
    ("trunc_normal_", (0, -1), {}, ValueError, "std must be a finite number >= 0, got -1"),
    ("trunc_normal_", (0, 1, 2, 1), {}, ValueError, "b must be at least a, got a 2 and b 1"),
    ("trunc_normal_", (0, 1, math.nan), {}, ValueError, "a must be a number, got nan"),
    ("trunc_normal_", (math.inf,), {}, ValueError, "mean must be a finite number, got inf"),
    (
        "trunc_normal_",
        (0, 0.5, 6, 7),
        {},
        ValueError,
        r"a and b must suit mean and std: .* got lower 12\.0 and",
    ),
    (
        "trunc_normal_",
        (0, 1, 0, 5e-324),
        {},
        ValueError,
        "a and b must suit mean and std: .*further apart, got",
    ),
    ("trunc_normal_", (0, 1, math.inf, math.inf), {}, ValueError, "cut at a and b, must be .* got inf"),
    ("trunc_normal_", (1e39, 0.0, 0, 2e39), {}, ValueError, r"mean must leave .* float32, got mean 1e\+39"),
    ("xavier_normal_", (-1,), {}, ValueError, "gain must be a finite number >= 0, got -1"),
    ("xavier_uniform_", (-1,), {}, ValueError, "gain must be a finite number >= 0, got -1"),
    (
        "xavier_normal_",
        (1e39,),
        {},
        ValueError,
        r"gain must leave the weights finite in float32, got gain 1e\+39",
    ),
    ("xavier_uniform_", (1e39,), {}, ValueError, r"gain must leave .* finite in float32, got gain 1e\+39"),
    ("xavier_normal_", (1e-46,), {}, ValueError, "gain must leave weights other than 0 .*, got gain 1e-46"),
    (
        "xavier_uniform_",
        (5e-324,),
        {},
        ValueError,
        "gain must leave weights other than 0 .*, got gain 5e-324",
    ),
    (
        "kaiming_normal_",
        (1e150,),
        {},
        ValueError,
        "gain must leave weights other than 0 .* float32, .*, got gain",
    ),
    ("normal_", (0, 1e-46), {}, ValueError, "std must leave weights other than 0 .*, got std 1e-46"),
    ("trunc_normal_", (0, 1e-46), {}, ValueError, "std must leave weights other than 0 .*, got std 1e-46"),
    ("uniform_", (0, 1e-46), {}, ValueError, "b must leave weights other than 0 .*, got b 1e-46"),
    (
        "kaiming_normal_",
        (),
        {"mode": "fan_avg"},
        ValueError,
        "mode must be one of fan_in, fan_out, got 'fan_avg'",
    ),
    ("kaiming_normal_", (), {"mode": 1}, ValueError, "mode must be one of fan_in, fan_out, got 1"),
    ("kaiming_normal_", ("x",), {}, TypeError, "a must be a finite number, got 'x'"),
    (
        "kaiming_uniform_",
        (),
        {"nonlinearity": "gelu"},
        ValueError,
        "nonlinearity and a must .*, got 'gelu' and 0",
    ),
    ("kaiming_uniform_", (1e200,), {}, ValueError, r"a must suit .*, got 'leaky_relu' and 1e\+200"),
]


@pytest.mark.parametrize(("name", "arguments", "words", "error", "message"), ERRORS)
def test_arguments_are_checked_before_anything_is_written(name, arguments, words, error, message):
    state = torch.get_rng_state()
    for tensor in (torch.full((3, 4), 9.0), torch.empty(3, 4, device="meta")):
        with pytest.raises(error, match=message):
            getattr(init, name)(tensor, *arguments, **words)
        assert tensor.is_meta or (tensor == 9).all()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_no_width_is_0_and_not_minus_0(dtype):
    for zero in (
        partial(init.xavier_uniform_, gain=0),
        partial(init.xavier_normal_, gain=0),
        partial(init.uniform_, a=-0.0, b=-0.0),
        partial(init.normal_, std=0),
        partial(init.trunc_normal_, mean=-0.0, std=0),
        partial(init.trunc_normal_, a=-0.0, b=-0.0),
    ):
        made = zero(torch.full((5, 7), 9, dtype=dtype), seed=1)
        assert not made.any()
        assert not made.signbit().any()
    with pytest.raises(ValueError, match="gain must leave weights other than 0 in float64"):
        init.xavier_uniform_(torch.empty(30, 40, dtype=torch.float64), 5e-324)  # whose bound is 0


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("name", [name for name in DRAWING if name.startswith(("xavier", "kaiming"))])
def test_fans_need_two_axes(name, shape):
    with pytest.raises(ValueError, match=r"tensor must have 2 or more axes, for its fans, got shape \("):
        getattr(init, name)(torch.empty(shape))
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):  # as in torch
        getattr(nn.init, name)(torch.empty(shape))


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_no_tensor_of_weights_is_refused(name):
    with pytest.raises(TypeError, match=r"tensor must be a torch\.Tensor, got list"):
        getattr(init, name)([1.0])
    with pytest.raises(TypeError, match=r"tensor must have dtype .*, got torch\.int32"):
        getattr(init, name)(torch.zeros(3, 3, dtype=torch.int32))


# Rules


def test_the_functions_are_rules_of_a_model():
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 6, 3), nn.Embedding(5, 7), nn.Linear(6, 6))
    rules = [
        ("0.weight", partial(init.trunc_normal_, std=0.02)),
        ("1.weight", init.kaiming_uniform_),
        ("2.weight", partial(init.uniform_, a=-1.0, b=3.0)),
        ("3.weight", partial(init.xavier_normal_, gain=2.0)),
        ("*.bias", init.zeros_),
    ]
    report = gt.initialize_(model, seed=3, rules=rules)
    assert [(row.name, row.rule, row.std) for row in report] == [
        ("0.weight", "trunc_normal_(std=0.02)", pytest.approx(0.02)),
        ("0.bias", "zeros_", 0),
        ("1.weight", "kaiming_uniform_", pytest.approx(math.sqrt(2 / 36))),
        ("1.bias", "zeros_", 0),
        ("2.weight", "uniform_(a=-1, b=3)", pytest.approx(4 / math.sqrt(12))),
        ("3.weight", "xavier_normal_(gain=2)", pytest.approx(2 / math.sqrt(6))),
        ("3.bias", "zeros_", 0),
    ]
    expected = init.trunc_normal_(torch.empty(6, 8), std=0.02, seed=3, name="0.weight")
    assert tobytes(model[0].weight) == tobytes(expected)
    assert tobytes(model[1].weight) == tobytes(
        init.kaiming_uniform_(torch.empty(6, 4, 3, 3), seed=3, name="1.weight")
    )


def test_the_report_has_the_std_of_what_is_cut_and_shifted():
    """By the weights themselves: 2**18 of them, whose standard error is 0.14 % of it and less."""
    for rule in (
        partial(init.trunc_normal_, mean=0.5, std=2.0, a=-1.0, b=1.75),
        partial(gt.truncated_normal_, stddev=0.5, mean=2.0, lower=-1.0, upper=2.5),
        partial(gt.normal_, stddev=0.5, mean=2.0),
        partial(gt.uniform_, a=1.0, b=4.0),
    ):
        model = nn.Linear(512, 512, bias=False)
        (row,) = gt.initialize_(model, rules=[("*", rule)])
        assert row.std == pytest.approx(model.weight.std().item(), rel=SIGMAS * 0.0014)


def test_a_slope_of_none_is_torchs_own_default():
    tensor = torch.empty(64, 32)
    expected = init.kaiming_normal_(tensor.clone(), 0.01, seed=1)
    assert torch.equal(init.kaiming_normal_(tensor, None, seed=1), expected)
