"""`gpuinit doctor`: what it says, and that it finds what is broken."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import forget

import gpuinit
from gpuinit import __main__, devices, doctor, quantile
from gpuinit.backends import cpu, cuda

TABLE = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


def run(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    try:
        __main__.main(["doctor", *arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.fixture
def no_cuda(monkeypatch):
    """A laptop without CuPy."""
    monkeypatch.setattr("gpuinit.devices.find_cuda_problem", lambda _: "CuPy is not installed")
    monkeypatch.setattr("gpuinit.doctor.cuda_need_not_work", lambda: True)
    monkeypatch.setattr("gpuinit.doctor.has_cupy", lambda: False)


@pytest.fixture
def no_gpu(monkeypatch):
    """A laptop with CuPy and NVRTC, and without a device."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy, which brings NVRTC's bindings, is not installed")
    monkeypatch.setattr("gpuinit.devices.find_cuda_problem", lambda _: "there is no CUDA device")
    monkeypatch.setattr("gpuinit.doctor.cuda_need_not_work", lambda: True)


def statuses(report: dict) -> dict[str, str]:
    return {check["backend"]: check["status"] for check in report["checks"]}


def test_its_digests_are_those_of_the_golden_table():
    assert TABLE["format"] == doctor.STREAM_FORMAT
    assert {dtype for _, dtype, _, _ in doctor.GOLDEN} == {"float32", "float16", "bfloat16", "float64"}
    for function, dtype, digest, arguments in doctor.GOLDEN:
        keywords = {"seed": 0, "dtype": dtype, **arguments}
        row = {
            "function": function,
            "arguments": [list(doctor.SHAPE)],
            "keywords": keywords,
            "sha256": digest,
        }
        assert row in TABLE["arrays"]


def test_the_arguments_of_a_golden_array_are_given_to_it(monkeypatch):
    weights = gpuinit.normal((1000, 1001), 1.5, -0.5, seed=0, dtype="float16", device="cpu")
    row = ("normal", "float16", hashlib.sha256(weights.tobytes()).hexdigest(), {"stddev": 1.5, "mean": -0.5})
    monkeypatch.setattr(doctor, "GOLDEN", (row,))
    assert doctor.check_bytes("cpu", "cpu")["status"] == "ok"
    monkeypatch.setattr(doctor, "GOLDEN", ((*row[:3], {"stddev": 1.5, "mean": 0.5}),))
    assert "normal makes wrong bytes in float16." in doctor.check_bytes("cpu", "cpu")["detail"]


def test_a_laptop_without_cuda_is_healthy(no_cuda, capsys):
    status, text = run(capsys, "--json")
    report = json.loads(text)
    assert (status, report["healthy"]) == (0, True)
    assert statuses(report)["cpu, numpy"] == "ok"
    assert statuses(report)["cuda"] == "absent"
    assert "cuda, nvrtc" not in statuses(report)
    assert {"gpuinit", "Python", "NumPy", "CPU", "CuPy", "settings"} <= set(report["facts"])


def test_every_cuda_device_is_checked(cupy_sim, capsys):
    status, text = run(capsys, "--json")
    report = json.loads(text)
    assert status == 0
    assert statuses(report)["cuda:0"] == statuses(report)["cuda:1"] == "ok"
    assert report["facts"]["driver"] == "supports CUDA 13.0"
    assert report["facts"]["cuda:1"] == "Simulated, compute capability 9.0, 2.0 GiB"


def test_wrong_bytes_are_found_and_are_the_exit_status(monkeypatch, no_cuda, capsys):
    broken = (*quantile.R[:-1], np.nextafter(quantile.R[-1], np.float32(1)))
    monkeypatch.setattr("gpuinit.quantile.R", broken)
    monkeypatch.setattr("gpuinit.backends.cpu.numba_problem", lambda: "not here")
    status, text = run(capsys)
    assert status == 2
    assert "✗  cpu, numpy   he_normal makes wrong bytes in float32." in text
    assert "failed: see ✗ above" in text


def test_a_kernel_that_does_not_compile_is_a_failure_with_cause_and_remedy(cupy_sim, monkeypatch, capsys):
    def refuse(kernel: object) -> None:
        raise RuntimeError("no headers found")

    monkeypatch.setattr(cupy_sim.RawKernel, "compile", refuse)
    status, text = run(capsys, "--json")
    (check,) = [check for check in json.loads(text)["checks"] if check["backend"] == "cuda"]
    assert (status, check["status"]) == (2, "failed")
    assert "no headers found" in check["detail"]
    assert devices.INSTALL in check["detail"]


def test_without_a_device_the_kernel_is_compiled_all_the_same(no_gpu, monkeypatch, capsys):
    compiled = []
    real = cuda.compile_offline
    monkeypatch.setattr(cuda, "compile_offline", lambda *given: compiled.append(real(*given)))
    status, text = run(capsys)
    assert status == 0
    assert re.search(r"✓  cuda, nvrtc  both kernels compile for sm_80, \d+\.\d s$", text, re.MULTILINE)
    assert all(len(line) <= 80 for line in text.splitlines())
    for image, ptx, _ in compiled:
        assert image[:4] == b"\x7fELF"
        assert ".target sm_80" in ptx
        assert ".entry fill_bfloat16(" in ptx
    assert ["NORMAL32" in ptx for _, ptx, _ in compiled] == [False, True]  # that of the tables


def broken_library(*_: object) -> None:
    raise RuntimeError('Failure finding "libnvrtc.so.12"')


def no_headers(*_: object) -> None:
    raise RuntimeError("Failed to find CUDA headers")


@pytest.mark.parametrize(
    ("place", "fault", "cause"),
    [
        (
            "cupy.cuda.nvrtc.createProgram",
            broken_library,
            'are missing (RuntimeError: Failure finding "libnvrtc',
        ),
        ("cupy._core.core.assemble_cupy_compiler_options", no_headers, "Failed to find CUDA headers"),
        (
            "gpuinit.backends.cuda.source",
            lambda shifted: "fault" if shifted else "",
            "does not compile or load (RuntimeError: fill.cu(1): error",
        ),
    ],
)
def test_a_compiler_that_fails_without_a_device_is_a_failure(
    no_gpu, monkeypatch, capsys, place, fault, cause
):
    monkeypatch.setattr(place, fault)
    status, text = run(capsys, "--json")
    report = json.loads(text)
    (check,) = [check for check in report["checks"] if check["backend"] == "cuda, nvrtc"]
    assert (status, report["healthy"], check["status"]) == (2, False, "failed")
    assert statuses(report)["cuda"] == "absent"
    assert cause in check["detail"]
    assert devices.INSTALL in check["detail"]


def test_a_cupy_that_renames_its_own_function_is_no_fault(no_gpu, monkeypatch):
    monkeypatch.delattr("cupy._core.core.assemble_cupy_compiler_options")
    assert doctor.check_compiler()["status"] == "ok"


@pytest.mark.parametrize(
    ("status", "driver", "need_not"), [(100, 12000, True), (35, 0, True), (35, 11000, False), (3, 1, False)]
)
def test_cuda_that_is_not_there_is_no_fault_and_one_that_is_broken_is(
    cupy_sim, monkeypatch, status, driver, need_not
):
    def fail() -> int:
        raise cupy_sim.runtime.CUDARuntimeError(status)

    monkeypatch.setattr(cupy_sim.runtime, "getDeviceCount", fail)
    monkeypatch.setattr(cupy_sim.runtime, "driverGetVersion", lambda: driver)
    assert doctor.cuda_need_not_work() is need_not


def test_a_broken_numba_is_a_failure_and_a_missing_one_is_not(monkeypatch):
    monkeypatch.setattr("gpuinit.doctor.version", lambda package: "0.61")
    assert doctor.check_cpu("numba", "importing Numba failed")["status"] == "failed"
    monkeypatch.setattr("gpuinit.doctor.version", lambda package: "not installed")
    assert doctor.check_cpu("numba", "Numba is not installed")["status"] == "absent"


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("GPUINIT_CPU_ENGINE", "cuda", "GPUINIT_CPU_ENGINE must be numpy or numba, got 'cuda'"),
        ("GPUINIT_CPU_ENGINE", "", "GPUINIT_CPU_ENGINE must be numpy or numba, got ''"),
        ("GPUINIT_NUM_THREADS", "0", "GPUINIT_NUM_THREADS must be an integer >= 1, got '0'"),
        ("GPUINIT_NUM_THREADS", "two", "GPUINIT_NUM_THREADS must be an integer >= 1, got 'two'"),
    ],
)
def test_a_setting_that_makes_every_fill_fail_is_a_failure(no_cuda, monkeypatch, capsys, name, value, cause):
    monkeypatch.setenv(name, value)
    status, text = run(capsys, "--json")
    report = json.loads(text)
    assert (status, report["healthy"]) == (2, False)
    (check,) = [check for check in report["checks"] if check["status"] == "failed"]
    assert (check["backend"], check["detail"]) == ("settings", f"{cause}. Correct or unset it")
    assert statuses(report)["cpu, numpy"] == "ok"  # all else is as without the setting
    assert os.environ[name] == value
    with pytest.raises(ValueError, match=f"^{re.escape(cause)}$"):
        gpuinit.he_normal(3, device="cpu")


def test_an_engine_that_is_forced_and_not_there_is_a_failure(no_cuda, monkeypatch, capsys):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    monkeypatch.setattr(cpu, "numba_problem", lambda: "Numba is not installed. To install it: pip")
    monkeypatch.setattr(doctor, "version", lambda package: "not installed")
    status, text = run(capsys, "--json")
    assert status == 2
    assert statuses(json.loads(text)) | {"cuda": ""} == {
        "settings": "failed",
        "cpu, numpy": "ok",
        "cpu, numba": "absent",
        "cuda": "",
    }
    assert "GPUINIT_CPU_ENGINE is numba, but Numba is not installed" in text


def test_settings_that_are_right_are_no_check(no_cuda, monkeypatch, capsys):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "3")
    status, text = run(capsys, "--json")
    assert status == 0
    assert "settings" not in statuses(json.loads(text))
    assert "GPUINIT_NUM_THREADS=3" in json.loads(text)["facts"]["settings"]


@pytest.mark.parametrize(
    ("installed", "status", "mark"), [({}, 0, "absent"), ({"cupy": ["cupy-cuda12x"]}, 2, "failed")]
)
def test_a_module_called_cupy_is_told_and_is_a_fault_if_it_hides_cupy(
    monkeypatch, capsys, installed, status, mark
):
    other = types.ModuleType("cupy")
    other.__file__ = "/home/me/cupy.py"
    monkeypatch.setitem(sys.modules, "cupy", other)
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: installed)
    forget()
    try:
        found, text = run(capsys, "--json")
    finally:
        forget()
    report = json.loads(text)
    assert (found, statuses(report)["cuda"]) == (status, mark)
    assert report["facts"]["CuPy"] == "not what `import cupy` finds: /home/me/cupy.py"
    assert "cuda, nvrtc" not in statuses(report)


def test_numba_is_not_loaded_within_little_address_space(no_cuda, monkeypatch):
    monkeypatch.setattr(cpu, "free_address_space", lambda: 100 * 2**20)
    monkeypatch.setattr(cpu, "compiled_kernels", set())
    monkeypatch.setattr(cpu, "numba_problem", None)
    check = doctor.check_numba()
    assert check["status"] == "absent"
    assert check["detail"].startswith("Numba needs 384 MiB of address space, and the limit of this process ")


def test_cores_and_quota_are_told(monkeypatch):
    monkeypatch.delenv("GPUINIT_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cpu, "usable_cores", lambda: frozenset(range(8)))
    for module in (cpu, doctor):
        monkeypatch.setattr(module, "cpu_quota", lambda: 1.5)
    assert doctor.describe_threads().endswith(
        ", 16 cores, 8 of them for this process, a quota of 1.5 cores' time, 2 threads"
    )


def test_each_engine_is_the_one_that_is_checked_and_the_setting_comes_back(monkeypatch):
    ran = []
    monkeypatch.setattr("gpuinit.doctor.check_bytes", lambda *_: ran.append(os.environ["GPUINIT_CPU_ENGINE"]))
    before = os.environ["GPUINIT_CPU_ENGINE"]
    doctor.check_cpu("numba", None)
    monkeypatch.delenv("GPUINIT_CPU_ENGINE")
    doctor.check_cpu("numpy", None)
    assert "GPUINIT_CPU_ENGINE" not in os.environ
    assert (before, ran) == ("numpy", ["numba", "numpy"])


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert doctor.kernel_cache() == (tmp_path / "a" / "b", True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "b"))
    assert doctor.kernel_cache() == (tmp_path / "file" / "b", False)


def test_the_screen_is_80_columns_wide_and_takes_ascii(cupy_sim, capsys):
    _, text = run(capsys)
    long = doctor.row("  x  ", "/a/very/long/path" * 9 + " and words " * 20)
    assert all(len(line) <= 80 for line in [*text.splitlines(), *long.splitlines()])
    assert "  healthy" in text
    assert f"✓  cpu, numpy   {len(doctor.GOLDEN)} golden digests equal" in text
    assert doctor.marks("ascii") == doctor.ASCII_MARKS
    assert doctor.marks("utf-8") == doctor.MARKS
