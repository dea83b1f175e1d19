"""Fit the coefficients of the truncated-normal quantile (stream format 2).

    python tools/fit_quantile.py

prints the tables that stand in gpuinit/quantile.py and kernels/fill.cu. tests/test_quantile.py runs the
same fit and compares. Needs mpmath and takes about a second.

With u uniform in [-1, 1] and Phi the standard normal distribution function, the sample is

    z(u) = Phi^-1(1/2 + c*u),   c = Phi(2) - 1/2,

which is the normal distribution cut at +-2. The kernel and NumPy compute it in units of its bound, as
z/2 = u * R. With t = u*u and v = 1 - t, R is a ratio of polynomials that falls from 1 where v = 0 (the bound)
to c*sqrt(2*pi)/2 = 0.598 where v = 1 (the centre).

The fit is minimax by Remez's exchange algorithm for rational functions, in v and with R = 1 where v = 0. Its
relative error has a weight, which falls from 2 at the bound to nearly 1: rounding u and t moves the sample
the more the steeper R is, so there the fit has to leave more room. With P of degree m and Q of degree n and
monic, each step solves for the m + n unknown coefficients and the levelled error E

    P(v_i) = f(v_i) * (1 + (-1)**i * E / weight(v_i)) * Q(v_i)      at m + n + 1 points v_i,

by Newton's method in E; the points then move to the extrema of the error found.

P/Q is then divided out, which leaves shorter polynomials to compute. For float64, 10/10, in v,

    R = R0 + R1 * N/Q,    N and Q monic.

For float32, 5/3, in t, where v is not needed,

    R = R0 + R1*t + N * (R2 + R3/Q),    Y = (Y0 - t)*(Y1 - t),    N = Y + N0,    Q = Y*(Q1 - t) + Q0:

nine coefficients, as 5/3 has, and the fewest operations known (benchmarks/budget.md). Where R is steep, near
t = 1, the differences from t are exact or nearly so, and little cancels. What rounding the coefficients to
float32 spoils, a search among their neighbours mends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from mpmath import mp, mpf

FLOAT32_DEGREES = 5, 3
FLOAT64_DEGREES = 10, 10

DIGITS = 40
GRID_POINTS_PER_EXTREMUM = 40


def halved_quantile_over_u(v: mpf) -> mpf:
    """The function to fit: z(u) / (2*u) where u = sqrt(1 - v)."""
    c = mp.erf(mp.sqrt(2)) / 2
    u = mp.sqrt(1 - v)
    if u == 0:
        return c * mp.sqrt(2 * mp.pi) / 2
    return mp.sqrt(2) * mp.erfinv(2 * c * u) / (2 * u)


def spread(t: mpf) -> mpf:
    """Map [0, 1] onto itself with the points dense near 0, where the function changes fastest.

    z has its logarithmic singularity at u = 1/(2c), that is at v = -0.0976; hence 0.1.
    """
    a = mpf("0.1")
    return a * ((1 + 1 / a) ** t - 1)


def weight(v: mpf) -> mpf:
    return 1 + mpf("0.05") / (mpf("0.05") + v)


def chebyshev_points(count: int) -> list[mpf]:
    """`count` points in (0, 1], spread, the last one exactly 1."""
    points = [spread((1 - mp.cos(mp.pi * k / count)) / 2) for k in range(1, count)]
    return [*points, mpf(1)]


def evaluate(coefficients: list[mpf], v: mpf) -> mpf:
    """The polynomial with these coefficients, constant first."""
    value = mpf(0)
    for coefficient in reversed(coefficients):
        value = value * v + coefficient
    return value


def level(f: Callable[[mpf], mpf], points: list[mpf], m: int, n: int) -> tuple[list[mpf], list[mpf], mpf]:
    """P, Q and the error E that alternates on the m + n + 1 points."""
    unknowns = m + n
    values = [f(v) for v in points]
    error, q_at = mpf(0), [mpf(1)] * len(points)
    for _ in range(50):
        matrix, right = mp.matrix(unknowns + 1), mp.matrix(unknowns + 1, 1)
        for i, v in enumerate(points):
            share = (-1) ** i / weight(v)
            target = values[i] * (1 + share * error)
            matrix[i, 0] = 1 - target  # the shared constant term of P and Q
            for k in range(1, n):
                matrix[i, k] = -target * v**k
            for k in range(1, m + 1):
                matrix[i, n + k - 1] = v**k
            matrix[i, unknowns] = -values[i] * share * q_at[i]
            right[i] = target * v**n
        solution = list(mp.lu_solve(matrix, right))
        q = [*solution[:n], mpf(1)]
        p = [solution[0], *solution[n:unknowns]]
        step = solution[unknowns]
        error += step
        q_at = [evaluate(q, v) for v in points]
        if abs(step) < mpf(10) ** (10 - DIGITS):
            return p, q, error
    raise ArithmeticError("the levelled error did not converge")


def extrema(grid: list[mpf], errors: list[mpf]) -> list[mpf]:
    """The point of largest error in every run of equal sign."""
    best: list[tuple[mpf, mpf]] = []
    for v, error in zip(grid, errors, strict=True):
        if best and (error > 0) == (best[-1][1] > 0):
            if abs(error) > abs(best[-1][1]):
                best[-1] = (v, error)
        else:
            best.append((v, error))
    return [v for v, _ in best]


def fit(m: int, n: int) -> tuple[list[mpf], list[mpf], mpf]:
    """Minimax P and Q, constants first, and the largest weighted relative error of P/Q."""
    with mp.workdps(DIGITS):
        count = m + n + 1
        grid = chebyshev_points(GRID_POINTS_PER_EXTREMUM * count)
        values = [halved_quantile_over_u(v) for v in grid]
        points = chebyshev_points(count)
        for _ in range(20):
            p, q, levelled = level(halved_quantile_over_u, points, m, n)
            errors = [
                weight(v) * (evaluate(p, v) / evaluate(q, v) / value - 1)
                for v, value in zip(grid, values, strict=True)
            ]
            largest = max(abs(error) for error in errors)
            points = extrema(grid, errors)
            if len(points) != count:
                raise ArithmeticError(f"the error has {len(points)} extrema, not {count}")
            if largest < abs(levelled) * mpf("1.0005"):
                return p, q, largest
    raise ArithmeticError("the exchange did not converge")


def divide(p: list[mpf], q: list[mpf]) -> tuple[list[mpf], list[mpf]]:
    """Quotient and remainder."""
    quotient: list[mpf] = []
    while len(p) >= len(q):
        factor = p[-1] / q[-1]
        quotient = [factor, *quotient]
        p = [a - factor * b for a, b in zip(p, [mpf(0)] * (len(p) - len(q)) + q, strict=True)][:-1]
    return quotient, p


def in_t(polynomial: list[mpf]) -> list[mpf]:
    """The polynomial in v as one in t = 1 - v."""
    powers = range(len(polynomial))
    return [(-1) ** k * sum(polynomial[j] * mp.binomial(j, k) for j in powers[k:]) for k in powers]


def float64_coefficients() -> dict[str, list[float]]:
    p, q, _ = fit(*FLOAT64_DEGREES)
    with mp.workdps(DIGITS):
        (r0,), rest = divide(p, q)
        exact = {"R": [r0, rest[-1]], "N": [a / rest[-1] for a in rest[:-1]], "Q": q[:-1]}
    return {name: [float(value) for value in values] for name, values in exact.items()}


def float32_coefficients() -> dict[str, list[np.float32]]:
    p, q, _ = fit(*FLOAT32_DEGREES)
    with mp.workdps(DIGITS):
        q0, q1, q2, _ = q = in_t(q)
        (r0, r1, r2), (n0, n1, n2) = divide(in_t(p), q)
        n0, y1 = n0 / n2, n1 / n2  # N = t**2 + y1*t + n0
        d1 = q2 + y1
        y0 = y1 * d1 - q1  # Y = t**2 + y1*t + y0
        root = mp.sqrt(y1**2 / 4 - y0)
        r = [r0 - r2 * n0, r1 - r2 * y1, r2, n2]
        values = [*r, -y1 / 2 - root, -y1 / 2 + root, n0 - y0, q0 - y0 * d1, d1]
    rounded = list(round_together([float(value) for value in values]))
    return {"R": rounded[:4], "Y": rounded[4:6], "N": rounded[6:7], "Q": rounded[7:]}


def round_together(values: list[float]) -> np.ndarray:
    """The float32 coefficients near these with the least error, pair after pair; never R < 1 at the bound."""
    grid = [mpf(0), *chebyshev_points(400)]
    t = np.array([float(1 - v) for v in grid])
    weights = np.array([float(weight(v)) for v in grid])
    exact = np.array([float(halved_quantile_over_u(v)) for v in grid])

    def error(values: np.ndarray) -> float:
        r0, r1, r2, r3, y0, y1, n0, q0, q1 = values.astype(float)
        y = (y0 - t) * (y1 - t)
        errors = (r0 + r1 * t + (y + n0) * (r2 + r3 / (y * (q1 - t) + q0))) / exact - 1
        return float(np.abs(weights * errors).max() if errors[0] >= 0 else np.inf)

    best = np.array(values, np.float32)
    least = np.inf
    while error(best) < least or least == np.inf:
        least = error(best)
        for i, j in itertools.combinations(range(len(best)), 2):
            steps = itertools.product(range(-2, 3), repeat=2)
            moved = [best.copy() for _ in range(25)]
            for values_moved, (a, b) in zip(moved, steps, strict=True):
                values_moved[[i, j]] += np.spacing(best[[i, j]]) * np.array([a, b], np.float32)
            best = min([best, *moved], key=error)
    return best


def main() -> None:
    for name, tables in (("float32", float32_coefficients()), ("float64", float64_coefficients())):
        print(name)
        for letter, coefficients in tables.items():
            for k, coefficient in enumerate(coefficients):
                print(f"    {letter}{k} = {coefficient!s}")


if __name__ == "__main__":
    main()
