"""What a call pays once, and what the first calls of several processes do to each other."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpuinit
from gpuinit.backends import cuda

ROOT = Path(__file__).parent.parent


def test_a_warm_call_compiles_reads_and_looks_for_nothing_again(cupy_sim, monkeypatch):
    gpuinit.he_normal((8, 8), device="cuda")
    monkeypatch.setattr(cupy_sim, "RawKernel", lambda *_, **__: pytest.fail("a second kernel"))
    monkeypatch.setattr(cuda, "source", lambda: pytest.fail("read again"))
    monkeypatch.setattr(cupy_sim.runtime, "getDeviceCount", lambda: pytest.fail("looked for again"))
    weights = gpuinit.he_normal((8, 8), seed=1, device="cuda")
    assert weights.get().tobytes() == gpuinit.he_normal((8, 8), seed=1, device="cpu").tobytes()


@pytest.mark.parametrize("spans", [1, 3, 32])  # at 32 the block number carries into its high word
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_row_may_go_from_one_span_of_blocks_to_the_next(device, dtype, spans):
    blocks = int(re.search(r"#define SPAN (\w+)u", cuda.source())[1], 0)
    border = spans * blocks * (2 if dtype == "float64" else 4)  # its element
    keywords = {"seed": 5, "dtype": dtype, "index": slice(border - 1000, border + 1001)}
    made = device.numpy(gpuinit.he_normal(2**40, device=device.name, **keywords))
    assert made.tobytes() == gpuinit.he_normal(2**40, device="cpu", **keywords).tobytes()


FIRST_CALL = """
import sys, cuda_sim
sys.modules["cupy"] = cuda_sim
import gpuinit, hashlib
weights = gpuinit.he_normal((257, 33), seed=3, device="cuda")
print(hashlib.sha256(weights.get().tobytes()).hexdigest())
"""


def test_first_calls_from_many_processes_agree(cupy_sim):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", FIRST_CALL]
    calls = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    made = [call.communicate()[0].strip() for call in calls]
    expected = hashlib.sha256(gpuinit.he_normal((257, 33), seed=3, device="cpu").tobytes()).hexdigest()
    assert made == [expected] * 4
