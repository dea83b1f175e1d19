"""`import gpuinit.jax` without JAX. These tests need no JAX."""

from __future__ import annotations

import sys

import pytest


def test_without_jax_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "gpuinit.jax", raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r'^gpuinit\.jax needs JAX\. .*: pip install "gpuinit\[jax\]"$'):
        import gpuinit.jax  # noqa: F401


def test_a_jax_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "jax.py").write_text("import a_part_of_jax")
    monkeypatch.delitem(sys.modules, "gpuinit.jax", raising=False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_of_jax"):
        import gpuinit.jax  # noqa: F401
