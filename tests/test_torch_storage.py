"""Tensors whose memory is not their values, or not there: an error at every door, or the right weights."""

from __future__ import annotations

import enum
import inspect
import itertools
import random
from functools import partial

import numpy as np
import pytest

import gpuinit

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode  # noqa: E402
from torch.nn.utils import prune  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit import tensors  # noqa: E402

FILLS = [getattr(gt, name) for name in gt.__all__ if name.endswith("_") and name != "initialize_"]
FILLS += [getattr(gt.init, name) for name in gt.init.__all__]
FILLS = [partial(fill, seed=0) for fill in FILLS if "seed" in inspect.signature(fill).parameters]
CORE = [getattr(gpuinit, name) for name in gpuinit.__all__ if name != "FallbackWarning"]


def into(function, tensor):
    return function(tuple(tensor.shape), seed=0, out=tensor)


# Every way to a tensor's memory.
DOORS = [*FILLS, *(partial(into, function) for function in CORE)]
TWO = [partial(gt.he_normal_, seed=0), partial(into, gpuinit.he_normal)]


def test_all_doors_are_here():
    assert (len(FILLS), len(CORE)) == (17, 10)


# No memory


def resized(tensor, size):
    tensor.untyped_storage().resize_(size)
    return tensor


MISSING = {
    "freed": (lambda: resized(torch.ones(3, 4), 0), "got 0 of 48 bytes"),
    "a parameter": (lambda: resized(torch.ones(3, 4), 0).requires_grad_(), "got 0 of 48 bytes"),
    "one byte short": (lambda: resized(torch.ones(3, 4), 47), "got 47 of 48 bytes"),
    "a part that is beyond": (lambda: resized(torch.ones(5, 4)[2:], 79), "got 79 of 80 bytes"),
    "bfloat16": (lambda: resized(torch.ones(3, 4, dtype=torch.bfloat16), 0), "got 0 of 24 bytes"),
    "zeros that are nowhere": (lambda: torch._efficientzerotensor(3, 4), "got 0 of 48 bytes"),
    "with gaps": (lambda: resized(torch.ones(3, 8)[:, :4], 76), "got 76 of 80 bytes"),
}


@pytest.mark.parametrize("door", range(len(DOORS)))
@pytest.mark.parametrize("kind", MISSING)
def test_memory_that_is_not_there_is_an_error(kind, door):
    make, got = MISSING[kind]
    tensor = make()
    if DOORS[door].func is into:
        tensor = tensor.detach()
    with pytest.raises(ValueError, match=rf"^(tensor|out) must have memory for its elements; .*, {got}$"):
        DOORS[door](tensor)


@pytest.mark.parametrize("fill", TWO)
def test_memory_that_suffices_is_filled(fill):
    expected = tobytes(fill(torch.empty(3, 4)))
    assert tobytes(fill(resized(torch.empty(5, 4)[2:], 80))) == expected
    assert fill(resized(torch.empty(0, 4), 0)).shape == (0, 4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_model_with_memory_missing_keeps_what_it_has(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = [tobytes(parameter) for parameter in model[0].parameters()]
    resized(getattr(model[1], name), 0)
    with pytest.raises(
        ValueError, match=rf"(?s)^tensor must have memory .*This is parameter 1\.{name}, of a Linear"
    ):
        gt.initialize_(model)
    assert [tobytes(parameter) for parameter in model[0].parameters()] == before


@pytest.mark.parametrize(
    "draw", [nn.init.normal_, nn.init.trunc_normal_, lambda weight: weight.data.bernoulli_(0.5)]
)
def test_a_recipe_on_memory_that_is_missing_is_an_error(draw):
    layer = nn.Linear(3, 4)
    with gt.streams(layer):
        resized(layer.weight, 0)  # after the door, which would refuse it
        with pytest.raises(ValueError, match=r"^tensor must have memory .*, got 0 of 48"):
            draw(layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", TWO)
def test_storage_can_still_be_freed_after_a_fill(fill, dtype):
    """FSDP does; the NumPy array that torch itself hands out bars it for ever."""
    tensor = fill(torch.empty(3, 4, dtype=dtype))
    expected = tobytes(tensor.clone())
    assert tobytes(fill(resized(resized(tensor, 0), 12 * tensor.element_size())).clone()) == expected
    resized(tensor, 0)


# ZeRO-3


class ZeroParamStatus(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(parameter):
    """What DeepSpeed's ZeRO-3 leaves of a parameter on a rank."""
    parameter.ds_shape, parameter.ds_numel, parameter.ds_id = parameter.shape, parameter.numel(), 0
    parameter.ds_tensor = parameter.detach().flatten().clone()
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    return parameter


def gather(parameter):
    parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
    parameter.ds_status = ZeroParamStatus.AVAILABLE


@pytest.mark.parametrize("door", range(len(DOORS)))
def test_a_placeholder_is_refused_with_what_to_do(door):
    parameter = partition(nn.Linear(3, 4).weight.requires_grad_(DOORS[door].func is not into))
    message = (
        r"^(tensor|out) must hold the whole parameter; .*zero\.GatheredParameters\(.*\(0,\) for \(4, 3\)$"
    )
    with pytest.raises(ValueError, match=message):
        DOORS[door](parameter)


LAYERS = {
    "Linear": lambda: nn.Linear(3, 4),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "Embedding": lambda: nn.Embedding(5, 3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(5, 3),
    "LayerNorm": lambda: nn.LayerNorm((3, 4)),
    "RMSNorm": lambda: nn.RMSNorm(3),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "PReLU": lambda: nn.PReLU(3),
    "LSTM": lambda: nn.LSTM(3, 4),
    "GRUCell": lambda: nn.GRUCell(3, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
}


@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_of_placeholders_is_refused_before_anything_is_written(kind, attributes):
    for i, (name, _) in enumerate(LAYERS[kind]().named_parameters()):
        model = nn.Sequential(nn.Linear(2, 2), LAYERS[kind]())
        before = tobytes(model[0].weight)
        parameter = list(model[1].parameters())[i]
        if attributes:
            partition(parameter)
        else:
            parameter.data = torch.empty(0)
        with pytest.raises(
            ValueError, match=rf"(?s) whole parameters?; .*GatheredParameters.*\(0,\).*parameter 1\.{name},"
        ):
            gt.initialize_(model)
        assert tobytes(model[0].weight) == before


def freed(layer):
    for parameter in layer.parameters():
        resized(parameter, 0)
    return layer


def placeholders(layer, attributes=False):
    for parameter in layer.parameters():
        if attributes:
            parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    return layer


def own_recipe(model):
    gt.initialize_(model, recipe="own")


def function_of_the_model(model):
    gt.initialize_(model, recipe=lambda model: None)


def block(model):
    with gt.streams(model):
        pass


@pytest.mark.parametrize("door", [own_recipe, function_of_the_model, block])
@pytest.mark.parametrize("spoil", [freed, placeholders, partial(placeholders, attributes=True)])
@pytest.mark.parametrize("kind", ["Linear", "LayerNorm", "Embedding", "weight norm"])
def test_a_recipe_is_not_run_on_parameters_without_memory(kind, spoil, door):
    """torch's own functions would write to address 0, or fill a placeholder that is thrown away."""
    with pytest.raises(ValueError, match=r"(?s)memory for its elements|whole parameter.*This is parameter"):
        door(spoil(LAYERS[kind]()))


def test_a_frozen_parameter_without_memory_is_left_alone_by_a_recipe():
    model = nn.Sequential(nn.Linear(3, 4), freed(nn.Linear(3, 4)).requires_grad_(False))
    report = gt.initialize_(model, recipe=lambda model: model[0].reset_parameters())
    assert [row.written for row in report] == ["whole", "whole", "frozen", "frozen"]


def test_a_marker_of_none_in_a_layer_of_torch_s_is_no_placeholder():
    class Marked(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.dummy = nn.Parameter(torch.empty(0))

    rules = [("dummy", nn.init.zeros_), *gt.DEFAULT_RULES]
    assert all(row.written == "whole" for row in gt.initialize_(Marked(), rules=rules))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_without_its_sizes_is_no_placeholder():
    class Bare(nn.Linear):
        def __init__(self):
            nn.Module.__init__(self)
            self.weight, self.bias = nn.Parameter(torch.empty(0)), None

    assert gt.initialize_(Bare(), rules=[("*", nn.init.zeros_)])[0].written == "whole"


def test_gathered_parameters_are_filled():
    ours, theirs = nn.Linear(3, 4), nn.Linear(3, 4)
    gt.initialize_(ours)
    for parameter in theirs.parameters():
        gather(partition(parameter))
    gt.initialize_(theirs)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(0, 3),
        lambda: nn.Linear(3, 0),
        lambda: nn.Linear(0, 0),
        lambda: nn.Embedding(0, 3),
        lambda: nn.LayerNorm((0,)),
        lambda: nn.LayerNorm((3, 0)),
        lambda: nn.Conv1d(0, 0, 3, groups=1),
        lambda: nn.BatchNorm1d(0),
    ],
)
def test_layers_that_are_empty_by_themselves_are_no_placeholders(make):
    assert all(row.written == "whole" for row in gt.initialize_(make()))
    layer = make()
    for parameter in layer.parameters():
        if not parameter.numel():
            partition(parameter)
    assert gt.initialize_(layer)


def test_a_vector_of_none_in_a_module_of_the_user_is_no_placeholder():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(0))

    assert gt.initialize_(Own(), rules=[("*", gt.he_normal_)])[0].written == "whole"
    assert gt.he_normal_(torch.empty(0), seed=0).shape == (0,)


# What is computed anew


def called(layer):
    layer(torch.ones(2, 3))
    return layer


RECOMPUTED = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 4)), "weight_g and weight_v"),
    "spectral_norm": (lambda: called(nn.utils.spectral_norm(nn.Linear(3, 4))), "weight_orig"),
    "the new weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        "parametrizations.weight.original",
    ),
    "the new spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        "parametrizations.weight.original",
    ),
    "orthogonal": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 4)),
        "parametrizations.weight.original",
    ),
    "a parametrisation that is a view": (
        lambda: parametrized(lambda weight: (weight * 2).T.T),
        "parametrizations.weight.original",
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5), "weight_orig"),
}


def parametrized(forward):
    class Own(nn.Module):
        def forward(self, weight):
            return forward(weight)

    layer = nn.Linear(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Own())
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("fill", range(len(FILLS)))
@pytest.mark.parametrize("kind", RECOMPUTED)
def test_a_weight_that_is_computed_anew_is_refused(kind, fill):
    make, names = RECOMPUTED[kind]
    layer = make()
    before = [tobytes(parameter) for parameter in layer.parameters()]
    for weight in (layer.weight, layer.weight[1:], layer.weight.T):
        held = tobytes(weight)
        with pytest.raises(
            ValueError, match=rf"^tensor must be a leaf or .*{names}.*, got the result of \w+Backward"
        ):
            FILLS[fill](weight)
        assert tobytes(weight) == held
    assert [tobytes(parameter) for parameter in layer.parameters()] == before


@pytest.mark.parametrize("fill", range(len(FILLS)))
def test_leaves_and_views_of_them_are_filled(fill):
    layer = nn.Linear(3, 4)
    expected = tobytes(FILLS[fill](torch.empty(3, 4)))
    plain = (torch.ones(3, 4) * 2, torch.ones(3, 4).clone()[:], nn.Parameter(torch.ones(3, 4), False))
    for tensor in (layer.weight.T, layer.weight[:].T, layer.weight.detach().T, layer.weight.data.T, *plain):
        assert tobytes(FILLS[fill](tensor)) == expected
        tensor.detach().zero_()
    with torch.no_grad():
        assert tobytes(FILLS[fill](layer.weight.T)) == expected
    assert tobytes(layer.weight.T) == expected


# Values that are not what the memory holds


def functional():
    return torch._to_functional_tensor(torch.zeros(3, 4))


def functional_by_class():
    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(torch.zeros(3, 4))


class Doubled(torch.Tensor):
    """Its values are twice what another tensor holds; it has no memory."""

    @staticmethod
    def __new__(cls, half):
        made = torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)
        made.half = half
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


class Logged(torch.Tensor):
    """Its operations are told, its values are what its own memory holds."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


def masked():
    return torch.masked.masked_tensor(torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool))


def fake():
    with FakeTensorMode():
        return torch.empty(3, 4)


ELSEWHERE = {
    "functional": (functional, RuntimeError),
    "functional by its class": (functional_by_class, TypeError),
    "a class with operations of its own": (lambda: Doubled(torch.zeros(3, 4)), TypeError),
    "masked": (masked, TypeError),
    "sparse": (lambda: torch.zeros(3, 4).to_sparse(), TypeError),
    "csr": (lambda: torch.zeros(3, 4).to_sparse_csr(), TypeError),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(4)] * 3), TypeError),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(4)] * 3, layout=torch.jagged), TypeError),
    "mkldnn": (lambda: torch.zeros(3, 4).to_mkldnn(), TypeError),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(3, 4), 0.1, 0, torch.qint8), TypeError),
    "complex": (lambda: torch.zeros(3, 4, dtype=torch.complex64).conj(), (TypeError, ValueError)),
    "float8": (lambda: torch.zeros(3, 4).to(torch.float8_e4m3fn), (TypeError, ValueError)),
}
NOT_AS_OUT = {
    "fake": (fake, TypeError, "memory of its own"),
    "meta": (lambda: torch.empty(3, 4, device="meta"), TypeError, "memory of its own"),
    "negated": (
        lambda: torch._neg_view(torch.empty(3, 4)),
        ValueError,
        "gpuinit.torch, got a view that nega",
    ),
    "conjugated": (lambda: torch.empty(3, 4, dtype=torch.complex64).conj().imag, ValueError, "that negates"),
    "a parameter": (lambda: nn.Linear(4, 3).weight, TypeError, "gpuinit.torch, or give out.detach()"),
    "computed": (lambda: nn.Linear(4, 3).weight * 2, TypeError, "not require grad"),
    "expanded": (lambda: torch.empty(1, 4).expand(3, 4), ValueError, "be C-contiguous"),
    "transposed": (lambda: torch.empty(4, 3, dtype=torch.bfloat16).T, ValueError, "be C-contiguous"),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
@pytest.mark.parametrize("door", range(2))
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_values_that_are_elsewhere_are_refused(kind, door):
    make, error = ELSEWHERE[kind]
    with pytest.raises(error, match=r"^(tensor|out) must .*, got "):
        partial(TWO[door])(make()) if door == 0 else gpuinit.he_normal((3, 4), seed=0, out=make())


@pytest.mark.parametrize("fill", TWO)
def test_memory_that_a_class_has_of_its_own_is_filled(fill):
    memory = torch.zeros(3, 4)
    for shape in ((3, 4), (0, 4)):
        fill(torch.zeros(shape).as_subclass(Logged))
    fill(memory.as_subclass(Logged))
    assert tobytes(memory) == tobytes(fill(torch.empty(3, 4)))


def test_a_caller_s_own_rule_fills_a_parameter_of_any_class():
    model = nn.Module()
    model.weight = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    gt.initialize_(model, rules=[("*", nn.init.ones_)])
    assert model.weight.a.tolist() == model.weight.b.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", NOT_AS_OUT)
def test_what_the_core_cannot_write_is_refused_and_kept(kind):
    make, error, message = NOT_AS_OUT[kind]
    out = make()
    held = None if kind in ("fake", "meta") else tobytes(out)
    for function in CORE:
        with pytest.raises(error, match=rf"^out must .*{message}"):
            function((3, 4), seed=0, out=out)
    assert held is None or tobytes(out) == held


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(3, 4), (), (7,), (0, 3)])
def test_out_may_be_a_tensor_of_every_dtype(dtype, shape):
    out = torch.empty(shape, dtype=getattr(torch, dtype))
    assert gpuinit.he_normal(shape, seed=3, out=out) is out
    assert tobytes(out) == gpuinit.he_normal(shape, seed=3, dtype=dtype, device="cpu").tobytes()
    with torch.inference_mode():
        inside = gpuinit.he_normal(shape, seed=3, out=torch.empty_like(out))
    assert tobytes(inside) == tobytes(out)


@pytest.mark.parametrize("fill", TWO)
def test_a_copy_that_is_put_off_is_made(fill):
    """Copy on write: the other tensor keeps its values."""
    first = torch.zeros(3, 4)
    second = torch._lazy_clone(first)
    assert tobytes(fill(second)) == tobytes(fill(torch.empty(3, 4)))
    assert not first.any()


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("fill", TWO)
def test_a_real_tensor_where_all_is_faked_is_an_error(fill, allow):
    tensor = torch.zeros(3, 4)
    with (
        FakeTensorMode(allow_non_fake_inputs=allow),
        pytest.raises(
            RuntimeError, match=r"^(tensor|out) must be filled outside of a FakeTensorMode, .*, got"
        ),
    ):
        fill(tensor)
    assert not tensor.any()


# Elements that share memory


def test_overlap_is_found_exactly():
    draw, base, counts = random.Random(0), torch.empty(1000), [0, 0]
    for _ in range(3000):
        shape = [draw.randint(0, 5) for _ in range(draw.randint(0, 4))]
        strides = [draw.randint(0, 12) for _ in shape]
        places = [
            sum(i * stride for i, stride in zip(index, strides, strict=True))
            for index in itertools.product(*map(range, shape))
        ]
        expected = len(set(places)) < len(places)
        assert tensors.overlaps(base.as_strided(shape, strides)) == expected, (shape, strides)
        counts[expected] += 1
    assert min(counts) > 500


def test_overlap_of_large_tensors_is_found_without_their_memory():
    vast = torch.empty(1, device="meta")
    assert not tensors.overlaps(vast.as_strided((2**20, 2**19), (3, 2**22 + 1)))
    assert not tensors.overlaps(vast.as_strided((2**20, 2**19), (3, 2**21)))  # 3 and 2**21 have no factor
    assert tensors.overlaps(vast.as_strided((2**20, 2**19), (3, 3 * 2**19)))
    assert tensors.overlaps(vast.expand(2**40))


@pytest.mark.parametrize("fill", range(len(FILLS)))
def test_elements_between_each_other_are_filled(fill):
    memory = torch.full((9,), 9.0)
    tensor = FILLS[fill](memory.as_strided((2, 3), (3, 2), 1))
    assert tobytes(tensor) == tobytes(FILLS[fill](torch.empty(2, 3)))
    untouched = np.ones(9, bool)
    untouched[[1, 3, 5, 4, 6, 8]] = False
    assert (memory.numpy()[untouched] == 9).all()


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("word", ["seed", "stddev", "shape", "index", "dtype"])
def test_a_nested_tensor_is_no_number(word, layout):
    nested = torch.nested.nested_tensor([torch.ones(4)] * 3, layout=layout)
    with pytest.raises(TypeError, match=rf"^{word} must .*, got "):
        gpuinit.normal(**{"shape": (3,), "seed": 0, "device": "cpu", word: nested})
