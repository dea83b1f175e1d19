"""Small arrays on the CPU: few blocks are made in another way, and scratch is kept from call to call."""

import itertools

import numpy as np
import pytest

import gpuinit
from gpuinit import quantile
from gpuinit.backends import cpu

FUNCTIONS = {
    "uniform": (gpuinit.uniform, 0.5),
    "uniform between": (gpuinit.uniform, -1.0, 3.0),
    "truncated normal": (gpuinit.he_normal,),
    "normal": (gpuinit.normal, 1.0),
    "normal between": (gpuinit.truncated_normal, 1.0, 0.0, -1.0, 3.0),
}


@pytest.fixture(autouse=True)
def numpy_engine(monkeypatch):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numpy")
    monkeypatch.setattr(cpu, "kept", {})


def words_of(blocks, stream, key, few, monkeypatch):
    monkeypatch.setattr(quantile, "FEW_BLOCKS", blocks.size if few else 0)
    scratch = quantile.make_scratch(quantile.make_memory(blocks.size), blocks.size, np.float32)
    even, odd = quantile.philox4x32(blocks, stream, key, scratch)
    return even.low.tobytes() + odd.low.tobytes()


@pytest.mark.parametrize("n", [*range(1, 9), 31, 32, 33, 100])
def test_integers_of_python_give_the_words_of_arrays(n, monkeypatch):
    """Whatever the blocks: far apart, on both sides of 2**32, the highest."""
    random = np.random.default_rng(n)
    for blocks in (
        random.integers(0, 2**64, n, np.uint64),
        np.arange(2**32 - n // 2, 2**32 - n // 2 + n, dtype=np.uint64),
        np.full(n, 2**64 - 1, np.uint64),
    ):
        stream, key = (int(number) for number in random.integers(0, 2**64, 2, np.uint64))
        few = words_of(blocks, stream, key, True, monkeypatch)
        assert few == words_of(blocks, stream, key, False, monkeypatch)
        assert few != words_of(blocks, stream, key ^ 1, False, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_small_arrays_are_parts_of_large_ones(function, dtype):
    """Every size up to some blocks more than few, from every place of a block."""
    make, *arguments = FUNCTIONS[function]
    whole = make((400,), *arguments, seed=3, dtype=dtype)
    for start, count in itertools.product(range(5), (*range(1, 20), 63, 64, 65, 127, 128, 129, 133, 390)):
        part = make((400,), *arguments, seed=3, dtype=dtype, index=slice(start, start + count))
        assert part.tobytes() == whole[start : start + count].tobytes()


def test_an_array_made_while_another_is_made(monkeypatch):
    """As by a finaliser or a handler of signals: kept scratch is one call's alone."""
    wanted = gpuinit.he_normal((64, 64), seed=1), gpuinit.he_normal((64, 64), seed=2)
    truncated_normal, inner = quantile.truncated_normal, []

    def interrupted(*arguments):
        monkeypatch.setattr(quantile, "truncated_normal", truncated_normal)
        inner.append(gpuinit.he_normal((64, 64), seed=2))
        return truncated_normal(*arguments)

    monkeypatch.setattr(quantile, "truncated_normal", interrupted)
    outer = gpuinit.he_normal((64, 64), seed=1)
    assert outer.tobytes() == wanted[0].tobytes()
    assert inner[0].tobytes() == wanted[1].tobytes()


def test_an_error_leaves_no_scratch_to_two(monkeypatch):
    gpuinit.he_normal((8,), seed=1)
    (scratch,) = cpu.kept.values()

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(quantile, "truncated_normal", fail)
        with pytest.raises(MemoryError):
            gpuinit.he_normal((8,), seed=1)
    assert not cpu.kept
    gpuinit.he_normal((8,), seed=1)
    assert all(kept is not scratch for kept in cpu.kept.values())


def test_scratch_is_kept_for_few_sizes_of_small_arrays():
    for size in range(1, 8 * cpu.MOST_KEPT, 4):
        gpuinit.he_normal((size,), seed=1)
        assert 1 <= len(cpu.kept) <= cpu.MOST_KEPT
    cpu.kept.clear()
    gpuinit.he_normal((cpu.ELEMENTS_KEPT + 1,), seed=1)
    assert not cpu.kept


def test_scratch_stays_bounded_though_threads_add_to_it(monkeypatch):
    """Two that see one place left, as it were."""
    for size in range(1, 2 * cpu.MOST_KEPT):
        cpu.kept[size, quantile.FLOAT32] = None
    gpuinit.he_normal((64, 64), seed=1)
    assert len(cpu.kept) == 1


def test_the_second_array_of_a_size_allocates_nothing_but_itself(monkeypatch):
    gpuinit.he_normal((64, 64), seed=1)
    monkeypatch.setattr(quantile, "make_memory", lambda n: pytest.fail("memory was made again"))
    gpuinit.he_normal((64, 64), seed=2)
