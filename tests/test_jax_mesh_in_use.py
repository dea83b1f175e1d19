"""gpuinit.jax under jax.set_mesh: eagerly and under jit, through Flax's two libraries, on 1 to 8 devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_with_a_mesh_in_use_it_is_where_jax_has_its_own(devices):
    pytest.importorskip("flax", reason="Flax is not installed")
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("jax_mesh_in_use.py")
    done = subprocess.run(
        [sys.executable, script, str(devices)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "equal"
