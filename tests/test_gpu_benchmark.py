"""benchmarks/gpu.py, as far as it runs without a GPU."""

from __future__ import annotations

import importlib.util
import json

import gpu
import pytest


def measurement(library: str, call: str, dtype: str, milliseconds: float, shape=gpu.LARGEST):
    made = gpu.timed(lambda i: None, lambda run: (run(), milliseconds)[1], shape, dtype)
    return {"library": library, "call": call, **made}


@pytest.fixture
def report():
    """Made up, with names as long as they get."""
    rows = [
        measurement("device", "fill", "float32", 400.0),
        measurement("device", "memset", "float32", 500.0),
        measurement("gpuinit", "he_normal", "float32", 500.0),
        measurement("gpuinit", "he_normal, 32 blocks an SM", "float32", 100.0),
        measurement("gpuinit", "he_normal", "bfloat16", 450.0),
        measurement("torch", "trunc_normal_", "float32", 9000.0),
    ]
    return {
        "device": "A made up device 80GB",
        "driver": "999.99.99",
        "driver_cuda": "12.9",
        "date": "2000-01-01 00:00 UTC",
        "commit": "0123456+",
        "versions": dict.fromkeys(gpu.PACKAGES, "10.20.30"),
        "first_call": {"cold": 1.5, "warm": 0.25},
        "host_microseconds": {"he_normal": 20.0, "empty and bare launch": 12.0},
        "extra_bytes": 0,
        "measurements": rows,
        "missing": {"keras": "ModuleNotFoundError: No module named 'keras' " * 3},
    }


def test_a_measurement_is_the_median_of_a_call():
    calls, rounds = [], iter([9, 5, 7, *[3, 1, 2] * 2, 1, 2, 90])  # first, alone, warm-up, then nine rounds

    def elapsed(run):
        run()
        return next(rounds)

    made = gpu.timed(calls.append, elapsed, (1000, 250), "float32")
    count = (len(calls) - 2) // 10
    assert count == 10  # of 5 ms in 50
    assert calls == list(range(len(calls)))  # through all arrays in turns
    assert made["milliseconds"] == 2 / count
    assert made["gigabytes_per_second"] == pytest.approx(1e6 / (0.2 * 1e-3) / 1e9)


def test_the_clock_stops_when_all_that_was_called_is_done(monkeypatch):
    done, times = [], iter([1.0, 1.5])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: done.append("clock") or next(times))
    assert gpu.by_the_clock(lambda: done.append("wait"))(lambda: done.append("run")) == 500.0
    assert done == ["clock", "run", "wait", "clock"]


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_what_holds_the_device_back_compiles():
    image, ptx, log = gpu.cuda.compile_offline(gpu.HOLD, ("-arch=sm_80",))
    assert image
    assert ptx.count("%globaltimer") == 2
    assert log == ""


def test_arrays_overflow_the_cache():
    assert gpu.arrays_needed(2**30, 50 * 2**20) == 2
    assert gpu.arrays_needed(2**24, 50 * 2**20) * 2**24 >= 3 * 50 * 2**20
    assert gpu.arrays_needed(2**14, 50 * 2**20) == gpu.MOST_ARRAYS


def test_the_table_fits_80_columns_and_gives_shares_of_the_ceiling(report):
    lines = gpu.table(report).splitlines()
    assert max(map(len, lines)) <= 80
    (own,) = [line for line in lines if line.startswith("gpuinit he_normal  ") and "float32" in line]
    assert own.endswith("0.80")
    (other,) = [line for line in lines if line.startswith("gpuinit he_normal  ") and "bfloat16" in line]
    assert not other.endswith("0.80")  # there is no ceiling for it
    assert any(line.startswith("not measured: keras") for line in lines)


def test_results_are_named_after_the_device_and_the_day(report, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "chart", lambda *_: None)
    gpu.write(report, tmp_path / "results")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "a-made-up-device-80gb-2000-01-01.json",
        "a-made-up-device-80gb-2000-01-01.txt",
    ]
    path = tmp_path / "results" / "a-made-up-device-80gb-2000-01-01.json"
    assert json.loads(path.read_text()) == report


def test_the_chart_has_the_largest_shape_the_fastest_first(report):
    assert [name for name, _ in gpu.bars(report, "float32")] == [
        "device fill",
        "device memset",
        "gpuinit he_normal",
        "torch trunc_normal_",
    ]


def test_a_failure_costs_a_peer_its_row_and_ours_everything(monkeypatch):
    def fail(i):
        raise MemoryError("no room")

    def cases():
        for call, run in (("one", lambda i: None), ("two", fail), ("three", lambda i: None)):
            yield call, run, lambda run: (run(), 1.0)[1], (4, 4), "float32"
        raise RuntimeError("no more")

    for name in ("torch", "gpuinit"):
        monkeypatch.setitem(gpu.LIBRARIES, name, cases)
    report = {"measurements": [], "missing": {}}
    gpu.measure("torch", report)
    assert [(m["library"], m["call"]) for m in report["measurements"]] == [
        ("torch", "one"),
        ("torch", "three"),
    ]
    assert report["missing"] == {
        "torch two (4, 4) float32": "MemoryError: no room",
        "torch": "RuntimeError: no more",
    }
    with pytest.raises(MemoryError):
        gpu.measure("gpuinit", report)


CASE = {"function": "he_normal", "arguments": [[8, 8]], "keywords": {"seed": 0}}


def test_a_device_with_the_golden_bits_may_be_timed(device, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    table = tmp_path / "tests" / "golden.json"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    weights = device.numpy(gpu.golden.make(CASE, device=device.name))
    right = gpu.hashlib.sha256(weights.tobytes()).hexdigest()
    table.write_text(json.dumps({"arrays": [{**CASE, "sha256": right}]}))
    gpu.check_golden(device.name)
    table.write_text(json.dumps({"arrays": [{**CASE, "sha256": "0" * 64}]}))
    with pytest.raises(SystemExit, match="nothing is timed"):
        gpu.check_golden(device.name)


def test_every_golden_case_is_checked(monkeypatch):
    made = []
    monkeypatch.setattr(gpu.golden, "make", lambda case, device: made.append(case) or gpu.np.zeros(1))
    with pytest.raises(SystemExit):
        gpu.check_golden("cpu")
    assert len(made) == 1  # and leaves at the first that differs
