"""gpuinit.torch.streams: a recipe's own draws, each from the stream of the parameter that it reaches."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

from torch import nn  # noqa: E402
from torch_devices import tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit.torch import streams as module_of_streams  # noqa: E402, F401
from gpuinit.torch.streams import KNOWN, find_sample  # noqa: E402

SHAPE = (6, 8)


def model(**tensors):
    """A module of parameters; those that are shapes are empty, and poisoned."""
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_parameter(
            name, nn.Parameter(torch.full(tensor, 77.0)) if isinstance(tensor, tuple) else tensor
        )
    return made


def normal(shape, name, mean=0.0, std=1.0, dtype=None):
    return gt.init.normal_(torch.empty(shape, dtype=dtype), mean, std, seed=0, name=name)


def run(made, recipe, seed=0):
    """The report; torch's generator must not have moved."""
    before = torch.get_rng_state()
    with gt.streams(made, seed) as report, torch.no_grad():
        recipe(made)
    assert torch.equal(torch.get_rng_state(), before)
    return report


def row(report, name="w"):
    (found,) = [row for row in report if row.name == name]
    return found


# The block


def test_a_function_is_decorated():
    made = model(w=SHAPE)
    block = gt.streams(made, 0)

    @block
    def recipe(depth=0):
        with torch.no_grad():
            made.w.normal_()
        if depth:
            recipe()

    for _ in range(2):
        made.w.data.zero_()
        recipe()
        assert tobytes(made.w) == tobytes(normal(SHAPE, "w"))
    with pytest.raises(ValueError, match="a block in a block"):
        recipe(1)
    recipe()


def test_a_block_within_itself_leaves_the_outer_one_as_it_is():
    made = model(w=SHAPE)
    block = gt.streams(made, 0)
    with block as report:
        with pytest.raises(ValueError, match="a block in a block"):
            block.__enter__()
        with torch.no_grad():
            made.w.normal_()
    assert row(report).written == "whole"


def test_a_block_that_was_not_entered_is_not_left():
    block = gt.streams(model(w=SHAPE))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^streams must be entered before .*, got __exit__ alone$"):
            block.__exit__(None, None, None)
        with block:
            pass


# On a parameter


def slices(made):
    made.w[2:4].normal_()
    made.w[4:].normal_()
    made.w[:2].normal_()


def columns(made):
    made.w[:, 1::2].normal_()
    made.w[:, ::2].normal_()


def in_inference_mode(made):
    with torch.inference_mode():
        made.w.normal_()


@torch.jit.ignore
def scripted(made):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its compiler
        torch.jit.script(draw_in_script)(made.w)


def draw_in_script(w: torch.Tensor):
    w.normal_(0.0, 1.0)


def compiled(backend):
    def recipe(made):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda w: w.normal_(), backend=backend)(made.w)

    return recipe


WHOLE = {
    "normal_": lambda made: made.w.normal_(),
    "nn.init": lambda made: nn.init.normal_(made.w),
    "data": lambda made: made.w.data.normal_(),
    "detached": lambda made: made.w.detach().normal_(),
    "transposed": lambda made: made.w.t().normal_(),
    "flattened": lambda made: made.w.view(-1).normal_(),
    "reshaped": lambda made: made.w.view(2, 3, 4, 2).permute(3, 0, 2, 1).normal_(),
    "slices": slices,
    "columns": columns,
    "rows": lambda made: [part.normal_() for part in made.w],
    "chunks": lambda made: [part.normal_() for part in made.w.chunk(3, 1)],
    "a generator": lambda made: made.w.normal_(generator=torch.Generator().manual_seed(4)),
    "out of randn": lambda made: torch.randn(SHAPE, out=made.w.detach()),
    "out of normal": lambda made: torch.normal(0.0, 1.0, SHAPE, out=made.w.detach()),
    "twice": lambda made: (made.w.normal_(), made.w.normal_()),
    "after other draws": lambda made: (torch.randn(5), made.w.uniform_(), made.w.normal_()),
    "inference mode": in_inference_mode,
    "script": scripted,
    "compiled, eager": compiled("eager"),
    "compiled, aot_eager": compiled("aot_eager"),
    "gpuinit's own without a seed": lambda made: gt.normal_(made.w, 1.0),
    "gpuinit's own with a generator": lambda made: gt.init.normal_(made.w, generator=torch.Generator()),
}


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("recipe", WHOLE.values(), ids=WHOLE.keys())
def test_a_draw_is_that_of_the_name_and_the_places(recipe, seed):
    made = model(v=(3,), w=SHAPE)
    torch.manual_seed(seed % 7)
    report = run(made, recipe, seed)
    expected = gt.init.normal_(torch.empty(SHAPE), seed=seed, name="w")
    assert tobytes(made.w) == tobytes(expected)
    assert row(report).std == 1
    assert row(report).written == "whole"
    assert row(report, "v").written == "not written"


def test_a_part_takes_the_values_of_its_places():
    made = model(w=SHAPE)
    report = run(made, lambda made: made.w.t()[1:6:2].diagonal().normal_())
    expected = torch.full(SHAPE, 77.0)
    expected.t()[1:6:2].diagonal().copy_(normal(SHAPE, "w").t()[1:6:2].diagonal())
    assert tobytes(made.w) == tobytes(expected)
    assert row(report).written == "part"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype):
    made = model(w=nn.Parameter(torch.empty(SHAPE, dtype=dtype)))
    run(made, lambda made: made.w.t().normal_(0.5, 2.0))
    assert tobytes(made.w) == tobytes(normal(SHAPE, "w", 0.5, 2.0, dtype))


def test_a_layout_of_its_own():
    weight = nn.Parameter(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    made = model(w=weight)
    run(made, lambda made: made.w[:, 1:].normal_())
    assert tobytes(made.w[:, 1:]) == tobytes(normal((2, 3, 4, 5), "w")[:, 1:])


DRAWS = {
    "uniform_": (lambda w: w.uniform_(-1, 3), lambda w: gt.init.uniform_(w, -1, 3, seed=0, name="w")),
    "kaiming_uniform_": (
        lambda w: nn.init.kaiming_uniform_(w, math.sqrt(5)),
        lambda w: gt.init.kaiming_uniform_(w, math.sqrt(5), seed=0, name="w"),
    ),
    "xavier_normal_": (nn.init.xavier_normal_, lambda w: gt.init.xavier_normal_(w, seed=0, name="w")),
    "trunc_normal_": (
        lambda w: nn.init.trunc_normal_(w, std=0.02),
        lambda w: gt.init.trunc_normal_(w, std=0.02, seed=0, name="w"),
    ),
    "trunc_normal_, cut closely": (
        lambda w: nn.init.trunc_normal_(w, 0.1, 1.0, 0.2, 0.4),
        lambda w: gt.init.trunc_normal_(w, 0.1, 1.0, 0.2, 0.4, seed=0, name="w"),
    ),
    "he_normal_": (gt.he_normal_, lambda w: gt.he_normal_(w, seed=0, name="w")),
}


@pytest.mark.parametrize(("recipe", "expected"), DRAWS.values(), ids=DRAWS.keys())
def test_the_distribution_is_the_recipe_s(recipe, expected):
    made = model(w=SHAPE)
    run(made, lambda made: recipe(made.w))
    assert tobytes(made.w) == tobytes(expected(torch.empty(SHAPE)))


def test_trunc_normal_is_one_draw_also_where_its_name_was_imported():
    """Its loop would draw again, on temporaries, and read masks."""
    original = nn.init._no_grad_trunc_normal_
    from torch.nn.init import trunc_normal_

    made = model(w=SHAPE)
    version = made.w._version
    report = run(made, lambda made: trunc_normal_(made.w.t(), std=2.0, a=-1.0, b=1.5))
    assert row(report).rule == "trunc_normal_ std=2 a=-1 b=1.5"
    assert made.w._version > version
    assert nn.init._no_grad_trunc_normal_ is original
    with pytest.raises(RuntimeError, match="mine"), gt.streams(made):
        raise RuntimeError("mine")
    assert nn.init._no_grad_trunc_normal_ is original


def test_other_threads_draw_as_ever():
    made, other = model(w=SHAPE), torch.empty(4, 4)

    def elsewhere():
        torch.manual_seed(0)
        nn.init.trunc_normal_(other)

    def recipe(made):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        nn.init.trunc_normal_(made.w)

    with gt.streams(made) as report:
        recipe(made)
    torch.manual_seed(0)
    assert torch.equal(other, nn.init.trunc_normal_(torch.empty(4, 4)))
    assert row(report).written == "whole"


def test_blocks_in_two_threads_do_not_take_each_other_s_truncated_normal():
    """The first to begin ends first; the other goes on."""
    made = [model(w=SHAPE), model(w=SHAPE)]
    began, ended = threading.Event(), threading.Event()

    def second():
        with gt.streams(made[1]):
            began.set()
            ended.wait(10)
            nn.init.trunc_normal_(made[1].w, a=-0.5, b=0.5)

    thread = threading.Thread(target=second)
    original = nn.init._no_grad_trunc_normal_
    with gt.streams(made[0]):
        thread.start()
        began.wait(10)
        nn.init.trunc_normal_(made[0].w, a=-0.5, b=0.5)
    ended.set()
    thread.join()
    assert tobytes(made[0].w) == tobytes(made[1].w)
    assert nn.init._no_grad_trunc_normal_ is original


def integers_of(made):
    made.w.bernoulli_(0.25)
    made.v.random_(3, 9)


def test_bernoulli_and_integers():
    """By the sampler's float64: 4,096 of each. Of right ones, fewer than one in a million fails."""
    made = model(w=(64, 64), v=(64, 64))
    run(made, integers_of)
    first = made.w.clone(), made.v.clone()
    assert set(made.w.flatten().tolist()) == {0, 1}
    assert abs(made.w.mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4096)
    counts = torch.bincount(made.v.flatten().long(), minlength=10)
    assert counts[:3].sum() == 0
    assert counts[9] == 0
    assert (counts[3:9] - 4096 / 6).abs().max() < 5.5 * math.sqrt(4096 * 5 / 36)
    integers_again = model(w=(64, 64), v=(64, 64))
    run(
        integers_again,
        lambda made: (made.v[10:].random_(3, 9), made.v[:10].random_(3, 9), made.w.bernoulli_(0.25)),
    )
    assert torch.equal(integers_again.w, first[0])
    assert torch.equal(integers_again.v, first[1])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_bernoulli_at_its_ends(p):
    made = model(w=(500, 50))
    run(made, lambda made: made.w.bernoulli_(p))
    assert (made.w == p).all()


def test_both_ends_of_the_uniform_weight_make_values_that_there_are():
    """They are drawn once in 2**53 weights."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for p in (0, 1):
        sample = find_sample(torch.ops.aten.bernoulli_.float, "bernoulli_", {"p": p})
        assert sample.finish(ends).tolist() == [p, p]
    sample = find_sample(torch.ops.aten.random_.to, "random_", {"from": 3, "to": 9})
    assert (sample.draw.low, sample.draw.high) == (0, 6)
    assert sample.finish(6 * ends).tolist() == [3, 8]


# Names


def test_a_tied_parameter_has_its_first_name():
    weight = nn.Parameter(torch.empty(SHAPE))
    made = model(w=weight, v=weight, u=nn.Parameter(weight.data.t()))
    report = run(made, lambda made: made.u.normal_())
    assert tobytes(made.w) == tobytes(normal(SHAPE, "w"))
    assert [(row.name, row.written) for row in report] == [("w", "whole"), ("u", "whole")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in its compiler
def test_a_wrapper_s_names_are_those_of_the_bare_model():
    bare, wrapped = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    run(bare, lambda made: made[0].reset_parameters())
    report = run(nn.DataParallel(torch.compile(wrapped)), lambda _: wrapped[0].reset_parameters())
    assert tobytes(bare[0].weight) == tobytes(wrapped[0].weight)
    assert [row.name for row in report] == ["0.weight", "0.bias"]


def test_a_buffer_has_a_stream_too():
    made = model(w=SHAPE)
    made.register_buffer("drawn", torch.empty(5))
    made.register_buffer("other", torch.zeros(5))
    report = run(made, lambda made: made.drawn.normal_())
    assert tobytes(made.drawn) == tobytes(normal((5,), "drawn"))
    assert [row.name for row in report] == ["w", "drawn"]


def test_a_parameter_that_is_made_in_the_block():
    made = model(w=SHAPE)

    def recipe(made):
        made.to_empty(device="cpu")
        made.w = nn.Parameter(torch.empty(SHAPE))
        made.w.normal_()

    run(made, recipe)
    assert tobytes(made.w) == tobytes(normal(SHAPE, "w"))


def test_a_freed_address_is_no_parameter():
    """The memory of a replaced parameter goes to temporaries, whose storages must not be taken for it."""
    made = model(w=(512, 512))

    def recipe(made):
        made.w.data = torch.full((512, 512), 5.0)
        for _ in range(20):
            torch.empty(512, 512).normal_()

    report = run(made, recipe)
    assert (made.w == 5).all()
    assert row(report).written == "not written"


def test_memory_that_is_shared_by_parameters():
    memory = torch.empty(10)
    made = model(w=nn.Parameter(memory[:4]), v=nn.Parameter(memory[4:]))
    report = run(made, lambda made: memory.zero_())
    assert [row.rule for row in report] == ["zero_", "zero_"]
    run(made, lambda made: (made.v.normal_(), memory[1:3].normal_()))
    assert tobytes(made.v) == tobytes(normal((6,), "v"))
    assert tobytes(made.w[1:3]) == tobytes(normal((4,), "w")[1:3])
    with pytest.raises(ValueError, match="must be on one parameter or a part of it, got one over w, v"):
        run(made, lambda made: memory.normal_())


# On temporaries

TEMPORARIES = {
    "copied": lambda made: made.w.copy_(torch.randn(SHAPE)),
    "assigned": lambda made: setattr(made, "w", nn.Parameter(torch.randn(SHAPE))),
    "as data": lambda made: setattr(made.w, "data", torch.randn(SHAPE)),
    "in place": lambda made: made.w.copy_(torch.empty(SHAPE).normal_()),
    "viewed": lambda made: made.w.copy_(torch.randn(48).view(SHAPE)),
    "after other draws": lambda made: (torch.randn(5), torch.rand(3), made.w.copy_(torch.randn(SHAPE))),
    "twice": lambda made: (made.w.copy_(torch.randn(SHAPE)), made.w.copy_(torch.randn(SHAPE))),
    "by foreach": lambda made: torch._foreach_copy_([made.w], [torch.randn(SHAPE)]),
    "into its memory": lambda made: torch.mul(torch.randn(SHAPE), 1.0, out=made.w),
    "through a parameter that is made": lambda made: made.w.copy_(nn.Parameter(torch.randn(SHAPE))),
    "in another module": lambda made: made.load_state_dict({"w": torch.randn(SHAPE)}, strict=False),
}


@pytest.mark.parametrize("recipe", TEMPORARIES.values(), ids=TEMPORARIES.keys())
def test_a_temporary_is_keyed_by_the_parameter_that_it_reaches(recipe):
    made = model(v=(3,), w=SHAPE)
    report = run(made, recipe)
    assert tobytes(made.w) == tobytes(normal(SHAPE, "w.#0"))
    assert row(report).written == "temporary"
    assert row(report).rule.startswith(("randn", "normal_ std=1"))
    assert "Drawn on temporaries: w." in report.notes


def test_what_is_computed_is_computed_again():
    def recipe(made):
        scale = torch.full((8,), 3.0)
        drawn = torch.rand(SHAPE) * scale
        drawn[:, 2:4] += 1
        drawn.t().mul_(0.5)
        made.w.copy_(torch.cat([drawn[3:], drawn[:3]]).clamp(max=2))

    made = model(w=SHAPE)
    run(made, recipe)
    expected = model(w=SHAPE)
    uniform = gt.init.uniform_(torch.empty(SHAPE), 0, 1 - 2**-24, seed=0, name="w.#0")
    original, torch.rand = torch.rand, lambda _: uniform
    try:
        with torch.no_grad():
            recipe(expected)
    finally:
        torch.rand = original
    assert tobytes(made.w) == tobytes(expected.w)


def test_what_a_temporary_held_before_is_there_again():
    def recipe(made):
        memory = torch.arange(16.0).view(2, 8)
        memory[0].normal_()
        memory.mul_(2).add_(1)
        other = torch.ones(8)
        other.add_(memory[0])
        made.w[:2].copy_(memory)
        made.w[2].copy_(other)

    made = model(w=SHAPE)
    run(made, recipe)
    key = "w.0[2, 8][8, 1]#0"
    expected = torch.arange(16.0).view(2, 8)
    expected[0] = normal((8,), key)
    expected = expected * 2 + 1
    assert tobytes(made.w[:2]) == tobytes(expected)
    assert tobytes(made.w[2]) == tobytes(1 + expected[0])


def test_orthogonal_is_orthogonal_and_keyed():
    made = [model(w=(8, 8), v=(8, 8)) for _ in range(2)]
    run(made[0], lambda made: (nn.init.orthogonal_(made.w), nn.init.orthogonal_(made.v)))
    run(made[1], lambda made: (nn.init.orthogonal_(made.v), nn.init.orthogonal_(made.w)))
    assert tobytes(made[0].w) == tobytes(made[1].w) != tobytes(made[0].v) == tobytes(made[1].v)
    assert torch.allclose(made[0].w @ made[0].w.T, torch.eye(8), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4, 3), (8, 4)])
def test_orthogonal_of_any_shape(shape):
    """torch transposes a temporary in place for the wide ones."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        made = model(w=shape)
        run(made, lambda made: nn.init.orthogonal_(made.w))
        found.append(tobytes(made.w))
    assert found[0] == found[1]
    flat = made.w.detach().flatten(1)
    small = flat @ flat.T if flat.shape[0] < flat.shape[1] else flat.T @ flat
    assert torch.allclose(small, torch.eye(len(small)), atol=1e-5)


@pytest.mark.parametrize("draw", [lambda: torch.randn(6, 6), lambda: torch.empty(6, 6).normal_()])
def test_a_temporary_that_is_turned_is_made_again_as_it_was(draw):
    def recipe(made):
        drawn = draw()
        first = drawn[0]
        drawn.t_()
        first.mul_(3)
        made.w.copy_(drawn)

    made = model(w=(6, 6))
    run(made, recipe)
    expected = normal((6, 6), "w.#0")
    expected[0] *= 3
    assert tobytes(made.w) == tobytes(expected.t())


BECOME = {
    "whole": lambda made: made.head.weight.normal_(0, 0.02),
    "trunc_normal_": lambda made: nn.init.trunc_normal_(made.head.weight, 0, 0.02, -9, 9),
    "gpuinit's own": lambda made: gt.normal_(made.head.weight, 0.02),
    "with a seed": lambda made: gt.normal_(made.head.weight, 0.02, seed=0, name="head.weight"),
    "a part, then all": lambda made: (made.head.weight[0].zero_(), made.head.weight.normal_(0, 0.02)),
}


@pytest.mark.parametrize("draw", BECOME.values(), ids=BECOME.keys())
def test_a_draw_on_what_was_a_temporary_stays(draw):
    def recipe(made):
        made.head = nn.Linear(8, 6)  # its constructor draws
        draw(made)

    made = model(v=(3,))
    report = run(made, recipe)
    expected = normal((6, 8), "head.weight", std=0.02)
    assert tobytes(made.head.weight) == tobytes(expected)
    assert row(report, "head.weight").std == pytest.approx(0.02)
    bound = 1 / math.sqrt(8)
    expected = gt.init.uniform_(torch.empty(6), -bound, bound, seed=0, name="head.bias.#0")
    assert tobytes(made.head.bias) == tobytes(expected)


def test_a_part_drawn_on_what_was_a_temporary_stays():
    def recipe(made):
        made.w = nn.Parameter(torch.randn(SHAPE))
        made.w[0].normal_(5, 0.1)

    made = model(w=SHAPE)
    run(made, recipe)
    assert tobytes(made.w[0]) == tobytes(normal(SHAPE, "w", 5, 0.1)[0])
    assert tobytes(made.w[1:]) == tobytes(normal(SHAPE, "w.#0")[1:])


# Names change


def swap(made):
    made.w, made.v = made.v, made.w
    made.w.normal_()


def swap_unseen(made):
    names = made._parameters  # which Module.to_empty and its kind write to
    names["w"], names["v"] = names["v"], names["w"]
    made.w.normal_()


def rename(made):
    weight = made.w
    del made.w
    made.u = weight
    made.u.normal_()


def test_a_name_is_that_of_the_moment():
    for exchange in (swap, swap_unseen):
        made = model(w=SHAPE, v=SHAPE)
        run(made, exchange)
        assert tobytes(made.w) == tobytes(normal(SHAPE, "w"))
    made = model(w=SHAPE, v=SHAPE)
    run(made, rename)
    assert tobytes(made.u) == tobytes(normal(SHAPE, "u"))
    for order in ("ab", "ba"):
        made = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})

        def recipe(made, order=order):
            for name in order:
                torch.nn.utils.spectral_norm(made[name])
                made[name].weight_orig.normal_()

        run(made, recipe)
        for name in "ab":
            assert tobytes(made[name].weight_orig) == tobytes(normal((4, 4), f"{name}.weight_orig"))


def halves(made):
    made.w[:3].copy_(torch.randn(3, 8))
    made.w[3:].copy_(torch.randn(3, 8))


def test_memory_that_is_made_in_the_block_is_the_parameter_s():
    made = [model(w=SHAPE) for _ in range(2)]
    run(made[0], halves)
    run(made[1], lambda made: (made.to_empty(device="cpu"), halves(made)))
    assert tobytes(made[0].w) == tobytes(made[1].w)


def test_sparse():
    made = model(w=(50, 8))
    report = run(made, lambda made: nn.init.sparse_(made.w, 0.5))
    zeros = made.w == 0
    assert (zeros.sum(0) == 25).all()
    assert len({tuple(column.tolist()) for column in zeros.T}) == 8
    first = tobytes(made.w)
    run(made, lambda made: (torch.randperm(5), nn.init.sparse_(made.w, 0.5)))
    assert tobytes(made.w) == first
    assert "randperm" in row(report).rule


def test_one_temporary_in_two_parameters_is_one():
    def recipe(made):
        drawn = torch.randn(SHAPE)
        made.w.copy_(drawn)
        made.v.copy_(drawn)

    made = model(v=SHAPE, w=SHAPE)
    report = run(made, recipe)
    assert tobytes(made.v) == tobytes(made.w) == tobytes(normal(SHAPE, "w.#0"))
    assert [row.written for row in report] == ["temporary", "temporary"]


def test_temporaries_that_meet_are_told_apart():
    made = model(w=SHAPE)
    run(made, lambda made: made.w.copy_(torch.cat([torch.randn(3, 8), torch.randn(3, 8)])))
    assert tobytes(made.w) == tobytes(torch.cat([normal((3, 8), "w.#0"), normal((3, 8), "w.#1")]))


def test_temporaries_that_have_met_stay_together():
    def recipe(made):
        first, second = torch.randn(2, 8), torch.randn(2, 8)
        both = torch.cat([first, second])
        second.mul_(2)
        made.w.copy_(torch.cat([both, second]))
        made.v.copy_(first)

    made = model(w=SHAPE, v=(2, 8))
    run(made, recipe)
    first, second = normal((2, 8), "w.#0"), normal((2, 8), "w.#1")
    assert tobytes(made.w) == tobytes(torch.cat([first, second, 2 * second]))
    assert tobytes(made.v) == tobytes(first)


def parts_of_one(made):
    for part in made.w:
        part.copy_(torch.randn(8))
    made.v[:, 0].copy_(torch.randn(6))
    made.v[0, :6].copy_(torch.randn(6))


def test_no_two_parts_of_one_parameter_are_alike():
    made = model(w=SHAPE, v=SHAPE)
    run(made, parts_of_one)
    assert len({tuple(part.tolist()) for part in made.w}) == 6
    assert made.v[1:, 0].tolist() != made.v[0, 1:6].tolist()
    first = tobytes(made.w), tobytes(made.v)
    run(made, lambda made: (parts_of_one(made), parts_of_one(made)))
    assert (tobytes(made.w), tobytes(made.v)) == first


def added(made):
    made.w.zero_()
    for _ in range(3):
        made.w.add_(torch.randn(SHAPE))


def test_what_is_added_three_times_is_three_draws():
    made = model(w=SHAPE)
    run(made, lambda made: (added(made), added(made)))
    expected = normal(SHAPE, "w.#0") + normal(SHAPE, "w.#1") + normal(SHAPE, "w.#2")
    assert tobytes(made.w) == tobytes(expected)


def test_the_order_of_siblings_does_not_matter():
    def recipe(order):
        def draw(made):
            for name in order:
                w = getattr(made, name)
                w.copy_(torch.empty_like(w).uniform_(1, 16).log_())

        return draw

    made = [model(a=(5,), b=(5,), c=(5,)) for _ in range(2)]
    run(made[0], recipe("abc"))
    run(made[1], recipe("cba"))
    assert [tobytes(p) for p in made[0].parameters()] == [tobytes(p) for p in made[1].parameters()]
    assert len({tobytes(p) for p in made[0].parameters()}) == 3


def test_temporaries_are_let_go():
    """Neither a copied temporary nor the memory of one is held until the end of the block."""
    made = model(w=SHAPE)
    freed = []

    def recipe(made):
        import weakref

        drawn = torch.randn(SHAPE)
        scaled = drawn * 2
        made.w.copy_(scaled)
        watched = [weakref.ref(drawn), weakref.ref(scaled)]
        del drawn, scaled
        freed.extend(reference() is None for reference in watched)

    run(made, recipe)
    assert freed == [True, True]


def test_draws_that_reach_nothing_are_told():
    report = run(model(w=SHAPE), lambda made: (torch.randn(3), torch.rand(3) * 2, made.w.zero_()))
    assert report.notes == ["2 draws on temporaries reached no parameter and no buffer."]


AGAIN = {
    "foreach": lambda made: torch._foreach_copy_([made.w], [torch.randn(SHAPE)]),
    "out": lambda made: torch.mul(torch.randn(SHAPE), 1.0, out=made.w.detach()),
    "copied, then a row added": lambda made: (
        made.w.copy_(torch.randn(SHAPE)),
        made.w[0].add_(torch.randn(8)),
    ),
    "drawn by gpuinit, then added": lambda made: (
        gt.normal_(made.w, seed=3),
        made.w.add_(torch.randn(SHAPE)),
    ),
    "parts of two sizes": lambda made: (
        made.w.zero_(),
        made.w.view(-1)[4:12].add_(torch.randn(8)),
        made.w.view(-1)[4:20].add_(torch.randn(16)),
    ),
}


@pytest.mark.parametrize("recipe", AGAIN.values(), ids=AGAIN.keys())
def test_a_recipe_that_is_run_twice_in_a_block_is_run_once(recipe):
    made = [model(w=SHAPE) for _ in range(2)]
    run(made[0], recipe)
    run(made[1], lambda made: (recipe(made), recipe(made)))
    assert tobytes(made[0].w) == tobytes(made[1].w)


def test_rand_is_below_one_in_every_dtype():
    """float16 and bfloat16 would round one in 4,096, and one in 512, up to 1."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        made = model(w=nn.Parameter(torch.empty(100_000, dtype=dtype)))
        run(made, lambda made, dtype=dtype: made.w.copy_(torch.rand(100_000, dtype=dtype)))
        assert made.w.min() >= 0
        assert made.w.max() < 1


# What is refused


def test_every_random_operation_of_torch_is_known_or_an_error():
    """By torch's own mark; a draw that passed through would take torch's numbers."""
    known, refused = set(), {}
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        name, _, overload = rest.partition(".")
        if namespace != "aten":
            continue
        func = getattr(getattr(torch.ops.aten, name), overload or "default", None)
        if func is None or torch.Tag.nondeterministic_seeded not in func.tags:
            continue
        try:
            find_sample(func, name, {"to": 3, "high": 3, "n": 3})
            known.add(name)
        except ValueError as error:
            refused[name] = str(error).endswith(f"must draw by {KNOWN}, got {func}")
    assert known == {"normal", "bernoulli_", "rand", "rand_like", "randint", "randint_like", "randn"} | {
        "randn_like", "random_", "randperm", "normal_", "uniform_",
    }  # fmt: skip
    assert len(refused) > 20
    assert all(refused.values())
    assert refused.keys() >= {
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "poisson",
    }


UNKNOWN = {
    "cauchy_": lambda made: made.w.cauchy_(),
    "exponential_": lambda made: made.w.exponential_(),
    "log_normal_": lambda made: made.w.log_normal_(),
    "geometric_": lambda made: made.w.geometric_(0.5),
    "multinomial": lambda made: torch.multinomial(torch.ones(3), 2),
    "poisson": lambda made: torch.poisson(torch.ones(3)),
    "bernoulli": lambda made: torch.bernoulli(torch.ones(3)),
    "Tensor_float": lambda made: torch.normal(torch.ones(3), 1.0),
    "_sample_dirichlet": lambda made: torch.distributions.Beta(1.0, 1.0).sample(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_draw_is_an_error_that_names_it(name):
    made = model(w=SHAPE)
    with pytest.raises(ValueError, match=rf"must draw by normal_, .*, got aten\..*{name}"):
        run(made, UNKNOWN[name])
    assert (made.w == 77).all()


REFUSED = {
    "read": (lambda made: made.w.fill_(torch.rand(1).item()), ValueError, "before its value is read"),
    "tested": (lambda made: bool((torch.rand(3) > 2).any()), ValueError, "before its value is read"),
    "compared": (lambda made: torch.equal(torch.rand(3), made.w), ValueError, "before its value is read"),
    "listed": (lambda made: torch.rand(3).tolist(), ValueError, "before its value is read.*got tolist"),
    "an array": (lambda made: torch.rand(3).numpy(), ValueError, "before its value is read.*got numpy"),
    "two parameters at once": (
        lambda made: torch._foreach_copy_([made.w, made.v], [torch.randn(SHAPE), torch.randn(3)]),
        ValueError,
        "must be written to one parameter at a time, got",
    ),
    "a batch norm": (
        lambda made: made.w.copy_(
            nn.functional.batch_norm(torch.randn(SHAPE), made.r, made.r, training=True)
        ),
        ValueError,
        "must not go through a batch norm in training, got",
    ),
    "beside a parameter": (
        lambda made: made.w.untyped_storage().resize_(500) and made.w.as_strided((9,), (1,), 60).normal_(),
        ValueError,
        "must be on a parameter, or on memory that has none",
    ),
    "other elements": (
        lambda made: made.w.view(torch.float16)[0, :3].normal_(),
        ValueError,
        "a draw must be on one parameter or a part of it",
    ),
    "complex": (lambda made: torch.randn(3, dtype=torch.complex64), TypeError, "got torch.complex64"),
    "integers": (lambda made: torch.empty(3, dtype=torch.int8).normal_(), TypeError, "got torch.int8"),
    "negative": (lambda made: made.w.normal_(0, math.nan), ValueError, "std must be a finite number >= 0"),
    "too many integers": (lambda made: torch.randint(2**60, (3,)), ValueError, r"at most 2\*\*53, got"),
    "too long a permutation": (lambda made: torch.randperm(2**22), ValueError, r"at most 2\*\*21"),
}


@pytest.mark.parametrize(("recipe", "kind", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(recipe, kind, match):
    with pytest.raises(kind, match=match):
        run(model(w=SHAPE, v=(3,), r=(8,)), recipe)


def test_a_block_in_a_block_is_refused():
    within = pytest.raises(ValueError, match="must not be within other ones")
    with within, gt.streams(nn.Linear(2, 2)), gt.streams(nn.Linear(2, 2)):
        pass
    with gt.streams(nn.Linear(2, 2)):  # and nothing is left behind
        pass


def test_rules_of_torch_s_functions_within_a_block():
    made = nn.Linear(4, 4)
    run(made, lambda made: gt.initialize_(made, 3, rules=[("*", nn.init.normal_)]))
    assert tobytes(made.weight) == tobytes(normal((4, 4), "weight"))


def test_odd_models_do_not_break_it():
    made = model(w=SHAPE)
    base = torch.zeros(1, 4)
    made.register_buffer("expanded", base.expand(3, 4))
    made.register_buffer("none", None)
    report = run(made, lambda made: (base.fill_(2), torch.randperm(5, out=torch.empty(5, dtype=torch.int64))))
    assert row(report).written == "not written"
    made.s = nn.Parameter(torch.ones(2, 2).to_sparse())
    with pytest.raises(TypeError, match=r"module must have dense parameters, got s of torch\.sparse_coo"):
        run(made, lambda made: None)


def test_scaling_alone_is_no_writing():
    assert row(run(model(w=SHAPE), lambda made: made.w.mul_(0.5))).written == "not written"


def test_a_shape_that_depends_on_temporaries_is_refused():
    def recipe(made):
        drawn = torch.rand(1000)
        made.w[0].copy_(drawn[drawn > 0.9][:8])

    with pytest.raises(ValueError, match="must not decide a shape"):
        run(model(w=SHAPE), recipe)


@pytest.mark.parametrize("way", ["directly", "by data", "in inference mode"])
def test_a_number_that_changes_before_the_end_is_refused(way):
    def recipe(made):
        with torch.inference_mode() if way == "in inference mode" else contextlib.nullcontext():
            scale = torch.full((8,), 2.0)
            drawn = torch.rand(SHAPE) * (scale.data if way == "by data" else scale)
            (scale.data if way == "by data" else scale).zero_()
            made.w.copy_(drawn)

    with pytest.raises(
        ValueError, match=r"must not change before they reach a parameter, got a change after aten\.mul"
    ):
        run(model(w=SHAPE), recipe)


@pytest.mark.parametrize(
    ("made", "seed", "kind", "match"),
    [
        (torch.empty(3), 0, TypeError, r"module must be a torch\.nn\.Module, got Tensor"),
        (nn.LazyLinear(3), 0, TypeError, "module must have shapes.*got weight uninitialized"),
        (nn.Linear(3, 3), -1, ValueError, r"seed must be None or an integer in \[0, 2\*\*64\), got -1"),
        (nn.Linear(3, 3), 0.5, TypeError, "seed must be .* got 0.5"),
    ],
)
def test_wrong_arguments(made, seed, kind, match):
    with pytest.raises(kind, match=match), gt.streams(made, seed):
        pass


def test_a_seed_of_none_is_drawn_from_torch():
    found = []
    for seed in (0, 0, 1):
        made = model(w=SHAPE)
        torch.manual_seed(seed)
        with gt.streams(made, None):
            nn.init.normal_(made.w)
        found.append(tobytes(made.w))
    assert found[0] == found[1] != found[2]


# Without memory


@pytest.mark.parametrize("wrong", [False, True])
def test_after_the_block_all_is_as_before(wrong):
    made, tensor = model(w=SHAPE), torch.empty(5)
    with contextlib.suppress(ZeroDivisionError), gt.streams(made):
        made.w.data.normal_()
        if wrong:
            raise ZeroDivisionError
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append((tobytes(gt.normal_(tensor)), tobytes(torch.randn(5)), tobytes(made.w.data.normal_())))
    assert found[0] == found[1]
    assert found[0][2] != tobytes(normal(SHAPE, "w"))


def test_meta_and_fake_tensors_are_left_alone():
    with torch.device("meta"):
        made = nn.Linear(4, 4)
    report = run(made, lambda made: (made.reset_parameters(), nn.init.trunc_normal_(made.weight)))
    assert [row.written for row in report] == ["meta, not written"] * 2
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = nn.Linear(4, 4)
        with gt.streams(made) as report:
            made.reset_parameters()
            nn.init.orthogonal_(made.weight)
    assert [row.written for row in report] == ["meta, not written"] * 2


# The report


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.empty(4))
        self.tokens = nn.Parameter(torch.empty(2, 8))
        self.never = nn.Parameter(torch.empty(2))

    def init_weights(self):
        self.embed.reset_parameters()
        self.norm.reset_parameters()
        nn.init.uniform_(self.head.weight, -0.5, 0.5)
        self.head.weight.mul_(0.5)
        nn.init.zeros_(self.head.bias)
        self.scale.copy_(torch.rand(4).log_())
        nn.init.trunc_normal_(self.tokens[:1], std=0.02)


TABLE = """\
name          shape  dtype    rule                             std   written
scale         4      float32  rand, log_, copy_                -     temporary
tokens        2x8    float32  trunc_normal_ std=0.02 a=-2 b=2  0.02  part
never         2      float32  -                                -     not written
embed.weight  10x8   float32  normal_ std=1                    1     whole
norm.weight   8      float32  fill_ 1                          0     whole
norm.bias     8      float32  zero_                            0     whole
head.weight   3x8    float32  uniform_ -0.5 to 0.5, mul_       -     whole
head.bias     3      float32  zero_                            0     whole
8 parameters, 145 elements
The recipe never wrote never.
Drawn on temporaries: scale."""


def test_the_report_is_a_table():
    made = Net()
    report = run(made, Net.init_weights)
    assert str(report) == TABLE
    assert max(map(len, TABLE.splitlines())) <= 80
    assert [row for row in range(10) if not made.embed.weight[row].any()] == [3]
    assert report == run(made, Net.init_weights)
    assert isinstance(report, gt.Report)


def test_what_gpuinit_s_functions_write_is_told():
    made = model(w=SHAPE, v=SHAPE)
    report = run(made, lambda made: (gt.he_normal_(made.w, seed=3, name="mine"), gt.uniform_(made.v, 0.5)))
    assert tobytes(made.w) == tobytes(gt.he_normal_(torch.empty(SHAPE), seed=3, name="mine"))
    assert row(report, "v").rule == "uniform -0.5 to 0.5"
    assert row(report).rule == "truncated normal std=0.5684 in -2 to 2"
    assert [row.written for row in report] == ["whole", "whole"]
