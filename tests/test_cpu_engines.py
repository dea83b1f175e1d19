"""The two engines of the CPU: which runs, that Numba's works anywhere, and that its bits are NumPy's.

The device-agnostic suite runs on both; here is what only they have.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import Cpu, CpuNumba, numba_probe
from hypothesis import given
from hypothesis import strategies as st

import gpuinit
from gpuinit.__main__ import main
from gpuinit.backends import cpu
from gpuinit.distributions import Normal, Uniform, find_sampling
from gpuinit.initializers import DTYPES
from gpuinit.stream import Run

pytest.importorskip("numba", reason='Numba is not installed. To install it: pip install "gpuinit[cpu]"')

import llvmlite.binding as llvm
import numba

from gpuinit import compiled, quantile

FLOAT32 = DTYPES["float32"]
PACKAGE = Path(gpuinit.__file__).parent


# One of every distribution that the samplers know, by the width.
DRAWS = {
    quantile.UNIFORM: lambda width: Uniform(-width, width, ("limit", width)),
    quantile.TRUNCATED_NORMAL: lambda width: Normal(width, 0.0, -2.0, 2.0, ("stddev", width)),
    quantile.NORMAL: lambda width: Normal(width, 0.5 * width, -math.inf, math.inf, ("stddev", width)),
    quantile.UNIFORM_BETWEEN: lambda width: Uniform(-width, 3 * width, ("high", 3 * width)),
    quantile.NORMAL_BETWEEN: lambda width: Normal(width, 0.5 * width, -1.0, 2.5, ("stddev", width)),
}


def filled(engine, dtype, distribution, run, width=0.1, key=7, stream=0):
    """The bytes that an engine writes for one run."""
    out = np.full(run.length * run.rows, 77, DTYPES[dtype])
    fill = {"numpy": cpu.fill_with_numpy, "numba": cpu.fill_with_numba}[engine]
    sampling = find_sampling(DRAWS[distribution](width), out.dtype)
    assert sampling[0] == distribution
    fill(out, [run], (key, stream, *sampling))
    return out.tobytes()


def digest(shape=(300, 301), dtype="float32"):
    return hashlib.sha256(gpuinit.he_normal(shape, seed=5, dtype=dtype, device="cpu")).hexdigest()


# The same bytes


@given(
    dtype=st.sampled_from(tuple(DTYPES)),
    distribution=st.sampled_from([*DRAWS]),
    offset=st.integers(0, 40) | st.integers(2**34 - 40, 2**34 + 40) | st.integers(0, 2**62),
    length=st.integers(1, 9) | st.integers(1, 3000),
    rows=st.integers(1, 7),
    stride=st.integers(0, 2**40),
    width=st.sampled_from([0.1, 2.0, 1e-5, 3e-8, 1e-40]),
    key=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**64 - 1),
)
def test_engines_write_the_same_bytes(dtype, distribution, offset, length, rows, stride, width, key, stream):
    if dtype == "float16":
        width = max(width, 3e-8)  # below it all weights would be 0, which is refused
    arguments = (dtype, distribution, Run(offset, length, rows, stride), width, key, stream)
    assert filled("numba", *arguments) == filled("numpy", *arguments)


def test_engines_agree_at_both_ends_where_the_cut_at_1_acts():
    numpys, numbas = Cpu(), CpuNumba()
    # The reciprocal is of the whole block, so what a word near the end becomes depends on the other three.
    words = np.random.default_rng(1).integers(0, 2**32, (2**16, 4), np.uint32)
    rows = np.arange(len(words))
    words[rows, rows % 4] = np.where(rows % 8 < 4, 2**31 - 1 - rows % 127, 2**31 + rows % 127)
    samples = numbas.truncated_normal(words)
    assert samples.tobytes() == numpys.truncated_normal(words).tobytes()
    assert np.abs(samples).max() == 1
    samples = numbas.truncated_normal64(words)
    assert samples.tobytes() == numpys.truncated_normal64(words).tobytes()
    assert np.abs(samples).max() <= 1


@pytest.mark.parametrize("distribution", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_engines_write_the_same_bytes_over_many_tiles_and_threads(monkeypatch, dtype, distribution):
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "3")
    run = Run(2**33 - 5, 1031, 2050, 2**20 + 3)
    assert filled("numba", dtype, distribution, run) == filled("numpy", dtype, distribution, run)
    long = Run(2**34 - 2**20 - 1, 2**21 + 7, 1, 0)
    assert filled("numba", dtype, distribution, long) == filled("numpy", dtype, distribution, long)


def test_rounding_to_16_bits_is_numpys_for_every_kind_of_number():
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | low).reshape(-1)
    for dtype in ("float16", "bfloat16"):
        with np.errstate(all="ignore"):
            expected = bits.view(np.float32).astype(DTYPES[dtype])
        used = np.isfinite(expected)  # find_sampling lets no other through
        expected = expected[used].view(np.uint16)
        pairs = np.stack([bits[used], bits[used][::-1]])
        made = numba_probe(f"round_to_{dtype}")(pairs, np.uint32, 1)[0]
        np.testing.assert_array_equal(made & 0xFFFF, expected)
        np.testing.assert_array_equal(made >> 16, expected[::-1])
        assert used.sum() > 300_000


@pytest.mark.parametrize("blocks", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_writes_the_same_bytes(monkeypatch, dtype, blocks):
    """The number of blocks side by side is the processor's matter alone."""
    monkeypatch.setattr(compiled, "BLOCKS", blocks)
    for distribution in (quantile.UNIFORM, quantile.TRUNCATED_NORMAL, quantile.NORMAL_BETWEEN):
        kernel = compiled.compile_kernel(DTYPES[dtype], distribution, cache=False)
        monkeypatch.setattr(compiled, "kernel", lambda dtype, distribution, kernel=kernel: kernel)
        for run in (Run(2**34 - 1501, 3001, 3, 2**33 + 1), Run(5, 1, 9, 13), Run(2**40, 4096, 1, 0)):
            assert filled("numba", dtype, distribution, run) == filled("numpy", dtype, distribution, run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_out_that_is_not_aligned_is_filled_by_numpy(monkeypatch, dtype):
    """LLVM may take every address for a multiple of the item's size."""
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    monkeypatch.setattr(cpu, "fill_with_numba", None)
    buffer = np.zeros(1001 * DTYPES[dtype].itemsize + 1, np.uint8)
    out = buffer[1:].view(DTYPES[dtype])
    assert not out.flags.aligned
    gpuinit.he_normal(1001, seed=1, out=out)
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numpy")
    assert out.tobytes() == gpuinit.he_normal(1001, seed=1, dtype=dtype, device="cpu").tobytes()


def test_a_memory_map_is_filled(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    out = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(30, 40))
    gpuinit.he_normal((30, 40), seed=1, out=out)
    out.flush()
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numpy")
    made = gpuinit.he_normal((30, 40), seed=1, device="cpu").tobytes()
    assert (tmp_path / "weights").read_bytes() == made


# No fused operations

FUSED = re.compile(
    r"\b(?:v?fn?m(?:add|sub)\w*"  # x86 and AArch64: vfmadd213ps, vfnmadd..., fmadd, fmsub
    r"|fn?ml[as]\w*|vfn?m[as]\w*"  # AArch64 vectors: fmla, fmls; Arm: vfma
    r"|fn?m(?:add|sub)s?)\b"  # RISC-V and POWER
)
RELAXED = re.compile(
    r"= f(?:add|sub|mul|div) (?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc)|@llvm\.fmuladd|@llvm\.fma\b"
)


def fuses_where_it_may(**options):
    """Assembly of a product and a sum."""

    @numba.njit("float32(float32, float32, float32)", **options)
    def product_and_sum(a, b, c):
        return a * b + c

    return product_and_sum


@cache
def code_of_kernel(dtype, distribution):
    return code_of(compiled.compile_kernel(DTYPES[dtype], distribution, cache=False))


def code_of(function):
    """Assembly and LLVM's intermediate code."""
    return "\n".join(function.inspect_asm().values()), "\n".join(function.inspect_llvm().values())


@pytest.mark.parametrize("distribution", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_float_operation_is_fused_or_relaxed(dtype, distribution):
    assembly, intermediate = code_of_kernel(dtype, distribution)
    assert "mul" in assembly
    assert "fmul" in intermediate
    assert FUSED.findall(assembly) == []
    assert RELAXED.findall(intermediate) == []


def test_a_fused_operation_would_be_seen():
    """The control. The machine must have one to show it in the assembly."""
    assembly, intermediate = code_of(fuses_where_it_may(fastmath={"contract"}))
    assert RELAXED.findall(intermediate)
    if llvm.get_host_cpu_features().get("fma", False):
        assert FUSED.findall(assembly)
    assembly, intermediate = code_of(fuses_where_it_may())
    assert not RELAXED.findall(intermediate)
    assert not FUSED.findall(assembly)


@pytest.mark.parametrize("distribution", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_written_side_by_side(dtype, distribution):
    """Not element by element to computed addresses, which took as long as making them. AVX-512 shows it."""
    assembly, _ = code_of_kernel(dtype, distribution)
    assert "scatter" not in assembly
    assert "gather" not in assembly  # nor table rows fetched number by number


# Twins


def test_names_come_in_the_order_of_the_kernel():
    source = (PACKAGE.parent / "kernels" / "fill.cu").read_text(encoding="utf-8")
    kernel = re.findall(r"^static __device__ \w+ (\w+)\(|^ +(fill_\w+)\(", source, re.MULTILINE)
    kernel = [a or b for a, b in kernel]
    mine = re.findall(r"^def (\w+)\(", Path(compiled.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    shared = [name for name in mine if name in kernel]
    assert shared == [name for name in kernel if name in mine]
    assert len(shared) >= 17


# Which engine


@pytest.fixture
def automatic(monkeypatch):
    """No engine is forced, and the process has made nothing yet."""
    monkeypatch.delenv("GPUINIT_CPU_ENGINE")
    monkeypatch.setattr(cpu, "elements_made", 0)
    monkeypatch.setattr(cpu, "compiled_kernels", set())


def test_numba_is_taken_once_it_pays_and_then_for_every_size(automatic):
    assert cpu.engine(cpu.ELEMENTS_TO_REPAY - 1, FLOAT32) == "numpy"
    assert cpu.engine(cpu.ELEMENTS_TO_REPAY, FLOAT32) == "numba"
    assert cpu.engine(1, FLOAT32) == "numba"
    assert cpu.engine(1, DTYPES["bfloat16"]) == "numpy"  # not loaded
    assert cpu.engine(1, FLOAT32, quantile.NORMAL) == "numpy"


def test_work_adds_up_over_calls(automatic, monkeypatch):
    monkeypatch.setattr(cpu, "ELEMENTS_TO_REPAY", 3 * cpu.SMALL)
    engines = []
    for _ in range(4):
        engines.append(cpu.engine(cpu.SMALL, FLOAT32))
        gpuinit.he_normal(cpu.SMALL, device="cpu")
    assert engines == ["numpy", "numpy", "numba", "numba"]


def test_small_arrays_never_load_numba(automatic, monkeypatch):
    monkeypatch.setattr(cpu, "elements_made", 2**40)
    assert cpu.engine(cpu.SMALL - 1, FLOAT32) == "numpy"
    assert cpu.engine(cpu.SMALL, FLOAT32) == "numba"


def test_the_setting_is_read_at_every_call(monkeypatch):
    ran = []
    for name in ("numpy", "numba"):
        fill = getattr(cpu, f"fill_with_{name}")
        monkeypatch.setattr(cpu, f"fill_with_{name}", lambda *a, n=name, f=fill: (ran.append(n), f(*a)))
    for setting in ("numba", "numpy", "numba"):
        monkeypatch.setenv("GPUINIT_CPU_ENGINE", setting)
        gpuinit.he_normal((8, 8), device="cpu")
    assert ran == ["numba", "numpy", "numba"]


@pytest.mark.parametrize("setting", ["", "Numba", "cython", "numpy,numba"])
def test_an_unknown_engine_is_an_error(monkeypatch, setting):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", setting)
    out = np.full(8, 77, np.float32)
    with pytest.raises(ValueError, match=f"^GPUINIT_CPU_ENGINE must be numpy or numba, got {setting!r}$"):
        gpuinit.he_normal(8, out=out)
    assert (out == 77).all()


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_the_command_line_reports_the_engine(monkeypatch, capsys, engine):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", engine)
    main(["--shape", "20", "30", "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["engine"] == engine


# In other processes

DIGEST = """
import hashlib, sys
import gpuinit
w = gpuinit.he_normal((300, 301), seed=5, device="cpu")
print(hashlib.sha256(w).hexdigest(), "numba" in sys.modules)
"""


def run(code=DIGEST, cwd=PACKAGE.parent, **environment):
    """The words that code prints in a process of its own, with these variables of the environment."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("GPUINIT", "NUMBA"))
    }
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )
    return (done.stdout + done.stderr.strip().rpartition("\n")[2]).split()


def test_neither_importing_nor_small_arrays_import_numba():
    many = "for i in range(300): gpuinit.he_normal((500, 500), device='cpu')"
    code = f"import gpuinit\nfrom gpuinit.backends import cpu\ncpu.ELEMENTS_TO_REPAY = 2**22\n{many}" + DIGEST
    assert run(code) == [digest(), "False"]


def test_importing_numba_would_be_seen():
    """The control."""
    assert run(GPUINIT_CPU_ENGINE="numba") == [digest(), "True"]


AUTOMATIC = """
from gpuinit.backends import cpu
cpu.ELEMENTS_TO_REPAY = cpu.SMALL = 1
"""


def blocked(tmp_path, error):
    """A Numba whose import raises this error."""
    (tmp_path / "numba.py").write_text(error)
    return {"PYTHONPATH": str(tmp_path)}


def test_without_numba_the_work_is_done_by_numpy(tmp_path):
    environment = blocked(tmp_path, "raise ModuleNotFoundError(\"No module named 'numba'\", name='numba')")
    assert run(AUTOMATIC + DIGEST, **environment)[0] == digest()
    message = " ".join(run(GPUINIT_CPU_ENGINE="numba", **environment))
    assert message == (
        "ImportError: GPUINIT_CPU_ENGINE is numba, but Numba is not installed. "
        'To install it: pip install "gpuinit[cpu]"'
    )


@pytest.mark.parametrize("kind", ["folder", "module"])
def test_what_is_called_numba_and_is_not_is_no_numba(tmp_path, kind):
    place = tmp_path / ("numba" if kind == "folder" else "numba.py")
    place.mkdir() if kind == "folder" else place.write_text("")
    hidden = (
        "import glob, sys\nsys.path[:] = [p for p in sys.path if not glob.glob(p + '/numba/__init__.py')]\n"
    )
    load = "import gpuinit, numpy, ml_dtypes\n" + (hidden if kind == "folder" else "")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert run(load + AUTOMATIC + DIGEST, PYTHONPATH=path)[0] == digest()
    assert " ".join(run(load + DIGEST, PYTHONPATH=path, GPUINIT_CPU_ENGINE="numba")) == (
        f"ImportError: GPUINIT_CPU_ENGINE is numba, but the numba that Python finds is not Numba ({place}). "
        'To use it, rename that, and: pip install --upgrade "gpuinit[cpu]"'
    )


def test_without_numba_and_llvmlite_it_is_numba_that_is_not_installed():
    """Both are missing after a plain installation, and llvmlite comes first where it is imported."""
    load = "import sys\nsys.modules['llvmlite'] = None\n"
    gone = load + "sys.modules['numba'] = None\n"
    assert "but Numba is not installed. To install it:" in " ".join(
        run(gone + DIGEST, GPUINIT_CPU_ENGINE="numba")
    )
    assert "but importing Numba failed (" in " ".join(run(load + DIGEST, GPUINIT_CPU_ENGINE="numba"))


def test_with_a_numba_that_does_not_start_the_work_is_done_by_numpy(tmp_path):
    environment = blocked(tmp_path, "raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')")
    assert run(AUTOMATIC + DIGEST, **environment)[0] == digest()
    message = " ".join(run(GPUINIT_CPU_ENGINE="numba", **environment))
    assert message == (
        "ImportError: GPUINIT_CPU_ENGINE is numba, but importing Numba failed "
        "(ImportError: Numba needs NumPy 2.3 or less. Got NumPy 2.4.). "
        'To reinstall it: pip install --upgrade "gpuinit[cpu]"'
    )


def test_numba_without_its_compiler_is_not_used():
    assert run(AUTOMATIC + DIGEST, NUMBA_DISABLE_JIT="1")[0] == digest()
    assert "NUMBA_DISABLE_JIT is set" in " ".join(run(GPUINIT_CPU_ENGINE="numba", NUMBA_DISABLE_JIT="1"))


HITS = (
    DIGEST
    + """
from gpuinit import compiled
print(sum(compiled.kernel(w.dtype, 1).stats.cache_hits.values()))
"""
)


def test_compiled_code_is_kept_on_disk_and_a_spoilt_cache_does_no_harm(tmp_path):
    environment = {"GPUINIT_CPU_ENGINE": "numba", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(HITS, **environment) == [digest(), "True", "0"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".nbi", ".nbc"}
    assert run(HITS, **environment) == [digest(), "True", "1"]
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    assert run(HITS, **environment) == [digest(), "True", "0"]


CHANGES = {
    "he_normal": """
import numpy as np
from gpuinit import quantile
quantile.R = (np.nextafter(quantile.R[0], np.float32(1)), *quantile.R[1:])
""",
    "normal": """
from gpuinit import kernel_files, quantile
table = kernel_files.normal_table
quantile.normal_table = kernel_files.normal_table = lambda dtype: table(dtype) * (1 + dtype.type(2**-20))
""",
}
MADE = """
import hashlib, gpuinit
print(hashlib.sha256(gpuinit.{function}((300, 301), seed=5, device="cpu")).hexdigest())
"""


@pytest.mark.parametrize("function", CHANGES)
def test_a_constant_that_changed_elsewhere_is_compiled_anew(tmp_path, function):
    """Numba keeps machine code on disk, and looks at one file and at what the function closes over alone."""
    environment = {"GPUINIT_CPU_ENGINE": "numba", "NUMBA_CACHE_DIR": str(tmp_path)}
    made = MADE.format(function=function)
    before = run(made, **environment)
    after = run(CHANGES[function] + made, **environment)
    assert after != before
    assert after == run(CHANGES[function] + made, GPUINIT_CPU_ENGINE="numpy")
    assert before == run(made, **environment)


def test_a_full_disk_for_the_cache_does_no_harm(tmp_path):
    """No file may grow: writing fails as it begins, or in the middle."""
    resource = pytest.importorskip("resource", reason="this system has no such limits")
    assert resource
    for limit in (0, 3000):
        full = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        environment = {"GPUINIT_CPU_ENGINE": "numba", "NUMBA_CACHE_DIR": str(tmp_path / str(limit))}
        assert run(full + HITS, **environment) == [digest(), "True", "0"]
        assert run(HITS, **environment) == [digest(), "True", "0"]


def test_no_directory_for_the_cache_does_no_harm(tmp_path):
    """A file where the directory should be stops even the superuser, whom permissions do not."""
    shutil.copytree(PACKAGE, tmp_path / "gpuinit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "gpuinit" / "__pycache__").touch()
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "directory")
    environment = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "GPUINIT_CPU_ENGINE": "numba"}
    assert run(HITS, tmp_path, **environment) == [digest(), "True", "0"]
    assert run(HITS, tmp_path, **environment, NUMBA_CACHE_DIR=nowhere) == [digest(), "True", "0"]
    assert (tmp_path / "gpuinit" / "__pycache__").read_bytes() == b""


def send_digest(sender, engine):
    os.environ["GPUINIT_CPU_ENGINE"] = engine
    os.environ["GPUINIT_NUM_THREADS"] = "2"
    sender.send(digest((2048, 2048)))


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_makes_the_same(monkeypatch, method, loaded):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "2")
    expected = digest((2048, 2048))
    if loaded:
        monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
        assert digest((2048, 2048)) == expected
    else:
        compiled.kernel.cache_clear()
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_digest, args=(sender, "numba"))
    child.start()
    assert receiver.poll(120)
    assert receiver.recv() == expected
    child.join()
    assert child.exitcode == 0


# Threads


def test_threads_may_call_at_once_and_first(monkeypatch):
    expected = digest((1024, 1031))
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    compiled.kernel.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(digest, [(1024, 1031)] * 8))
    assert set(made) == {expected}


def test_the_limit_of_threads_and_the_affinity_are_obeyed(monkeypatch):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    kernel = compiled.kernel
    running = set()

    def spying(dtype, distribution):
        def fill(*arguments):
            running.add(threading.get_ident())
            if len(running) == expected:
                all_there.set()
            all_there.wait(60)  # the others must not do all the work before the last one starts
            kernel(dtype, distribution)(*arguments)

        return fill

    def threads_that_ran(shape):
        running.clear()
        all_there.clear()
        gpuinit.he_normal(shape, seed=1, device="cpu")
        return running

    monkeypatch.setattr(compiled, "kernel", spying)
    all_there, here = threading.Event(), {threading.get_ident()}
    for limit in (1, 3):
        monkeypatch.setenv("GPUINIT_NUM_THREADS", str(limit))
        expected = limit
        ran = threads_that_ran((4096, 2048))
        assert here <= ran
        assert len(ran) == limit
    expected = 1
    assert threads_that_ran((64, 64)) == here  # too small to repay a thread
    monkeypatch.delenv("GPUINIT_NUM_THREADS")
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
        assert threads_that_ran((4096, 2048)) == here
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        expected = 2
        assert len(threads_that_ran((4096, 2048))) == 2


def test_an_error_in_a_thread_stops_the_others_and_is_raised(monkeypatch):
    calls = []
    failed = threading.Event()

    def fail_once(*arguments):
        """In the third thread, which the caller would wait for last."""
        calls.append(threading.get_ident())
        if len(set(calls)) == 3 and not failed.is_set():
            failed.set()
            raise MemoryError("no room")
        failed.wait(60)
        time.sleep(0.01)

    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    monkeypatch.setenv("GPUINIT_NUM_THREADS", "3")
    monkeypatch.setattr(compiled, "kernel", lambda dtype, distribution: fail_once)
    monkeypatch.setattr(cpu, "COMPILED_ELEMENTS_AT_ONCE", 2**14)
    monkeypatch.setattr(cpu, "COMPILED_ELEMENTS_PER_THREAD", 2**14)
    with pytest.raises(MemoryError, match="no room"):
        gpuinit.he_normal((2048, 1024), device="cpu")
    assert len(calls) < 2**21 // 2**14
