"""NumPy arrays, filled tile by tile on all cores that the process may use, by one of two engines.

"numpy" is always there. "numba" runs the same sampler compiled, some eight times faster, and has to be loaded
first. They write the same bits, so which one runs is a matter of time alone: see `engine`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuinit import quantile
from gpuinit.backends import Request
from gpuinit.limits import cpu_quota, free_address_space
from gpuinit.loading import can_load, loading, place_of, unfinished
from gpuinit.quantile import Array
from gpuinit.stream import Run, walk

if TYPE_CHECKING:
    from concurrent.futures import Executor

# Measured by benchmarks/cpu_blocks.py. One thread alone is fastest while its scratch stays in the L2 cache.
# Several threads wait for the interpreter lock between passes, so theirs must be long.
BLOCKS_ALONE = 2**14
BLOCKS_AMONG_THREADS = 2**16
BYTES_PER_BLOCK = 96  # 80 of quantile.make_memory, 16 for the block numbers
SCRATCH_BYTES = 14 * 2**20  # of all threads together
MOST_THREADS = SCRATCH_BYTES // (BYTES_PER_BLOCK * BLOCKS_ALONE)  # 9; with less scratch each, more are slower
ELEMENTS_PER_THREAD = 2**18  # fewer do not repay starting one

# Scratch of small arrays is kept, as to make it takes longer than to fill an array of a few blocks.
ELEMENTS_KEPT = 2**12
MOST_KEPT = 8

# Small groups of rows, where a part is cut along more than two axes, are made so many at once: where a group
# starts takes 8 bytes.
GROUPS_AT_ONCE = 2**15

# The same for Numba's engine, which needs no scratch and lets go of the interpreter lock for a whole tile. A
# tile of new memory is no smaller than a huge page of 2 MiB: threads that meet in one all clear it. Towards
# the end tiles are smaller, so that the threads end together.
COMPILED_ELEMENTS_AT_ONCE = 2**20
COMPILED_LEAST_AT_ONCE = 2**18
COMPILED_ELEMENTS_PER_THREAD = 2**19

# Loading Numba takes as long as the NumPy engine takes for so many elements. It is loaded once a process has
# made as many, so that no process spends more than twice the time it had to; and never for a small array.
ELEMENTS_TO_REPAY = 2**26
SMALL = 2**18

# Address space, in bytes, that Numba takes to load and compile a first function, and to compile another.
# Measured in the growth of VmPeak with Numba 0.68 on x86-64 Linux: 181 MiB by the import, 149 by the first
# function, 11 by one more. With 326 MiB left it ended in a segmentation fault, or never; with 365 it worked.
ROOM_TO_LOAD = 384 * 2**20
ROOM_FOR_ANOTHER = 64 * 2**20

elements_made = 0  # by the NumPy engine in this process; near enough where threads race
kept: dict[tuple[int, np.dtype], quantile.Scratch] = {}  # whoever uses one has taken it out
compiled_kernels: set[tuple[np.dtype, int]] = set()  # dtypes and distributions whose function is loaded


class Tile(NamedTuple):
    """Rows of `out`, small enough for the scratch. Without groups all start at one place of a block."""

    out: Array  # (rows, columns)
    first: int  # global element of out[0, 0], but for what groups says
    row_stride: int  # within a group; a multiple of the elements of a block, unless there is one row
    groups: Array | None = None  # uint64: how much further each of so many groups of as many rows starts


def empty(shape: tuple[int, ...], dtype: np.dtype, device: None) -> Array:
    return np.empty(shape, dtype)


def fill(out: Array, runs: Iterable[Run], request: Request) -> None:
    out = out.reshape(-1)
    if engine(out.size, out.dtype, request[2]) == "numba" and out.flags.aligned:  # which LLVM relies on
        fill_with_numba(out, runs, request)
    else:
        fill_with_numpy(out, runs, request)


def engine(size: int, dtype: np.dtype, distribution: int = quantile.TRUNCATED_NORMAL) -> str:
    """The engine that makes an array of this size now, loaded: "numpy" or "numba".

    GPUINIT_CPU_ENGINE decides; without it, Numba's is taken where it is loaded already for the dtype and
    the distribution, or where loading it pays. A child forked while another thread was loading takes
    NumPy's whatever the setting, for all that was not loaded: it would wait for ever.
    """
    setting = os.environ.get("GPUINIT_CPU_ENGINE")
    if setting not in (None, "numpy", "numba"):
        raise ValueError(f"GPUINIT_CPU_ENGINE must be numpy or numba, got {setting!r}")
    loaded = (dtype, distribution) in compiled_kernels
    if setting == "numpy":
        return "numpy"
    if setting is None and not loaded and (size < SMALL or elements_made + size < ELEMENTS_TO_REPAY):
        return "numpy"
    if not loaded and unfinished():
        return "numpy"
    problem = (None if loaded else room_problem(1 if setting else 2)) or numba_problem()
    if problem is not None and setting is None:
        return "numpy"
    if problem is not None:
        raise ImportError(f"GPUINIT_CPU_ENGINE is numba, but {problem}")
    if not loaded:
        from gpuinit import compiled

        with loading("numba"):
            compiled.kernel(dtype, distribution)
        compiled_kernels.add((dtype, distribution))
    return "numba"


def room_problem(times: int) -> str | None:
    """Why Numba cannot be loaded within the limits of the process, with the remedy; None where it can.

    Where it is asked for, they must leave room for it; where it only pays, twice as much: what the process
    makes next has to find room too, as it would without.
    """
    needed = times * (ROOM_FOR_ANOTHER if compiled_kernels else ROOM_TO_LOAD)
    free = free_address_space()
    if free >= needed:
        return None
    return (
        f"Numba needs {needed >> 20} MiB of address space, and the limit of this process leaves "
        f"{max(0, int(free)) >> 20}. Raise the limit (ulimit -v, ulimit -d), or set GPUINIT_CPU_ENGINE=numpy"
    )


@cache
def numba_problem() -> str | None:
    """Why Numba cannot be used, with the remedy; None where it can."""
    try:
        with loading("numba"):
            import numba  # first: what is missing must be it, and not a part of it

            if not hasattr(numba, "njit"):
                return (
                    f"the numba that Python finds is not Numba ({place_of(numba)}). "
                    'To use it, rename that, and: pip install --upgrade "gpuinit[cpu]"'
                )
            from gpuinit import compiled  # noqa: F401
    except Exception as error:  # Numba refuses a NumPy that is newer than it knows
        if isinstance(error, ImportError) and error.name == "numba":
            return 'Numba is not installed. To install it: pip install "gpuinit[cpu]"'
        return (
            f"importing Numba failed ({type(error).__name__}: {error}). "
            'To reinstall it: pip install --upgrade "gpuinit[cpu]"'
        )
    return None


def fill_with_numpy(out: Array, runs: Iterable[Run], request: Request) -> None:
    global elements_made
    sample_type = quantile.FLOAT64 if out.dtype.itemsize == 8 else quantile.FLOAT32
    lanes = 16 // sample_type.itemsize
    threads = max(1, min(MOST_THREADS, out.size // ELEMENTS_PER_THREAD))
    if threads > 1 or "GPUINIT_NUM_THREADS" in os.environ:  # to ask for the cores takes a while
        threads = min(thread_limit(), threads)
    most = BLOCKS_ALONE
    if threads > 1:
        most = min(BLOCKS_AMONG_THREADS, SCRATCH_BYTES // (threads * BYTES_PER_BLOCK))
    blocks_at_once = min(most, out.size + 1)  # of single elements, each in a block of its own
    cut_up = tiles(out, runs, lanes, lambda left: blocks_at_once)
    if threads == 1:  # here too, as the way through share is slower for a small array
        fill_tiles(cut_up, sample_type, request, 0 if out.size <= ELEMENTS_KEPT else blocks_at_once)
    else:
        share(cut_up, threads, lambda mine: fill_tiles(mine, sample_type, request, blocks_at_once))
    elements_made += out.size


def fill_tiles(mine: Iterator[Tile], sample_type: np.dtype, request: Request, blocks_at_once: int) -> None:
    """With new scratch for tiles of at most so many blocks; with scratch that is kept for 0."""
    memory = quantile.make_memory(blocks_at_once) if blocks_at_once else None
    # A caller's np.seterr must not turn a harmless underflow of a tiny limit into an error.
    with np.errstate(all="ignore"):
        for tile in mine:
            fill_tile(tile, sample_type, request, memory)


def fill_with_numba(out: Array, runs: Iterable[Run], request: Request) -> None:
    from gpuinit import compiled

    key, stream, distribution, numbers = request
    compiled_fill = compiled.kernel(out.dtype, distribution)
    written = compiled.ENTRIES[out.dtype][1]
    shared = (np.uint64(key), np.uint64(stream), numbers)
    threads = max(1, min(thread_limit(), out.size // COMPILED_ELEMENTS_PER_THREAD))

    def work(mine: Iterator[Tile]) -> None:
        for tile in mine:
            starts = np.array([tile.first], np.uint64) if tile.groups is None else tile.groups + tile.first
            compiled_fill(tile.out, starts, np.uint64(tile.row_stride), *shared)

    def at_once(left: int) -> int:
        return min(COMPILED_ELEMENTS_AT_ONCE, max(COMPILED_LEAST_AT_ONCE, left // (2 * threads)))

    # The compiled rows need not start at the same place of a block: one lane is all there is to keep in step.
    share(tiles(out.view(written), runs, 1, at_once), threads, work)


def share(tiles: Generator[Tile], threads: int, work: Callable[[Iterator[Tile]], None]) -> None:
    """Do the work on so many threads, this one among them, each of which draws a tile when it is free.

    No other thread works when this returns or raises, whatever is raised into it, and however often.
    """
    if threads == 1 or not can_load("concurrent.futures.thread"):
        work(tiles)
        return

    lock = threading.Lock()
    stopped = False
    failures: list[BaseException] = []
    # Who holds its turn works. A helper that comes too late does not get it, and this thread may take it
    # twice: so what is raised here, between any two lines, leaves nothing undone and nothing locked.
    turns = [threading.RLock() for _ in range(threads - 1)]

    def draw() -> Iterator[Tile]:
        while True:
            with lock:
                tile = None if stopped else next(tiles, None)
            if tile is None:
                return
            yield tile

    def help_out(turn: Any) -> None:
        nonlocal stopped
        try:
            if turn.acquire(blocking=False):
                work(draw())
        except BaseException as error:
            failures.append(error)
            stopped = True  # leaves the other threads nothing to do
        finally:
            with suppress(RuntimeError):  # it was not acquired
                turn.release()

    interrupts: list[BaseException] = []
    try:
        start(help_out, turns)
        work(draw())
    finally:
        # Ctrl-C meets the inner `try`, or in between, where that begins again, the outer one. No call is
        # outside of them, as Python raises what comes from without after a call or as a loop turns back.
        waiting = True
        while waiting:
            try:
                while waiting:
                    try:
                        stopped = True
                        for turn in turns:
                            turn.acquire()
                        waiting = False
                    except BaseException as error:
                        interrupts = [error]
            except BaseException as error:
                interrupts = [error]
        if interrupts:
            raise interrupts.pop()  # so that the frame does not hold it, which holds the frame
    if failures:
        raise failures.pop()


def start(help_out: Callable[[Any], None], turns: list[Any]) -> None:
    """Have a helper for each turn, as far as there are threads."""
    most = max(len(turns) + 1, thread_limit())  # which may have been lowered since
    try:
        pool = helpers(most - 1, usable_cores(), os.getpid())
    except RuntimeError:  # Python ends, and lets nobody prepare for that any more
        return
    try:
        for turn in turns:
            pool.submit(help_out, turn)
    except RuntimeError:  # Python ends, or the system has no thread left: those there are will do
        return
    except BaseException:  # a thread may run that the pool does not know, and would never tell to end
        pool.shutdown(wait=False)
        helpers.cache_clear()
        raise


@lru_cache(maxsize=1)
def helpers(threads: int, cores: frozenset[int], process: int) -> Executor:
    """Threads that wait for work. With new ones for every array it took a tenth longer.

    A forked child has none of its parent's, and a thread keeps to the cores that its maker could use. Those
    that this forgets end by themselves.
    """
    with loading("concurrent.futures.thread"):
        from concurrent.futures import ThreadPoolExecutor  # here, as it is slow to import

    return ThreadPoolExecutor(threads, "gpuinit")


def tiles(
    out: Array, runs: Iterable[Run], lanes: int, blocks_at_once: Callable[[int], int]
) -> Generator[Tile]:
    """Cut the runs into tiles of at most so many blocks as `blocks_at_once` says, given the elements left."""
    position, left = 0, out.size

    def blocks_now() -> int:
        return blocks_at_once(left)

    for run in runs:
        groups = math.prod(length for length, _ in run.outer)
        part = out[position : position + groups * run.rows * run.length].reshape(-1, run.length)
        position += part.size
        if part.size <= blocks_now() and len(part) == 1:  # the shortest way for small arrays
            left -= part.size
            yield Tile(part, run.offset, 0)
            continue
        at_once = (
            blocks_now() // (run.rows * blocks_across(lanes - 1, run.length, lanes)) if groups > 1 else 0
        )
        if at_once > 1:
            step = min(at_once, GROUPS_AT_ONCE)
            for done in range(0, groups, step):
                several = places(run.outer, done, min(done + step, groups))
                rows = part[done * run.rows :][: several.size * run.rows]
                left -= rows.size
                yield Tile(rows, run.offset, run.row_stride, several)
            continue
        for group, further in enumerate(walk(run.outer)):
            rows = part[group * run.rows :][: run.rows]
            # Rows that start at different places of a block are taken in turns of equal ones.
            turns = 1 if run.row_stride % lanes == 0 else lanes
            for turn in range(min(turns, run.rows)):
                first = run.offset + further + turn * run.row_stride
                for tile in cut(Tile(rows[turn::turns], first, run.row_stride * turns), lanes, blocks_now):
                    left -= tile.out.size
                    yield tile


def places(axes: Sequence[tuple[int, int]], start: int, stop: int) -> Array:
    """Those from start to stop of `walk`, uint64."""
    number = np.arange(start, stop, dtype=np.uint64)
    found = np.zeros(stop - start, np.uint64)
    for length, stride in axes:
        number, along = np.divmod(number, np.uint64(length))
        found += along * np.uint64(stride)
    return found


def cut(tile: Tile, lanes: int, blocks_now: Callable[[], int]) -> Generator[Tile]:
    """Whole rows where they are small enough, else one row in pieces."""
    rows, columns = tile.out.shape
    blocks_in_row = blocks_across(tile.first % lanes, columns, lanes)
    row = 0
    while row < rows:
        first = tile.first + row * tile.row_stride
        height = blocks_now() // blocks_in_row
        if height:
            yield tile._replace(out=tile.out[row : row + height], first=first)
            row += height
            continue
        column = 0
        while column < columns:
            end = min(column + blocks_now() * lanes - (first + column) % lanes, columns)
            yield Tile(tile.out[row : row + 1, column:end], first + column, 0)
            column = end
        row += 1


def blocks_across(phase: int, columns: int, lanes: int) -> int:
    """How many Philox blocks a row touches that starts at this lane of its first one."""
    return -(-(phase + columns) // lanes)


def fill_tile(tile: Tile, sample_type: np.dtype, request: Request, memory: Array | None) -> None:
    lanes = 16 // sample_type.itemsize
    rows, columns = tile.out.shape
    if tile.groups is None:
        first, phase = divmod(tile.first, lanes)
        block = np.arange(first, first + blocks_across(phase, columns, lanes), dtype=np.uint64)
        if rows > 1:
            steps = np.arange(rows, dtype=np.uint64) * np.uint64(tile.row_stride // lanes)
            block = (steps[:, None] + block).reshape(-1)
        fill_rows(tile.out, block, phase, sample_type, request, memory)
        return
    steps = tile.first + np.arange(rows // len(tile.groups), dtype=np.uint64) * np.uint64(tile.row_stride)
    firsts, phases = np.divmod((tile.groups[:, None] + steps).reshape(-1), np.uint64(lanes))
    for phase in range(lanes):
        chosen = np.flatnonzero(phases == phase)
        if chosen.size:
            across = np.arange(blocks_across(phase, columns, lanes), dtype=np.uint64)
            block = firsts[chosen][:, None] + across
            made = np.empty((chosen.size, columns), tile.out.dtype)
            fill_rows(made, block.reshape(-1), phase, sample_type, request, memory)
            tile.out[chosen] = made


def fill_rows(
    out: Array, block: Array, phase: int, sample_type: np.dtype, request: Request, memory: Array | None
) -> None:
    """Rows that each start at this lane of their first block, given all blocks of one row after another."""
    key, stream, distribution, numbers = request
    lanes = 16 // sample_type.itemsize
    weights = quantile.weights64 if lanes == 2 else quantile.weights
    scratch = take_scratch(block.size, sample_type, memory)
    if out.size == block.size * lanes and out.dtype == sample_type and out.flags.c_contiguous:
        target = quantile.place(out.reshape(-1, lanes))  # all that is made, so at once
        weights(block, stream, key, distribution, numbers, scratch, target)
    else:
        weights(block, stream, key, distribution, numbers, scratch, scratch.placed)
        out[...] = scratch.weights.reshape(len(out), -1)[:, phase : phase + out.shape[1]]
    if memory is None:
        if len(kept) >= MOST_KEPT:  # other threads add to it too
            kept.clear()
        kept[block.size, sample_type] = scratch


def take_scratch(blocks: int, sample_type: np.dtype, memory: Array | None) -> quantile.Scratch:
    """Scratch in this memory; without one, that of an earlier small array, which no other call has now."""
    if memory is None:
        scratch = kept.pop((blocks, sample_type), None)
        if scratch is not None:
            return scratch
        memory = quantile.make_memory(blocks)
    return quantile.make_scratch(memory, blocks, sample_type)


def thread_limit() -> int:
    """GPUINIT_NUM_THREADS, else the cores that the process may use, as far as a container's quota lasts."""
    setting = os.environ.get("GPUINIT_NUM_THREADS")
    if setting is None:
        return cores_in_time()
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"GPUINIT_NUM_THREADS must be an integer >= 1, got {setting!r}")
    return int(setting)


def cores_in_time() -> int:
    """More threads than this would run in turns: with a quota of 1.5 cores, 2."""
    cores, quota = len(usable_cores()), cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def usable_cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
