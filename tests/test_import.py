"""`import gpuinit` is cheap and safe: no CuPy, no framework, no thread, no device."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("cupy", "cupy_backends", "torch", "jax", "keras", "tensorflow", "numba", "scipy", "mpmath")

LIST = """
import sys, threading
{statement}
print(*sorted({{name.split(".")[0] for name in sys.modules}}), threading.active_count())
"""


def modules_after(statement: str) -> list[str]:
    code = LIST.format(statement=statement)
    run = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()


def test_importing_loads_nothing_heavy_and_starts_nothing():
    *names, threads = modules_after("import gpuinit")
    assert "gpuinit" in names
    assert not set(HEAVY) & set(names)
    assert threads == "1"


def test_beyond_numpy_it_loads_only_itself_ml_dtypes_and_the_standard_library():
    third_party = set(modules_after("import gpuinit")) - set(modules_after("import numpy"))
    assert third_party - sys.stdlib_module_names == {"gpuinit", "ml_dtypes"}


def test_filling_on_the_cpu_loads_nothing_heavy():
    names = modules_after("import gpuinit; gpuinit.he_normal((512, 512), device='cpu')")
    assert not set(HEAVY) & set(names)


@pytest.mark.parametrize("name", ["mpmath"])
def test_these_tests_can_fail(name):
    assert name in modules_after(f"import gpuinit, {name}")
