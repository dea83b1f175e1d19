"""NumPy arrays, filled tile by tile on the cores that the process may use."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable
from typing import NamedTuple

import numpy as np

from gpuinit import quantile
from gpuinit.quantile import Array
from gpuinit.stream import Run

# Measured by benchmarks/cpu_blocks.py. One thread alone is fastest while its scratch stays in the L2 cache.
# Several threads wait for the interpreter lock between passes, so theirs must be long.
BLOCKS_ALONE = 2**14
BLOCKS_AMONG_THREADS = 2**16
BYTES_PER_BLOCK = 96  # 80 of quantile.make_memory, 16 for the block numbers
SCRATCH_BYTES = 14 * 2**20  # of all threads together
MOST_THREADS = SCRATCH_BYTES // (BYTES_PER_BLOCK * BLOCKS_ALONE)  # 9; with less scratch each, more are slower
ELEMENTS_PER_THREAD = 2**18  # fewer do not repay starting one


class Tile(NamedTuple):
    """Rows of `out` that start at the same place of a Philox block, small enough for the scratch."""

    out: Array  # (rows, columns)
    first: int  # global element of out[0, 0]
    row_stride: int  # a multiple of the elements of a block, unless there is one row


def empty(shape: tuple[int, ...], dtype: np.dtype, device: None) -> Array:
    return np.empty(shape, dtype)


def fill(out: Array, runs: Iterable[Run], key: int, stream: int, distribution: int, limit: float) -> None:
    out = out.reshape(-1)
    sample_type = np.dtype(np.float64 if out.dtype == np.float64 else np.float32)
    lanes = 16 // sample_type.itemsize
    threads = max(1, min(thread_limit(), MOST_THREADS, out.size // ELEMENTS_PER_THREAD))
    most = BLOCKS_ALONE
    if threads > 1:
        most = min(BLOCKS_AMONG_THREADS, SCRATCH_BYTES // (threads * BYTES_PER_BLOCK))
    blocks_at_once = min(most, out.size // lanes + 2)
    remaining = tiles(out, runs, lanes, blocks_at_once)
    keys = quantile.round_keys(key)
    lock = threading.Lock()

    def work() -> None:
        memory = quantile.make_memory(blocks_at_once)
        # A caller's np.seterr must not turn a harmless underflow of a tiny limit into an error.
        with np.errstate(all="ignore"):
            while True:
                with lock:
                    tile = next(remaining, None)
                if tile is None:
                    return
                fill_tile(tile, sample_type, keys, stream, distribution, limit, memory)

    if threads == 1:
        work()
        return
    from concurrent.futures import ThreadPoolExecutor  # here, as it is slow to import

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in workers:
                worker.result()
        finally:  # after an error or Ctrl-C, leave the other threads nothing to do
            with lock:
                remaining.close()


def tiles(out: Array, runs: Iterable[Run], lanes: int, blocks_at_once: int) -> Generator[Tile]:
    """Cut the runs into tiles of at most `blocks_at_once` blocks."""
    position = 0
    for run in runs:
        rows = out[position : position + run.rows * run.length].reshape(run.rows, run.length)
        position += rows.size
        # Rows that start at different places of a block are taken in turns of equal ones.
        turns = 1 if run.row_stride % lanes == 0 else lanes
        for turn in range(min(turns, run.rows)):
            first = run.offset + turn * run.row_stride
            yield from cut(Tile(rows[turn::turns], first, run.row_stride * turns), lanes, blocks_at_once)


def cut(tile: Tile, lanes: int, blocks_at_once: int) -> Generator[Tile]:
    rows, columns = tile.out.shape
    blocks_in_row = blocks_across(tile, lanes)
    if blocks_in_row <= blocks_at_once:
        height = blocks_at_once // blocks_in_row
        for row in range(0, rows, height):
            yield tile._replace(out=tile.out[row : row + height], first=tile.first + row * tile.row_stride)
        return
    for row in range(rows):
        first = tile.first + row * tile.row_stride
        column = 0
        while column < columns:
            end = min(column + blocks_at_once * lanes - (first + column) % lanes, columns)
            yield Tile(tile.out[row : row + 1, column:end], first + column, 0)
            column = end


def blocks_across(tile: Tile, lanes: int) -> int:
    """How many Philox blocks a row of the tile touches."""
    return -(-int(tile.first % lanes + tile.out.shape[1]) // lanes)


def fill_tile(
    tile: Tile,
    sample_type: np.dtype,
    keys: Array,
    stream: int,
    distribution: int,
    limit: float,
    memory: Array,
) -> None:
    lanes = 16 // sample_type.itemsize
    weights = quantile.weights64 if lanes == 2 else quantile.weights
    rows, columns = tile.out.shape
    across = blocks_across(tile, lanes)
    starts = np.arange(rows, dtype=np.uint64) * np.uint64(tile.row_stride // lanes)
    starts += np.uint64(tile.first // lanes)
    block = (starts[:, None] + np.arange(across, dtype=np.uint64)).reshape(-1)
    scratch = quantile.make_scratch(memory, block.size, sample_type)
    made = weights(block, stream, keys, distribution, limit, scratch)
    phase = tile.first % lanes
    tile.out[...] = made.reshape(rows, across * lanes)[:, phase : phase + columns]


def thread_limit() -> int:
    """GPUINIT_NUM_THREADS, else the number of cores that the process may use."""
    setting = os.environ.get("GPUINIT_NUM_THREADS")
    if setting is None:
        if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"GPUINIT_NUM_THREADS must be an integer >= 1, got {setting!r}")
    return int(setting)
