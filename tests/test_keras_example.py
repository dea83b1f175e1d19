"""examples/keras_dense.py runs, and its picture shows what it says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("keras", "matplotlib"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent

CHECK = """
import keras_dense
from keras_dense import *
he, glorot = (spreads(lambda layer: kind(seed=layer)) for kind in (HeNormal, GlorotNormal))
for signal, faded in zip(he, glorot):
    ends = signal[0] / signal[-1]
    assert 0.2 < ends < 5, ends
    ratio = max(faded) / min(faded)
    assert ratio > 2**10, ratio  # of 2**15 in expectation
w = np.linspace(-1, 1, 2**20 + 1)
assert abs(density(w, 0.1).sum() * 2 / 2**20 - 1) < 1e-4
assert abs((density(w, 0.1) * w * w).sum() * 2 / 2**20 - 0.01) < 1e-5
"""


def test_the_example_runs_and_shows_what_it_says(tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "numpy", "MPLBACKEND": "Agg", "KERAS_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'examples'}"
    example = [sys.executable, ROOT / "examples/keras_dense.py", tmp_path]
    done = subprocess.run(example, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(2, 10)" in done.stdout
    for name in ("relu_spread.png", "density.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
