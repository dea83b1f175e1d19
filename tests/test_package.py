"""The wheel: it holds the kernel, and finds it from anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import gpuinit
from gpuinit.backends import cuda

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_wheel_finds_its_kernel(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert "gpuinit/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"gpuinit", f"gpuinit-{gpuinit.__version__}.dist-info"}
    code = (
        "import gpuinit, sys; from gpuinit.backends import cuda; sys.stdout.write(cuda.source(shifted=True))"
    )
    isolated = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}; "
    isolated += "print(gpuinit.__file__, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", isolated], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stderr.strip() == str(tmp_path / "site/gpuinit/__init__.py")
    assert done.stdout == cuda.source(shifted=True)


def test_the_runtime_needs_numpy_and_ml_dtypes_alone():
    names = [re.split(r"[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]]
    assert names == ["ml_dtypes", "numpy"]
