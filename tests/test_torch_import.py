"""`import gpuinit.torch` without PyTorch. These tests need no torch."""

from __future__ import annotations

import sys

import pytest


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "gpuinit.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r'^gpuinit\.torch needs .*: pip install "gpuinit\[torch\]"$'):
        import gpuinit.torch  # noqa: F401


def test_a_torch_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("import a_part_of_torch")
    monkeypatch.delitem(sys.modules, "gpuinit.torch", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_of_torch"):
        import gpuinit.torch  # noqa: F401
