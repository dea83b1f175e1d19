"""Fit the coefficients of the truncated-normal quantile (stream format 1).

    python tools/fit_quantile.py

prints the tables that stand in gpuinit/quantile.py and kernels/fill.cu. tests/test_quantile.py runs the
same fit and compares. Needs mpmath and takes about a second.

With u uniform in [-1, 1] and Phi the standard normal distribution function, the sample is

    z(u) = Phi^-1(1/2 + c*u),   c = Phi(2) - 1/2,

which is the normal distribution cut at +-2. The kernel and NumPy compute it in units of its bound, as
z/2 = u * R(v) with v = 1 - u*u and R = P/Q. R falls from 1 where v = 0 (the bound) to c*sqrt(2*pi)/2 =
0.598 where v = 1 (the centre). P and Q have the same degree and the same constant term, so the bound is
met exactly, and Q is monic, which saves a multiplication. All coefficients come out positive: sums of
positive terms lose no digits to cancellation, and v in place of u*u is what makes them so.

The fit is minimax in relative error by Remez's exchange algorithm for rational functions. In each step
the 2*degree unknown coefficients and the levelled error E solve

    P(v_i) = f(v_i) * (1 + (-1)**i * E) * Q(v_i)      at 2*degree + 1 points v_i,

by Newton's method in E; the points then move to the extrema of the error found.
"""

from __future__ import annotations

from collections.abc import Callable

from mpmath import mp, mpf

FLOAT32_DEGREE = 4  # relative error 7.3e-8, about half a unit in the last place of float32
FLOAT64_DEGREE = 10  # relative error 7.2e-18; degree 9 would give 3.3e-16, three units in the last place

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


def level(f: Callable[[mpf], mpf], points: list[mpf], degree: int) -> tuple[list[mpf], list[mpf], mpf]:
    """P, Q and the error E that alternates on the 2*degree + 1 points."""
    unknowns = 2 * degree
    values = [f(v) for v in points]
    error, q_at = mpf(0), [mpf(1)] * len(points)
    for _ in range(50):
        matrix, right = mp.matrix(unknowns + 1), mp.matrix(unknowns + 1, 1)
        for i, v in enumerate(points):
            sign = (-1) ** i
            target = values[i] * (1 + sign * error)
            matrix[i, 0] = 1 - target  # the shared constant term of P and Q
            for k in range(1, degree):
                matrix[i, k] = -target * v**k
            for k in range(1, degree + 1):
                matrix[i, degree + k - 1] = v**k
            matrix[i, unknowns] = -values[i] * sign * q_at[i]
            right[i] = target * v**degree
        solution = list(mp.lu_solve(matrix, right))
        q = [*solution[:degree], mpf(1)]
        p = [solution[0], *solution[degree:unknowns]]
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


def fit(degree: int) -> tuple[list[mpf], list[mpf], mpf]:
    """Minimax P and Q, constants first, and the largest relative error of P/Q."""
    with mp.workdps(DIGITS):
        count = 2 * degree + 1
        grid = chebyshev_points(GRID_POINTS_PER_EXTREMUM * count)
        values = [halved_quantile_over_u(v) for v in grid]
        points = chebyshev_points(count)
        for _ in range(20):
            p, q, levelled = level(halved_quantile_over_u, points, degree)
            errors = [
                evaluate(p, v) / evaluate(q, v) / value - 1 for v, value in zip(grid, values, strict=True)
            ]
            largest = max(abs(error) for error in errors)
            points = extrema(grid, errors)
            if len(points) != count:
                raise ArithmeticError(f"the error has {len(points)} extrema, not {count}")
            if largest < abs(levelled) * mpf("1.0005"):
                return p, q, largest
    raise ArithmeticError("the exchange did not converge")


def main() -> None:
    import numpy as np

    for name, kind, degree in (
        ("float32", np.float32, FLOAT32_DEGREE),
        ("float64", np.float64, FLOAT64_DEGREE),
    ):
        p, q, error = fit(degree)
        print(f"{name}: degree {degree}, largest relative error {mp.nstr(error, 3)}")
        for letter, coefficients in (("P", p), ("Q", q)):
            for k, coefficient in enumerate(coefficients):
                print(f"    {letter}{k} = {kind(mp.nstr(coefficient, 25))!s}")


if __name__ == "__main__":
    main()
