"""Print the golden digests: SHA-256 of the little-endian bytes of arrays that pin the stream format.

    python tools/golden.py > tests/golden.json

tests/test_golden.py compares every device with the table. A digest that changes is a breaking change: the
format's number is raised and the reason stands in CHANGELOG.md, or the change is a fault.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from typing import Any

import gpuinit

FORMAT = 2

DTYPES = ("float32", "float16", "bfloat16", "float64")


def cases() -> list[dict[str, Any]]:
    """Function, positional arguments and keywords of every array in the table."""
    found: list[dict[str, Any]] = []

    def add(function: str, *arguments: object, **keywords: object) -> None:
        found.append({"function": function, "arguments": arguments, "keywords": keywords})

    for dtype, function in itertools.product(DTYPES, ("he_normal", "he_uniform")):
        add(function, (1000, 1001), seed=0, dtype=dtype)
    for function in ("glorot_normal", "glorot_uniform", "lecun_normal", "lecun_uniform"):
        add(function, (3, 3, 64, 129), seed=2**32, name="conv.kernel")
    for dtype in DTYPES:
        add("truncated_normal", 65537, 0.02, seed=2**64 - 1, name="embedding", dtype=dtype)
        add("uniform", 65537, 1.0, seed=2**63, name="é", dtype=dtype)
    add("variance_scaling", (64, 63, 62), 0.5, "fan_out", in_axis=0, out_axis=2, batch_axis=1, seed=1)
    add("he_normal", (4096, 4096), seed=0)
    add("he_normal", (), seed=3)
    for dtype in DTYPES:
        add("normal", 65537, 0.02, seed=2**32 + 1, name="wte", dtype=dtype)
        add("normal", (257, 255), 1.5, -0.25, seed=4, dtype=dtype)
        add("truncated_normal", 65537, 0.02, 0.0, -3.0, 3.0, seed=5, name="cls_token", dtype=dtype)
        add("truncated_normal", (257, 255), 0.3, 0.1, -1.0, 2.5, seed=6, dtype=dtype)
        add("truncated_normal", 65537, 1.0, lower=3.0, upper=math.inf, seed=7, dtype=dtype)
        add("uniform", 65537, -0.25, 1.5, seed=8, name="dt_bias", dtype=dtype)
    for dtype in ("float32", "bfloat16", "float64"):
        add("normal", (1000, 1001), seed=0, dtype=dtype, stddev=1.0)
    add("truncated_normal", (1000, 1001), seed=0, dtype="float32", stddev=1.0, lower=-3.0, upper=3.0)
    add("truncated_normal", 65537, 1.0, 0.0, -9.0, -8.5, seed=9)
    add("truncated_normal", 65537, 0.5, 1.0, seed=10)
    add("variance_scaling", (1000, 1001), 1.0, "fan_geo_avg", "untruncated_normal", seed=11)
    return found


def make(case: dict[str, Any], **keywords: object) -> Any:
    """The array of a case."""
    return getattr(gpuinit, case["function"])(*case["arguments"], **case["keywords"], **keywords)


def main() -> None:
    table = []
    for case in cases():
        weights = make(case, device="cpu")
        little = weights.astype(weights.dtype.newbyteorder("<"), copy=False)
        table.append({**case, "sha256": hashlib.sha256(little.tobytes()).hexdigest()})
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in table)
    print(f'{{"format": {FORMAT}, "arrays": [\n  {rows}\n]}}')


if __name__ == "__main__":
    main()
