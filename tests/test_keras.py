"""gpuinit.keras on every backend of Keras, each in a process of its own: keras_backend.py has the checks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("keras") is None:
    pytest.skip('Keras is not installed: pip install "gpuinit[keras]"', allow_module_level=True)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow", "numpy"])
def test_on_every_backend(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "KERAS_HOME": str(tmp_path)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "131072"}
    script = Path(__file__).with_name("keras_backend.py")
    done = subprocess.run(
        [sys.executable, script, backend, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "equal"
