"""The error of every sample of the float32 normal, in units in the last place.

    python tools/exhaust_normal.py

takes all 2**31 magnitudes of a word through NumPy's engine and compares with the exact quantile in float64,
by SciPy: sqrt(2) * erfinv(u) near the mean, -ndtri(a / 2) beyond, which is compared with mpmath first.
Positive words have the same magnitudes as negative ones. Needs mpmath, and SciPy and tqdm from the extra
`bench`, and some minutes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mpmath import mp, mpf
from scipy import special
from tqdm import tqdm

from gpuinit import quantile

AT_ONCE = 2**20


def exact(magnitude: np.ndarray) -> np.ndarray:
    """z of words of so many units: u = s / (2**31 + 1/2), a = 1 - u without the loss of digits."""
    u, a = magnitude / (2**31 + 0.5), (2.0**32 + 1 - 2 * magnitude) / (2.0**32 + 1)
    z = np.sqrt(2) * special.erfinv(np.minimum(u, 0.5))
    far = u > 0.5
    z[far] = -special.ndtri(a[far] / 2)
    return np.asarray(z)


def made(words: np.ndarray) -> np.ndarray:
    """The samples of words, a multiple of four of them."""
    n = words.size // 4
    scratch = quantile.make_scratch(quantile.make_memory(n), n, np.float32)
    scratch.words[:] = words.view(np.int32).reshape(4, n)
    return quantile.normal(quantile.normal_scratch(scratch)).reshape(-1)


def examine(first: int) -> tuple[float, float, float, int, float]:
    """Of AT_ONCE magnitudes: the largest error and where, the sum, neighbours out of order, by how much."""
    magnitude = np.arange(first, first + AT_ONCE)
    wanted, found = exact(magnitude), -made((-magnitude).astype(np.int32))
    unit = np.spacing(wanted.astype(np.float32)).astype(np.float64)
    error = np.abs(found - wanted) / unit
    step = np.diff(found.astype(np.float64)) / unit[1:]
    return error.max(), wanted[error.argmax()], error.sum(), int((step < 0).sum()), -step.min()


def error_of_exact() -> float:
    """The largest relative error of `exact`, at magnitudes of every size and every distance from the end."""
    powers = 2 ** np.arange(0, 31, 0.01)
    magnitudes = np.unique(np.concatenate([powers, 2**31 - powers, [2**31 - 1]]).astype(np.int64))
    with mp.workdps(40):
        wanted = [mp.sqrt(2) * mp.erfinv(mpf(int(m)) / (mpf(2) ** 31 + 0.5)) for m in magnitudes]
        return max(float(abs(z / w - 1)) for z, w in zip(exact(magnitudes).tolist(), wanted, strict=True))


def main() -> None:
    print(f"the exact quantile here is within {error_of_exact():.1e} of mpmath's")
    parts = range(1, 2**31, AT_ONCE)
    with ThreadPoolExecutor(2) as pool:
        found = list(tqdm(pool.map(examine, parts), total=len(parts), desc="magnitudes", unit="Mi"))
    errors, places, sums, disorder, steps = zip(*found, strict=True)
    print(f"largest error {max(errors):.3f} ulp, at z = {places[int(np.argmax(errors))]:.6f}")
    print(f"mean error    {sum(sums) / 2**31:.3f} ulp")
    print(f"out of order  {sum(disorder)} neighbours, by {max(steps):.2f} ulp at most")


if __name__ == "__main__":
    main()
