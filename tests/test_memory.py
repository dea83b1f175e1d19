"""Memory for other libraries, and theirs."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest

from gpuinit import memory


@pytest.fixture
def asked(monkeypatch):
    """What libc is asked for, as (address, size)."""
    calls = []

    class Libc:
        def madvise(self, address, size, advice):
            assert advice.value == 14 if hasattr(advice, "value") else advice == 14  # MADV_HUGEPAGE
            calls.append((address.value, size.value))

    monkeypatch.setattr(memory, "libc", Libc)
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has it")
@pytest.mark.parametrize("start", [2**40, 2**40 + 1, 2**40 + 64, 2**40 - 64])
def test_huge_pages_are_asked_for_within_large_memory_alone(asked, start):
    memory.ask_for_huge_pages(start, memory.HUGE_PAGES_FROM - 1)
    assert asked == []
    size = memory.HUGE_PAGES_FROM + 100
    memory.ask_for_huge_pages(start, size)
    ((first, length),) = asked
    assert first % mmap.PAGESIZE == 0
    assert start <= first < start + mmap.PAGESIZE
    assert first + length == start + size


def test_elsewhere_nothing_is_asked_for(asked, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    memory.ask_for_huge_pages(2**40, 2**30)
    assert asked == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has it")
def test_what_is_in_the_memory_stays():
    array = np.arange(2**20, dtype=np.float64)
    memory.ask_for_huge_pages(array.ctypes.data, array.nbytes)
    assert (array == np.arange(2**20)).all()
