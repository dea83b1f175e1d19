"""The files of kernels/: the CUDA source, and the tables of the normal's quantile, for every backend."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuinit import loading


@cache
def read(name: str) -> str:
    """The text of a file: inside the package in a wheel, beside it in a checkout or an editable install."""
    with loading.brief:
        from pathlib import Path  # here, as it is slow to import

    package = Path(__file__).parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(f"gpuinit is installed without kernels/{name} in {package}")


@cache
def normal_table(dtype: np.dtype) -> npt.NDArray[Any]:
    """The coefficients of the segments, a row each, constant first, for a sample of float32 or float64."""
    array = "NORMAL64" if dtype == np.float64 else "NORMAL32"
    text = read("normal_tables.cuh").partition(f" {array}[")[2]
    lines = text.partition("= {\n")[2].partition("\n};")[0].splitlines()
    rows = [[float.fromhex(number.rstrip("f")) for number in line.strip("{},").split(", ")] for line in lines]
    return np.array(rows, dtype)
