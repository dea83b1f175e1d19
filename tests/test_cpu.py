"""The NumPy backend: its threads, and its memory."""

from __future__ import annotations

import itertools
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest

import gpuinit
from gpuinit import quantile
from gpuinit.backends import cpu
from gpuinit.stream import Run, runs

MOST_BEYOND_OUT = 16 * 2**20


def peak_beyond(out: np.ndarray, runs: list[Run]) -> int:
    """The most memory that filling out takes at any time, beside out itself."""
    tracemalloc.start()
    try:
        cpu.fill(out, runs, 1, 2, quantile.TRUNCATED_NORMAL, 1.0)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_memory_beyond_the_output_is_bounded(monkeypatch, threads, dtype):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", str(threads))
    out = np.empty(2**25, dtype)
    assert peak_beyond(out, [Run(0, out.size, 1, 0)]) < MOST_BEYOND_OUT
    assert peak_beyond(out, [Run(3, 2**10, 2**15, 2**20 + 1)]) < MOST_BEYOND_OUT
    assert peak_beyond(out[: 2**20], [Run(3, 1, 2**20, 7)]) < MOST_BEYOND_OUT


def test_walking_a_part_of_many_axes_takes_no_memory():
    shape, cut = (2**22, 3, 3, 3), (2**22, 2, 2, 2)
    tracemalloc.start()
    try:
        places = [run.offset for run in itertools.islice(runs(shape, (0, 0, 0, 0), cut), 5)]
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()
    assert places == [0, 9, 27, 36, 54]


def test_a_temporary_of_the_outputs_size_is_seen(monkeypatch):
    """The control."""
    fill = cpu.fill

    def wasteful(out, *arguments):
        copy = out.copy()
        fill(copy, *arguments)
        out[:] = copy

    monkeypatch.setattr(cpu, "fill", wasteful)
    out = np.empty(2**24, np.float32)
    assert peak_beyond(out, [Run(0, out.size, 1, 0)]) > MOST_BEYOND_OUT


@pytest.mark.parametrize("setting", ["0", "-1", "two", "", "1.5"])
def test_a_bad_number_of_threads_is_an_error(monkeypatch, setting):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", setting)
    out = np.full(8, 77, np.float32)
    with pytest.raises(ValueError, match=rf"^GPUINIT_NUM_THREADS must be an integer >= 1, got '{setting}'$"):
        gpuinit.he_normal(8, out=out)
    assert (out == 77).all()


def test_the_number_of_threads_is_obeyed(monkeypatch):
    running = set()
    fill_tile = cpu.fill_tile

    def spy(*arguments):
        running.add(threading.get_ident())
        if expected > 1 and len(running) == 1:
            second.wait(60)  # this thread must not do all the work before another starts
        second.set()
        return fill_tile(*arguments)

    monkeypatch.setattr(cpu, "fill_tile", spy)
    for expected in (1, 3):
        running.clear()
        second = threading.Event()
        monkeypatch.setenv("GPUINIT_NUM_THREADS", str(expected))
        gpuinit.he_normal((2048, 2048), seed=1, device="cpu")
        assert min(2, expected) <= len(running) <= expected
        assert threading.get_ident() in running
    running.clear()
    gpuinit.he_normal((64, 64), device="cpu")  # too small to repay a thread
    assert running == {threading.get_ident()}


def test_many_threads_fill_at_once(monkeypatch):
    barrier = threading.Barrier(4)
    met = threading.local()
    fill_tile = cpu.fill_tile

    def meet(*arguments):
        if not hasattr(met, "others"):
            met.others = barrier.wait(timeout=60)
        return fill_tile(*arguments)

    monkeypatch.setattr(cpu, "fill_tile", meet)
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "4")
    gpuinit.he_normal((2048, 2048), seed=1, device="cpu")
    assert not barrier.broken


def test_without_a_setting_the_threads_are_the_cores_of_the_process(monkeypatch):
    monkeypatch.delenv("GPUINIT_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert cpu.thread_limit() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu.thread_limit() == 6


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_thread_stops_the_others_and_is_raised(monkeypatch, failing):
    tiles = []
    both = threading.Barrier(2)
    order = threading.local()
    fill_tile = cpu.fill_tile

    def fail(tile, *arguments):
        if not hasattr(order, "number"):
            order.number = both.wait(timeout=60)
        if order.number == failing:
            raise MemoryError("no room")
        tiles.append(tile)
        time.sleep(0.01)
        return fill_tile(tile, *arguments)

    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    monkeypatch.setattr(cpu, "fill_tile", fail)
    monkeypatch.setattr(cpu, "BLOCKS_AMONG_THREADS", 1024)
    with pytest.raises(MemoryError, match="no room"):
        gpuinit.he_normal((2048, 2048), device="cpu")
    assert len(tiles) < 100  # of 1024


def test_numpy_error_settings_of_the_caller_do_not_matter():
    with np.errstate(all="raise"):
        w = gpuinit.uniform(1000, 1e-44, seed=1, device="cpu")
        gpuinit.uniform(1000, 1e-9, seed=1, dtype="float16", device="cpu")
    assert w.tobytes() == gpuinit.uniform(1000, 1e-44, seed=1, device="cpu").tobytes()
