"""docs/: every code block runs, the worked example is right, and the format page is an implementation."""

from __future__ import annotations

import functools
import math
import re
import shlex
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference

import gpuinit
from gpuinit import checkpoint, quantile
from gpuinit.__main__ import main

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OPTIONAL = ("torch", "keras", "jax", "dask", "click", "rich", "matplotlib")  # what a block may need


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


PYTHON = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, (language, code) in enumerate(blocks(page))
    if language == "python"
]


def skip_without(error: ImportError) -> None:
    """A framework that is not here is a visible skip; anything else that cannot be imported is a fault."""
    name = (error.name or "").split(".")[0]
    if name not in OPTIONAL:
        raise error
    pytest.skip(f"a block of docs/: {name} is not installed")


@pytest.mark.filterwarnings("ignore")  # those of the frameworks
@pytest.mark.parametrize("code", PYTHON)
def test_the_python_blocks_run(code, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    needed = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) & set(OPTIONAL)
    for name in sorted(needed | {"jax"} if "keras" in needed else needed):
        try:
            __import__(name)
        except ImportError as error:
            skip_without(error)
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


def status(arguments: list[str]) -> int | str:
    """The exit status of the command."""
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, code in blocks(page):
        assert language in ("python", "sh", "toml"), language
        if language == "toml":
            Path("manifest.toml").write_text(code)
        for line in code.splitlines() if language == "sh" else ():
            program, *arguments = shlex.split(line)
            assert program == "gpuinit"
            pytest.importorskip("click", reason="a command of docs/: click is not installed")
            if arguments[0] == "plot":
                pytest.importorskip("matplotlib", reason="a command of docs/: matplotlib is not installed")
            assert status(arguments) == 0, line
    if page.stem == "checkpoints":
        assert Path("model.safetensors").exists()
        assert Path("again.safetensors").exists()


def test_links_lead_somewhere():
    for page in [*PAGES, DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_links_to_every_page():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{page.name})" in readme for page in PAGES)


FORMAT = (DOCS / "stream-format.md").read_text(encoding="utf-8")


def test_the_worked_example_is_what_the_plain_integers_and_the_library_make():
    rows = re.findall(r"^\| (\d+) +\| ([0-9a-f]{8}) \| ([0-9a-f]{8}) \| (\S+) +\|$", FORMAT, re.MULTILINE)
    weights = gpuinit.he_normal((3, 5), seed=42, name="layer.weight", device="cpu").reshape(-1)
    assert len(rows) == 8
    assert f"`{reference.stream_of('layer.weight'):#018x}`" in FORMAT
    for element, (number, word, bits, decimal) in enumerate(rows):
        assert int(number) == element
        assert int(word, 16) == reference.block(element // 4, 42, "layer.weight")[element % 4]
        assert int(bits, 16) == weights.view(np.uint32)[element]
        assert float(decimal) == pytest.approx(weights[element], abs=1e-8)


@functools.cache
def implementation() -> dict[str, Any]:
    """The program at the end of the format page."""
    scope: dict[str, Any] = {}
    exec(compile(re.search(r"```python\n(.*?)```", FORMAT, re.DOTALL)[1], "stream-format.md", "exec"), scope)
    return scope


PLACES = [0, 1, 2, 3, 2**31 + 1, 2**34 - 2, 2**34 + 3, 2**62 + 1]


@pytest.mark.parametrize("name", [None, "", "é", "layers.0.weight"])
@pytest.mark.parametrize("seed", [0, 42, 2**32, 2**64 - 1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_the_program_of_the_format_page_makes_the_librarys_bytes(device, name, seed, dtype):
    shape = (2**63 - 1,)
    for function, distribution in (
        (gpuinit.truncated_normal, "truncated_normal"),
        (gpuinit.uniform, "uniform"),
    ):
        for place in PLACES:
            make = implementation()["weight64" if dtype == "float64" else "weight"]
            wanted = make(place, seed, name, distribution, 0.3)
            wide = np.float64(wanted) if dtype == "float64" else np.float32(wanted)
            rounded = np.asarray(wide).astype(getattr(ml_dtypes, dtype, dtype))
            part = slice(place, place + 1)
            made = function(shape, 0.3, seed=seed, name=name, dtype=dtype, device=device.name, index=part)
            assert device.numpy(made).tobytes() == rounded.tobytes()


# Bounds of every kind: none, symmetric, asymmetric, one-sided, below the mean, far out.
BOUNDS = [(-math.inf, math.inf), (-3.0, 3.0), (-1.0, 2.5), (3.0, math.inf), (-4.0, -0.5), (8.5, 9.0)]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_program_makes_normal_weights_with_any_bounds(device, bounds, dtype):
    kind = 64 if dtype == "float64" else 32
    for place in PLACES:
        wanted = implementation()["normal_weight"](place, kind, 42, "é", 0.3, -0.7, *bounds)
        wide = np.float64(wanted) if kind == 64 else np.float32(wanted)
        rounded = np.asarray(wide).astype(getattr(ml_dtypes, dtype, dtype))
        keywords = {"seed": 42, "name": "é", "dtype": dtype, "index": slice(place, place + 1)}
        made = gpuinit.truncated_normal((2**63 - 1,), 0.3, -0.7, *bounds, device=device.name, **keywords)
        assert device.numpy(made).tobytes() == rounded.tobytes()
        wanted = implementation()["uniform_weight"](place, kind, 42, "é", -0.1, 0.7)
        wide = np.float64(wanted) if kind == 64 else np.float32(wanted)
        rounded = np.asarray(wide).astype(getattr(ml_dtypes, dtype, dtype))
        made = gpuinit.uniform((2**63 - 1,), -0.1, 0.7, device=device.name, **keywords)
        assert device.numpy(made).tobytes() == rounded.tobytes()


def test_the_tables_of_the_format_page_are_its_programs():
    narrow = re.findall(r"^\| ([RYNQ]) +\|(.*)\|$", FORMAT, re.MULTILINE)
    assert [letter for letter, _ in narrow] == list("RYNQ")
    for letter, cells in narrow:
        for number, cell in enumerate(filter(None, map(str.strip, cells.split("|")))):
            assert implementation()["f32"](float(cell)) == implementation()[f"{letter}{number}"]
            assert float(np.float32(cell)) == float(getattr(quantile, letter)[number])
    wide = re.findall(r"^\| (?:1|v|v\^\d+) +\| (\S*) +\| (\S+) +\|$", FORMAT, re.MULTILINE)
    for letter, column in zip("NQ", zip(*wide, strict=True), strict=True):
        values = [float(cell) for cell in column if cell]
        assert values == [*implementation()[f"{letter}64"], 1]
        assert values == [*getattr(quantile, f"{letter}64"), 1]
    outside = re.search(r"R0 = (\S+), +R1 = (\S+)", FORMAT)
    assert tuple(map(float, outside.groups())) == implementation()["R64"] == quantile.R64


def test_what_the_pages_say_of_the_code_is_so():
    text = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    assert checkpoint.WINDOW_BYTES == 64 * 2**20
    assert "at most 64 MiB" in text
    assert all(f"`{setting}`" in text for setting in checkpoint.SETTINGS)
    assert all(f"`{name}`" in text for name in (*checkpoint.CONSTANTS, checkpoint.SKIP))
    pairs = 10**6 * (10**6 - 1) / 2
    assert math.isclose(pairs / 2**64, 3e-8, rel_tol=0.1)
    assert "chance of 3e-8" in " ".join((DOCS / "guarantee.md").read_text(encoding="utf-8").split())
