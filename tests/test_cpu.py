"""The NumPy backend: its threads, and its memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpuinit
from gpuinit.backends import cpu
from gpuinit.distributions import Draw, Normal, find_sampling
from gpuinit.stream import Run, runs

UNIT = Normal(1.0, 0.0, -2.0, 2.0, ("stddev", 1.0))
MOST_BEYOND_OUT = 16 * 2**20


def peak_beyond(out: np.ndarray, runs: list[Run], draw: Draw = UNIT) -> int:
    """The most memory that filling out takes at any time, beside out itself."""
    distribution, numbers = find_sampling(draw, out.dtype)
    tracemalloc.start()
    try:
        cpu.fill(out, runs, (1, 2, distribution, numbers))
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


def test_a_part_of_many_axes_takes_no_memory():
    """Of 2**23 groups of two single elements, and of two groups far longer than what is made at once."""
    out = np.empty(2**24, np.float32)
    (run,) = runs((2**23, 3, 3), (0, 0, 1), (2**23, 2, 1))
    assert run == Run(1, 1, 2, 3, ((2**23, 9),))
    assert peak_beyond(out, [run]) < MOST_BEYOND_OUT
    assert peak_beyond(out, [Run(5, 2**22, 2, 2**30, ((2, 2**40),))]) < MOST_BEYOND_OUT


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
        if len(running) == expected:
            all_there.set()
        all_there.wait(60)  # the others must not do all the work before the last one starts
        return fill_tile(*arguments)

    monkeypatch.setattr(cpu, "fill_tile", spy)
    for expected in (1, 3):
        running.clear()
        all_there = threading.Event()
        monkeypatch.setenv("GPUINIT_NUM_THREADS", str(expected))
        gpuinit.he_normal((2048, 2048), seed=1, device="cpu")
        assert len(running) == expected
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


def test_no_thread_writes_once_an_error_is_raised(monkeypatch):
    caller = threading.get_ident()
    helper_began, helper_ended = threading.Event(), threading.Event()

    def fail(*arguments):
        if threading.get_ident() == caller:
            assert helper_began.wait(60)
            raise KeyboardInterrupt
        helper_began.set()
        time.sleep(0.2)
        helper_ended.set()

    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    monkeypatch.setattr(cpu, "fill_tile", fail)
    with pytest.raises(KeyboardInterrupt):
        gpuinit.he_normal((2048, 2048), device="cpu")
    assert helper_ended.is_set()


class InterruptionError(Exception):
    """Raised from without."""


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that signal")
def test_no_thread_writes_once_a_wait_for_it_is_interrupted(monkeypatch, times):
    """The caller has done its share when Ctrl-C comes, once or again and again."""
    caller = threading.get_ident()
    helper_began, helper_ended, raised = threading.Event(), threading.Event(), []

    def interrupt(*_: object) -> None:
        raised.append(None)
        if len(raised) == times:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise InterruptionError

    def fill_slowly(*arguments):
        if threading.get_ident() == caller:
            assert helper_began.wait(60)
            return
        if not helper_began.is_set():
            helper_began.set()
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            while len(raised) < times:
                time.sleep(0.01)
            time.sleep(0.1)
            helper_ended.set()

    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    monkeypatch.setattr(cpu, "fill_tile", fill_slowly)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(InterruptionError):
            gpuinit.he_normal((2048, 2048), device="cpu")
        assert helper_ended.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(raised) == times


def test_no_thread_writes_after_an_error_raised_from_without_at_any_moment(monkeypatch):
    """Into the caller's work, its start of helpers and its wait for them, as it comes."""
    working, ended = set(), []
    fill_tile, start = cpu.fill_tile, threading.Thread.start
    starting = (
        threading.Lock()
    )  # Python has it raised in a thread just made by that one, which then never starts

    def start_undisturbed(thread):
        with starting:
            start(thread)

    def note(*arguments):
        me = threading.get_ident()
        working.add(me)
        try:
            fill_tile(*arguments)
        finally:
            working.discard(me)

    def call(begun: threading.Event) -> None:
        try:
            begun.set()
            gpuinit.he_normal((1024, 1024), seed=1, device="cpu")
        except InterruptionError:
            pass
        finally:
            ended.append(set(working) - {threading.get_ident()})

    monkeypatch.setenv("GPUINIT_NUM_THREADS", "3")
    monkeypatch.setattr(cpu, "fill_tile", note)
    monkeypatch.setattr(threading.Thread, "start", start_undisturbed)
    for attempt in range(60):
        begun = threading.Event()
        thread = threading.Thread(target=call, args=(begun,))
        thread.start()
        assert begun.wait(60)
        time.sleep(attempt * 0.0005)
        for _ in range(1 + attempt % 3):
            with starting:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(InterruptionError)
                )
            time.sleep(0.0005)
        thread.join(60)
        assert not thread.is_alive()
    assert ended == [set()] * len(ended)
    assert len(ended) > 50
    assert make_large_array().tobytes() == gpuinit.he_normal((1024, 1024), seed=1, device="cpu").tobytes()


def test_a_helper_that_was_given_its_work_as_ctrl_c_came_is_waited_for(monkeypatch):
    """After the pool has taken the work, and before the caller knows that."""
    began, ended = threading.Event(), threading.Event()
    caller = threading.get_ident()
    submit = ThreadPoolExecutor.submit

    def interrupted(*arguments):
        submit(*arguments)
        assert began.wait(60)
        raise KeyboardInterrupt

    def fill_slowly(*arguments):
        assert threading.get_ident() != caller
        began.set()
        time.sleep(0.2)
        ended.set()

    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    monkeypatch.setattr(cpu, "fill_tile", fill_slowly)
    with pytest.raises(KeyboardInterrupt):
        gpuinit.he_normal((2048, 2048), device="cpu")
    assert ended.is_set()


def test_a_helper_that_comes_too_late_writes_nothing(monkeypatch):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    jobs = []
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda pool, *job: jobs.append(job))
    expected = make_large_array().tobytes()
    out = np.empty((1024, 1024), np.float32)
    gpuinit.he_normal((1024, 1024), seed=1, out=out)
    assert out.tobytes() == expected
    out[:] = 77
    monkeypatch.setattr(cpu, "fill_tile", None)
    late = [threading.Thread(target=job[0], args=job[1:]) for job in jobs]
    for thread in late:
        thread.start()
    for thread in late:
        thread.join(60)
        assert not thread.is_alive()
    assert len(late) == 2
    assert (out == 77).all()


START_IS_INTERRUPTED = """
import threading, gpuinit
start = threading.Thread.start
def interrupted(thread):
    start(thread)
    raise KeyboardInterrupt
threading.Thread.start = interrupted
try:
    gpuinit.he_normal((1024, 1024), device="cpu")
except KeyboardInterrupt:
    print("interrupted")
threading.Thread.start = start
print(gpuinit.he_normal((1024, 1024), device="cpu").shape)
"""


def test_python_ends_after_ctrl_c_while_a_helper_starts():
    """The pool does not know such a thread, which would wait for work for ever."""
    command = [sys.executable, "-c", START_IS_INTERRUPTED]
    environment = os.environ | {"GPUINIT_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("interrupted\n(1024, 1024)\n", "")


def make_large_array():
    return gpuinit.he_normal((1024, 1024), seed=1, device="cpu")


def threads_that_help() -> set[threading.Thread]:
    """The threads, of which there must be some, that help this one to make a large array."""
    running: set[threading.Thread] = set()
    both = threading.Event()
    fill_tile = cpu.fill_tile

    def spy(*arguments):
        running.add(threading.current_thread())
        if len(running) > 1:
            both.set()
        both.wait(60)
        fill_tile(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "fill_tile", spy)
        make_large_array()
    return running - {threading.current_thread()}


def test_threads_are_kept_until_their_number_changes(monkeypatch):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    helping = threads_that_help()
    assert len(helping) == 1
    for _ in range(3):
        assert threads_that_help() == helping
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "3")
    assert not threads_that_help() & helping
    gc.collect()  # the traceback of another test's error may hold them
    for thread in helping:
        thread.join(60)
        assert not thread.is_alive()


def count_helpers(sender):
    sender.send(len(threads_that_help()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    threads_that_help()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = context.Process(target=count_helpers, args=(sender,))
        child.start()
    assert receiver.poll(120)
    assert receiver.recv() == 1
    child.join()
    assert child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system knows no affinity")
def test_threads_keep_to_the_cores_that_the_process_may_use_now(monkeypatch):
    cores = os.sched_getaffinity(0)
    seen = set()
    fill_tile = cpu.fill_tile

    def spy(*arguments):
        seen.add(frozenset(os.sched_getaffinity(0)))
        fill_tile(*arguments)

    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    threads_that_help()
    monkeypatch.setattr(cpu, "fill_tile", spy)
    try:
        os.sched_setaffinity(0, {min(cores)})
        threads_that_help()
    finally:
        os.sched_setaffinity(0, cores)
    assert seen == {frozenset({min(cores)})}


def test_a_limit_that_is_lowered_meanwhile_does_no_harm(monkeypatch):
    expected = make_large_array().tobytes()
    limits = iter([2, 1])
    monkeypatch.setattr(cpu, "thread_limit", lambda: next(limits))
    assert make_large_array().tobytes() == expected
    assert next(limits, None) is None


AT_EXIT = """
import atexit, hashlib, gpuinit
def make():
    return hashlib.sha256(gpuinit.he_normal((1024, 1024), seed=1, device="cpu")).hexdigest()
atexit.register(lambda: print(make()))
"""


@pytest.mark.parametrize("earlier", ["", "make()"])
def test_arrays_can_still_be_made_while_python_ends(earlier):
    command = [sys.executable, "-c", AT_EXIT + earlier]
    environment = os.environ | {"GPUINIT_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(make_large_array()).hexdigest(), done.stderr


def test_numpy_error_settings_of_the_caller_do_not_matter():
    with np.errstate(all="raise"):
        w = gpuinit.uniform(1000, 1e-44, seed=1, device="cpu")
        gpuinit.uniform(1000, 1e-7, seed=1, dtype="float16", device="cpu")
    assert w.tobytes() == gpuinit.uniform(1000, 1e-44, seed=1, device="cpu").tobytes()
