"""`import gpuinit.keras` without Keras. These tests need no Keras."""

from __future__ import annotations

import sys

import pytest


def test_without_keras_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "gpuinit.keras", raising=False)
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r'^gpuinit\.keras needs Keras\. .* "gpuinit\[keras\]", and one of'):
        import gpuinit.keras  # noqa: F401


def test_a_keras_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "keras.py").write_text("import a_part_of_keras")
    monkeypatch.delitem(sys.modules, "gpuinit.keras", raising=False)
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_of_keras"):
        import gpuinit.keras  # noqa: F401
