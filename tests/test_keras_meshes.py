"""gpuinit.keras on JAX with a keras.distribution, on 1 to 8 devices: keras_meshes.py has the checks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("keras", "jax"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_on_any_number_of_devices(count, tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "KERAS_HOME": str(tmp_path)}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    environment["PYTHONPATH"] = str(ROOT)
    script = Path(__file__).with_name("keras_meshes.py")
    done = subprocess.run(
        [sys.executable, script, str(count), tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "equal"
