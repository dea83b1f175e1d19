"""Make kernels/normal_tables.cuh: the quantile of the normal distribution as polynomials, segment by segment.

    python tools/make_normal_tables.py

writes the file, which the kernel, NumPy's engine and Numba's all read. tests/test_normal_tables.py makes it
anew and compares. Needs mpmath and takes about half a minute.

With u uniform in [-1, 1] and a = 1 - |u|, which is the probability that a normal number lies further out, the
sample is

    z = u * R(a),    R(a) = Phi^-1(1 - a/2) / (1 - a),

Phi the standard normal distribution function. R is smooth but for the logarithm at a = 0, so every octave
[2**e, 2**(e+1)) of a is cut into equally long segments, and R is interpolated in each at its Chebyshev nodes:
the dyadic tables of Giles and Sheridan-Methven, "Approximating inverse cumulative distribution functions to
produce approximate random variables", ACM TOMS 49, 2023.

    NORMAL32    8 segments an octave from 2**-64 up, cubics in t; float32
    NORMAL64   16 segments an octave from 2**-96 up, polynomials of degree 7 in t - 1; float64

t - 1 is how far a / 2**e lies within its segment, from 0 to 1/8 (1/16). A row is one segment, constant first;
the last row is a = 1. The unit of u is 2**-31 (2**-63), so every coefficient is multiplied by it, which is
exact. Powers of t save the kernel a subtraction; in float64 they would cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from mpmath import mp, mpf

FILE = Path(__file__).parent.parent / "kernels" / "normal_tables.cuh"
DIGITS = 50

HEADER = """\
/* The quantile of the normal distribution, made by tools/make_normal_tables.py, which says what a row is.
 * SPDX-License-Identifier: Apache-2.0 */
"""


class Table(NamedTuple):
    """How one of the tables is laid out."""

    name: str
    element: str  # in C
    octaves: int  # from 2**-octaves to 1
    segments: int  # of an octave
    degree: int
    unit: float  # of u

    @property
    def rows(self) -> int:
        return self.octaves * self.segments + 1


NORMAL32 = Table("NORMAL32", "float", 64, 8, 3, 2.0**-31)
NORMAL64 = Table("NORMAL64", "double", 96, 16, 7, 2.0**-63)


def quantile(a: mpf) -> mpf:
    """Phi^-1(1 - a/2), by Halley's method from a float64 that is nearly there."""
    x = -mpf(NormalDist().inv_cdf(float(a) / 2))
    for _ in range(2):  # the error of 1e-15 is cubed, twice
        error = (mp.erfc(x / mp.sqrt(2)) - a) / (mp.sqrt(2 / mp.pi) * mp.exp(-x * x / 2))
        x += error / (1 - x * error / 2)
    return x


def ratio(a: mpf) -> mpf:
    """R(a)."""
    return mp.sqrt(mp.pi / 2) if a == 1 else quantile(a) / (1 - a)


def row(table: Table, number: int) -> list[float]:
    """The coefficients of one segment, constant first, rounded to the table's type."""
    if number == table.rows - 1:
        exact = [ratio(mpf(1))] + [mpf(0)] * table.degree
    else:
        exponent, segment = divmod(number, table.segments)
        start, width = 1 + mpf(segment) / table.segments, mpf(1) / table.segments
        count = table.degree + 1
        nodes = [start + width * (1 - mp.cos(mp.pi * (2 * k + 1) / (2 * count))) / 2 for k in range(count)]
        values = [ratio(mp.ldexp(t, exponent - table.octaves)) for t in nodes]
        origin = start if table.element == "double" else start - 1
        variables = [t - origin for t in nodes]
        exact = list(mp.lu_solve(mp.matrix([[x**k for k in range(count)] for x in variables]), values))
    kind = np.float32 if table.element == "float" else float
    return [float(kind(coefficient)) * table.unit for coefficient in exact]


def lines(table: Table) -> Iterator[str]:
    """The table as C, in hexadecimal floats."""
    columns, suffix = table.degree + 1, "f" if table.element == "float" else ""
    array = f"{table.element} {table.name}[{table.rows}][{columns}]"
    yield f"static __device__ const __align__(16) {array} = {{\n"
    for number in range(table.rows):
        numbers = [shortest(coefficient) + suffix for coefficient in row(table, number)]
        yield "{" + ", ".join(numbers) + "},\n"
    yield "};\n"


def shortest(number: float) -> str:
    """As a hexadecimal float, without zeros that say nothing."""
    digits, exponent = number.hex().split("p")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}p{exponent}"


def main() -> None:
    with mp.workdps(DIGITS):
        FILE.write_text("".join([HEADER, *lines(NORMAL32), *lines(NORMAL64)]), encoding="utf-8")


if __name__ == "__main__":
    main()
