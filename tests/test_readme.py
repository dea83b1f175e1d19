"""README.md: its code runs, and its commands are what .ci/run runs."""

from __future__ import annotations

import re
from pathlib import Path

import gpuinit
from gpuinit.backends import cpu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order(cupy_sim, recwarn):
    """On the stand-in device: the default device is CUDA, as for a reader who has a GPU."""
    run_blocks()


def test_the_python_blocks_run_without_a_gpu(monkeypatch):
    monkeypatch.setattr("gpuinit.devices.find_cuda_problem", lambda _: "there is no CUDA device")
    monkeypatch.setattr("gpuinit.devices.fallback_warned", True)
    run_blocks()


def run_blocks():
    python = [code for language, code in BLOCKS if language == "python"]
    blocks = [code for code in python if "import torch" not in code]
    assert len(blocks) == 3
    assert len(python) == 4  # tests/test_torch_example.py runs that of torch
    scope: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), scope)


def test_the_limits_that_it_names_are_those_of_the_code():
    assert f"2**{cpu.ELEMENTS_TO_REPAY.bit_length() - 1} weights" in README
    assert cpu.MOST_THREADS == 9
    assert "up to nine" in README


def test_every_block_is_run():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    commands = [code for language, code in BLOCKS if language == "sh"]
    assert len(commands) == 2
    assert all(code.count("\n") == 1 for code in commands)
    assert commands[0].endswith("-m gpuinit\n")
    assert commands[1].endswith("-m pytest\n")
    assert "'/^```sh$/,/^```$/" in (ROOT / ".ci/run").read_text()  # it takes them from the README itself


def test_every_public_name_is_in_the_readme_and_documented():
    for name in gpuinit.__all__:
        assert f"`{name}" in README or f"gpuinit.{name}" in README
        assert len(getattr(gpuinit, name).__doc__) > 60
