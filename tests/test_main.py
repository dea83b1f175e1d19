"""`python -m gpuinit`: the main job from the shell."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gpuinit
from gpuinit.__main__ import main, table

KEYS = "device engine shape dtype seed seconds mean std kurtosis min max expected_std bound sha256"


def report(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_json_describes_the_array_that_the_library_makes(device, capsys):
    found = report(
        capsys, "--shape", "300", "200", "--dtype", "bfloat16", "--seed", "7", "--device", device.name
    )
    assert sorted(found) == sorted(KEYS.split())
    w = gpuinit.he_normal((300, 200), seed=7, dtype="bfloat16", device="cpu")
    wide = w.astype(np.float64)
    assert found["sha256"] == hashlib.sha256(w.tobytes()).hexdigest()
    assert found["shape"] == [300, 200]
    assert (found["dtype"], found["seed"]) == ("bfloat16", 7)
    assert found["device"].startswith(device.name)
    assert found["mean"] == pytest.approx(wide.mean(), abs=1e-12)
    assert found["std"] == pytest.approx(wide.std(), rel=1e-12)
    assert found["kurtosis"] == pytest.approx(((wide - wide.mean()) ** 4).mean() / wide.std() ** 4)
    assert (found["min"], found["max"]) == (wide.min(), wide.max())
    assert found["expected_std"] == pytest.approx(math.sqrt(2 / 300), rel=1e-15)
    exact_bound = np.float32(2 * math.sqrt(2 / 300) / 0.87962566103423976)
    assert found["bound"] == float(exact_bound.astype(ml_dtypes.bfloat16))
    assert found["seconds"] > 0


def test_the_default_is_the_issues_array_and_is_right(capsys):
    found = report(capsys, "--device", "cpu")
    assert (found["shape"], found["dtype"], found["seed"]) == ([4096, 4096], "float32", 0)
    n = 2**24
    assert abs(found["mean"]) < 6 * found["expected_std"] / math.sqrt(n)
    assert abs(found["std"] / found["expected_std"] - 1) < 6 * math.sqrt(1.3656 / 4 / n)
    assert abs(found["kurtosis"] - 2.3655367) < 0.005
    assert max(-found["min"], found["max"]) <= found["bound"]


def test_the_table_says_the_same_in_80_columns(device, capsys):
    arguments = ["--shape", "64", "65", "--seed", "3", "--device", device.name]
    found = report(capsys, *arguments)
    main(arguments)
    table = capsys.readouterr().out
    assert all(len(line) <= 80 for line in table.splitlines())
    rows = dict(re.findall(r"^  (\w+) +(.+)$", table, re.MULTILINE))
    assert rows["sha256"] == found["sha256"]
    assert rows["array"] == "he_normal (64, 65) float32, seed 3"
    assert rows["std"].split() == [f"{found['std']:.8f}", f"{math.sqrt(2 / 64):.8f}"]
    assert rows["max"].split() == [f"{found['max']:+.8f}", "<=", f"{found['bound']:+.8f}"]
    assert re.fullmatch(r"\d+\.\d+ billion samples/s, \d+\.\d+ GB/s", rows["rate"])


def test_the_table_computes_its_rates_from_the_time():
    numbers = dict.fromkeys(["mean", "std", "kurtosis", "min", "max", "expected_std", "bound"], 0.5)
    given = {"device": "cpu", "engine": "numpy", "shape": [1000, 1000], "dtype": "float16", "seed": 1}
    text = table({**given, **numbers, "seconds": 0.004, "sha256": "a"})
    rows = dict(re.findall(r"^  (\w+) +(.+)$", text, re.MULTILINE))
    assert rows["time"] == "4.000 ms"
    assert rows["rate"] == "0.250 billion samples/s, 0.50 GB/s"


def test_the_clock_stops_when_the_weights_are_made(monkeypatch, capsys):
    """A device is still busy when the call returns: what waiting for it takes is part of the time."""
    monkeypatch.setattr("gpuinit.__main__.synchronize", lambda weights: time.sleep(0.05))
    assert report(capsys, "--shape", "9", "--device", "cpu")["seconds"] >= 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "-3"], "shape must be an integer or a sequence of integers >= 0, got (-3,)"),
        (["--shape", "0"], "shape must have at least one element, got (0,)"),
        (["--seed", "-1"], "seed must be None or an integer in [0, 2**64), got -1"),
        (["--device", "gpu"], 'device must be None, "cpu", "cuda" or "cuda:N", got \'gpu\''),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--shape", "1152921504606846976", "--device", "cpu"], "Unable to allocate"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_one_weight_has_no_kurtosis(capsys):
    assert report(capsys, "--shape", "1", "--device", "cpu")["kurtosis"] is None
    main(["--shape", "1", "--device", "cpu"])
    assert "kurtosis" in capsys.readouterr().out


def test_sample_is_the_default_command_and_takes_the_shape_by_place(capsys):
    by_option = report(capsys, "--shape", "30", "20", "--device", "cpu")
    for arguments in (["sample", "30", "20"], ["30", "20"], ["sample", "--shape", "30", "20"]):
        found = report(capsys, *arguments, "--device", "cpu")
        assert (found["shape"], found["sha256"]) == ([30, 20], by_option["sha256"])
    with pytest.raises(SystemExit):
        main(["3", "--shape", "4"])
    assert "the shape must be given once, got [3] and --shape [4]" in capsys.readouterr().err


def test_without_the_extra_the_other_commands_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "gpuinit.cli", raising=False)
    monkeypatch.delattr(gpuinit, "cli", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint"])
    assert stopped.value.code == 2
    assert 'click is not installed. To install them: pip install "gpuinit[cli]"' in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert 'pip install "gpuinit[cli]"' in " ".join(capsys.readouterr().out.split())
    assert report(capsys, "--shape", "3", "--device", "cpu")["shape"] == [3]


@pytest.mark.parametrize(
    "arguments",
    [("sample", "9", "--device", "cpu"), ("sample", "9", "--json"), ("doctor",), ("doctor", "--json")],
)
def test_a_reader_that_stops_is_no_error(arguments):
    """As `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent)}
    environment["PYTHONUNBUFFERED"] = ""  # what is printed waits for the end
    command = [sys.executable, "-m", "gpuinit", *arguments]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_engine_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    monkeypatch.setattr("gpuinit.backends.cpu.numba_problem", lambda: "Numba is not installed")
    with pytest.raises(SystemExit):
        main(["9", "--device", "cpu"])
    assert "GPUINIT_CPU_ENGINE is numba, but Numba is not installed" in capsys.readouterr().err
