"""kernels/normal_tables.cuh, made anew, and what the samplers read of it."""

from __future__ import annotations

import make_normal_tables
import numpy as np
import pytest
from make_normal_tables import NORMAL32, NORMAL64
from mpmath import mp

from gpuinit import quantile
from gpuinit.kernel_files import normal_table


def test_the_file_is_what_the_script_makes(tmp_path, monkeypatch):
    shipped = make_normal_tables.FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(make_normal_tables, "FILE", tmp_path / "normal_tables.cuh")
    make_normal_tables.main()
    assert make_normal_tables.FILE.read_text(encoding="utf-8") == shipped


@pytest.mark.parametrize("table", [NORMAL32, NORMAL64], ids=lambda table: table.name)
def test_the_samplers_read_the_file(table):
    read = normal_table(np.dtype(np.float32 if table is NORMAL32 else np.float64))
    assert read.shape == (table.rows, table.degree + 1)
    with mp.workdps(make_normal_tables.DIGITS):
        for number in (0, 1, table.rows // 2, table.rows - 2, table.rows - 1):
            assert read[number].tolist() == make_normal_tables.row(table, number)


@pytest.mark.parametrize("table", [NORMAL32, NORMAL64], ids=lambda table: table.name)
def test_the_segments_are_found_by_the_bits_of_a_probability(table):
    """The constants of the samplers, by what they are for: the segment of a, and its place there."""
    kind = np.float32 if table is NORMAL32 else np.float64
    found = quantile.segments(np.dtype(kind))
    bits = np.dtype(f"i{np.dtype(kind).itemsize}")
    for number in (0, 1, table.segments, 100, table.rows - 1):
        octave, segment = divmod(number, table.segments)
        for place in (0, 0.25, 0.5):
            a = kind(2.0 ** (octave - table.octaves) * (1 + (segment + place) / table.segments)).view(bits)
            assert (a >> found.shift) - found.first == number
            t = np.bitwise_or(a & found.fraction, found.one).view(kind)
            assert t - 1 == place / table.segments
    assert found.octave == table.segments
