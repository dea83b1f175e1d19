"""What the system lets the process have: a container's quota of the cores' time, and address space."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpuinit
from gpuinit import limits
from gpuinit.backends import cpu

# The quota


def made_up(tmp_path: Path, groups: str, mounts: dict[str, tuple[str, str]], files: dict[str, str]) -> str:
    """The folder of a process in these groups, and what its control groups have in their files.

    mounts: by the folder where it is mounted, its top and what follows the dash in mountinfo.
    """
    process = tmp_path / "process"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"]
    for number, (place, (top, what)) in enumerate(mounts.items()):
        place = str(tmp_path / place).replace(" ", "\\040")
        lines.append(f"{30 + number} 22 0:{number} {top} {place} rw,nosuid shared:{number} master:1 - {what}")
    (process / "mountinfo").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return str(process)


V2 = ("/", "cgroup2 cgroup2 rw,nsdelegate")
V1 = ("/", "cgroup cgroup rw,cpu,cpuacct")
V1_LINES = "5:memory:/else\n4:cpu,cpuacct:/a/b\n3:cpuset:/else\n1:name=systemd:/else\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ("0::/\n", {"cg": V2}, {"cg/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cg": V2}, {"cg/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cg": V2}, {}, None),  # as of the group at the very top
        ("0::/a/b\n", {"cg": V2}, {"cg/a/b/cpu.max": "max 100000\n", "cg/a/cpu.max": "5000 10000\n"}, 0.5),
        ("0::/a/b\n", {"cg": V2}, {"cg/a/b/cpu.max": "30000 10000\n", "cg/a/cpu.max": "max 1\n"}, 3.0),
        ("0::/a/b\n", {"cg": V2}, {"cg/a/b/cpu.max": "30000 10000\n", "cg/cpu.max": "70000 20000\n"}, 3.0),
        ("0::/a/b\n", {"cg": V2}, {"cg/a/c/cpu.max": "10000 10000\n"}, None),  # of a neighbour
        ("0::/a b\n", {"c g": V2}, {"c g/a b/cpu.max": "10000 10000\n"}, 1.0),
        # The container's group is the top of the mount that it sees.
        ("0::/docker/x/y\n", {"cg": ("/docker/x", V2[1])}, {"cg/y/cpu.max": "20000 10000\n"}, 2.0),
        ("0::/docker/x\n", {"cg": ("/docker/x", V2[1])}, {"cg/cpu.max": "20000 10000\n"}, 2.0),
        ("0::/../x\n", {"cg": V2}, {"cg/cpu.max": "20000 10000\n"}, 2.0),
        ("0::/docker/x\n", {"cg": ("/kubepods", V2[1])}, {"cg/cpu.max": "20000 10000\n"}, 2.0),
        (
            V1_LINES,
            {"cg": V1},
            {"cg/a/b/cpu.cfs_quota_us": "250000\n", "cg/a/b/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            V1_LINES,
            {"cg": V1},
            {"cg/a/b/cpu.cfs_quota_us": "-1\n", "cg/a/b/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        (
            V1_LINES,
            {"cg": V1},
            {
                "cg/a/b/cpu.cfs_quota_us": "-1\n",
                "cg/a/b/cpu.cfs_period_us": "100000\n",
                "cg/cpu.cfs_quota_us": "700000\n",
                "cg/cpu.cfs_period_us": "100000\n",
            },
            7.0,
        ),
        (
            V1_LINES,
            {"memory": ("/", "cgroup cgroup rw,memory"), "cpuset": ("/", "cgroup cgroup rw,cpuset")},
            {"memory/a/b/cpu.cfs_quota_us": "1\n", "memory/a/b/cpu.cfs_period_us": "1\n"},
            None,
        ),
        # Both versions at once: the controller is in one of them.
        (
            V1_LINES + "0::/\n",
            {"cg": V1, "unified": V2},
            {"cg/a/b/cpu.cfs_quota_us": "50000\n", "cg/a/b/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        # What is not as the manual says is no limit, and no error.
        ("", {}, {}, None),
        ("nonsense\n", {"cg": V2}, {"cg/cpu.max": "1 1\n"}, None),
        ("0::/\n", {"cg": ("/", "cgroup2")}, {"cg/cpu.max": "1 1\n"}, None),
        ("0::/\n", {"cg": V2}, {"cg/cpu.max": "\n"}, None),
        ("0::/\n", {"cg": V2}, {"cg/cpu.max": "10000 0\n"}, None),
        ("0::/\n", {"cg": V2}, {"cg/cpu.max": "many 10000\n"}, None),
        ("0::/\n", {"cg": V2}, {"cg/cpu.max": "9" * 5000 + " 1\n"}, None),
    ],
)
def test_the_least_quota_of_the_groups_is_found(tmp_path, groups, mounts, files, expected):
    assert limits.cpu_quota(made_up(tmp_path, groups, mounts, files)) == expected


def test_no_such_files_are_no_quota(tmp_path):
    assert limits.cpu_quota(str(tmp_path / "nowhere")) is None


def test_the_quota_of_this_process_can_be_asked_for():
    quota = limits.cpu_quota()
    assert quota is None or quota > 0


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 1.01, 2), (8, 0.5, 1), (8, 0.001, 1), (2, 16.0, 2)],
)
def test_threads_are_no_more_than_the_quota_rounded_up(monkeypatch, cores, quota, threads):
    monkeypatch.delenv("GPUINIT_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "usable_cores", lambda: frozenset(range(cores)))
    monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
    assert cpu.thread_limit() == threads
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "5")  # wins
    assert cpu.thread_limit() == 5


def test_the_quota_is_read_once(monkeypatch):
    monkeypatch.delenv("GPUINIT_NUM_THREADS", raising=False)
    limits.cpu_quota()
    monkeypatch.setattr(limits, "lines_of", None)
    gpuinit.he_normal((1500, 1000), device="cpu")


# Address space

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what is used")

# Past what repays loading Numba.
FILL = """
import hashlib, sys
import gpuinit
from gpuinit.backends import cpu
cpu.elements_made = 2**40
w = gpuinit.he_normal((1000, 1000), seed=1, device={device!r})
print(hashlib.sha256(w).hexdigest(), "numba" in sys.modules, "cupy" in sys.modules)
"""

MIB = 2**20


def run_within(address_space: int, kind: str = "RLIMIT_AS", device: str | None = "cpu", **environment: str):
    """Status, output and the last line of errors of FILL under a limit."""
    limit = f"import resource; resource.setrlimit(resource.{kind}, ({address_space},) * 2)\n"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPUINIT")}
    done = subprocess.run(
        [sys.executable, "-c", limit + FILL.format(device=device)],
        env=inherited | {"OPENBLAS_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout.split(), done.stderr.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def expected() -> str:
    return hashlib.sha256(gpuinit.he_normal((1000, 1000), seed=1, device="cpu")).hexdigest()


@linux
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
@pytest.mark.parametrize("limit", [340, 400, 460, 540])
def test_within_little_address_space_numpy_does_the_work(expected, kind, limit):
    """Numba ended in a segmentation fault there, or never."""
    assert run_within(limit * MIB, kind)[:2] == (0, [expected, "False", "False"])


@linux
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_cupy_is_not_imported_within_little_address_space(expected):
    """It took what the weights needed, for a user who had not asked for it."""
    assert run_within(800 * MIB, device=None)[:2] == (0, [expected, "False", "False"])


@linux
def test_numba_that_is_asked_for_is_an_error_within_little_address_space():
    status, _, error = run_within(400 * MIB, GPUINIT_CPU_ENGINE="numba")
    assert status == 1
    assert error.startswith(
        "ImportError: GPUINIT_CPU_ENGINE is numba, but Numba needs 384 MiB of address space, and the limit "
        "of this process leaves "
    )
    assert error.endswith(". Raise the limit (ulimit -v, ulimit -d), or set GPUINIT_CPU_ENGINE=numpy")


@linux
def test_numba_is_loaded_within_enough_address_space(expected):
    """The control."""
    pytest.importorskip("numba")
    assert run_within(2**33)[:2] == (0, [expected, "True", "False"])
    assert run_within(700 * MIB, GPUINIT_CPU_ENGINE="numba")[:2] == (0, [expected, "True", "False"])


def test_without_limits_all_is_free(monkeypatch):
    resource = pytest.importorskip("resource", reason="this system has no such limits")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert limits.free_address_space() == float("inf")


def test_what_is_free_is_the_less_of_both_limits(monkeypatch, tmp_path):
    resource = pytest.importorskip("resource", reason="this system has no such limits")
    (tmp_path / "statm").write_text("300 20 10 1 0 100 0\n")
    page = resource.getpagesize()
    found = {resource.RLIMIT_AS: 1000 * page, resource.RLIMIT_DATA: 900 * page}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (found[kind], 0))
    assert limits.free_address_space(str(tmp_path)) == 700 * page
    found[resource.RLIMIT_DATA] = 400 * page
    assert limits.free_address_space(str(tmp_path)) == 300 * page
    found[resource.RLIMIT_AS] = resource.RLIM_INFINITY
    assert limits.free_address_space(str(tmp_path)) == 300 * page
    found[resource.RLIMIT_DATA] = 50 * page  # lowered since
    assert limits.free_address_space(str(tmp_path)) == -50 * page
    assert limits.free_address_space(str(tmp_path / "nowhere")) == float("inf")
