"""A child forked while another thread imports or compiles: it makes its arrays, and ends.

Each case is a process of its own, so that nothing has been loaded before and no framework has threads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpuinit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PRELUDE = """
import faulthandler, hashlib, importlib.machinery, multiprocessing, os, signal, sys, threading
import time, traceback, warnings
import gpuinit
from gpuinit import devices, loading
from gpuinit.backends import cpu

os.environ["GPUINIT_CPU_ENGINE"] = "numba"
warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
parent = os.getpid()
reached, go = threading.Event(), threading.Event()

def fill(dtype="float32", device="cpu"):
    return hashlib.sha256(gpuinit.he_normal((1024, 1025), seed=5, dtype=dtype, device=device)).hexdigest()

def stop_here():
    if os.getpid() == parent:
        reached.set()
        assert go.wait(60)

class Stops:
    "A finder of modules that stops a thread in the middle of importing this one."
    def __init__(self, name, then=stop_here):
        self.name, self.then = name, then
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (self.then(), execute(module))
            return spec

def child_of(action):
    "Fork, and do the action in the child: its exit status, -14 where it hangs, and then where it does."
    child = os.fork()
    if child == 0:
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(60)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def check(dtype="float32", device="cpu"):
    assert fill(dtype, device) == EXPECTED[dtype], dtype

def fork_during(target):
    "The status of a child forked while this thread is stopped, which must end well after that."
    failures = []
    threading.excepthook = lambda given: (traceback.print_exception(given.exc_value), failures.append(given))
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    assert reached.wait(60)
    status = child_of(CHILD)
    go.set()
    thread.join()
    assert not failures
    return status

CHILD = check
"""


@pytest.fixture(scope="module")
def expected() -> str:
    """The digests, as Python writes them. Making them must not load in the process what a case stops in."""
    made = {
        dtype: hashlib.sha256(gpuinit.he_normal((1024, 1025), seed=5, dtype=dtype, device="cpu")).hexdigest()
        for dtype in ("float32", "float16")
    }
    return repr(made)


def run(code: str, expected: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPUINIT")}
    done = subprocess.run(
        [sys.executable, "-c", f"EXPECTED = {expected}\n{PRELUDE}\n{code}"],
        env=inherited | {"GPUINIT_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # shown where the test fails
    return done.stdout


# What another thread does as the process forks.
STOPPED = {
    "imports Numba for a fill": """
sys.meta_path.insert(0, Stops("numba"))
print(fork_during(check))
""",
    "imports a part of Numba for a fill": """
sys.meta_path.insert(0, Stops("numba.core.typing"))
print(fork_during(check))
""",
    "imports Numba for the user": """
sys.meta_path.insert(0, Stops("numba.core.types"))
print(fork_during(lambda: __import__("numba")))
""",
    "imports something else for the user": """
sys.meta_path.insert(0, Stops("http.server"))
print(fork_during(lambda: __import__("http.server")))
""",
    "compiles for a fill": """
from gpuinit import compiled
compile_kernel = compiled.compile_kernel
compiled.compile_kernel = lambda *given, **more: (stop_here(), compile_kernel(*given, **more))[1]
print(fork_during(check))
""",
    "compiles for the user": """
import numba
def compile_slowly():
    with numba.core.compiler_lock.global_compiler_lock:
        stop_here()
print(fork_during(compile_slowly))
""",
    "imports the pool of threads": """
os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
assert "concurrent.futures" not in sys.modules
sys.meta_path.insert(0, Stops("concurrent.futures"))
print(fork_during(check))
""",
    "imports CuPy for a fill": """
os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
sys.meta_path.insert(0, Stops("cupy"))
CHILD = lambda: (check(device=None), gpuinit.he_normal(3, device="cuda"))
warnings.simplefilter("ignore", gpuinit.FallbackWarning)
print(fork_during(lambda: check(device=None)))
""",
    "imports CuPy for the user": """
os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
sys.meta_path.insert(0, Stops("cupy"))
def import_cupy():
    try:
        import cupy
    except ImportError:
        pass
CHILD = lambda: check(device=None)
print(fork_during(import_cupy))
""",
    "asks CuPy for devices": """
import types
class CUDARuntimeError(Exception):
    status = 100
def count():
    stop_here()
    raise CUDARuntimeError
runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=count)
sys.modules["cupy"] = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
def check_that_it_does_not_ask():
    del runtime.getDeviceCount
    check(device=None)
    assert "spawn" in devices.cuda_problem()
CHILD = check_that_it_does_not_ask
print(fork_during(lambda: check(device=None)))
""",
    "fills": """
os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
fill_tile = cpu.fill_tile
cpu.fill_tile = lambda *given: (stop_here(), fill_tile(*given))
print(fork_during(check))
""",
}


@pytest.mark.parametrize("what", STOPPED)
def test_a_child_forked_while_another_thread_is_stopped_fills_and_ends(expected, what):
    if "umba" in what or "compiles" in what:
        pytest.importorskip("numba")
    if "imports CuPy" in what and importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    assert run(STOPPED[what], expected) == "0\n"


def test_a_child_of_such_a_child_fills_and_ends(expected):
    pytest.importorskip("numba")
    code = """
sys.meta_path.insert(0, Stops("numba"))
def fork_again():
    assert child_of(check) == 0
    check()
CHILD = fork_again
print(fork_during(check))
"""
    assert run(code, expected) == "0\n"


def test_multiprocessing_forks_while_another_thread_loads(expected):
    pytest.importorskip("numba")
    code = """
sys.meta_path.insert(0, Stops("numba"))
thread = threading.Thread(target=check, daemon=True)
thread.start()
assert reached.wait(60)
def work(dtype):
    signal.alarm(60)
    return fill(dtype)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(work, list(EXPECTED)).get(100) == list(EXPECTED.values()))
go.set()
thread.join()
"""
    assert run(code, expected) == "True\n"


def test_the_thread_that_loads_may_fork(expected):
    """As a handler of a signal may, in the middle of whatever."""
    pytest.importorskip("numba")
    code = """
forked = []
def fork(*_):
    if os.getpid() == parent and not forked:
        forked.append(None)
        forked.append(child_of(check))
        check()
signal.signal(signal.SIGUSR1, fork)
sys.meta_path.insert(0, Stops("numba.core.typing", lambda: signal.raise_signal(signal.SIGUSR1)))
check()
print(forked[1], cpu.engine(1, numpy.dtype("float32")))
"""
    assert run(f"import numpy\n{code}", expected) == "0 numba\n"


def test_the_parent_goes_on_with_numba_and_the_child_with_what_was_loaded(expected):
    pytest.importorskip("numba")
    code = """
import numpy
from gpuinit import compiled
float16, float32 = numpy.dtype("float16"), numpy.dtype("float32")
check()
compile_kernel = compiled.compile_kernel
compiled.compile_kernel = lambda *given, **more: (stop_here(), compile_kernel(*given, **more))[1]
def see_the_engines():
    assert (cpu.engine(1, float32), cpu.engine(1, float16)) == ("numba", "numpy")
    check()
    check("float16")
CHILD = see_the_engines
print(fork_during(lambda: check("float16")), cpu.engine(1, float16))
assert not loading.under_way and not loading.lost
print(child_of(lambda: check("float16")), cpu.engine(1, float16))
"""
    assert run(code, expected) == "0 numba\n0 numba\n"


def test_a_child_forked_at_any_moment_of_a_load_fills_and_ends(expected, tmp_path):
    """Without a made-up stop: the whole of it, from nothing to compiled.

    A child forked before it begins would load Numba by itself, rightly, and on a busy machine for minutes.
    """
    pytest.importorskip("numba")
    code = """
thread = threading.Thread(target=check, daemon=True)
thread.start()
while thread.is_alive() and not loading.under_way:
    time.sleep(0.001)
statuses = []
while thread.is_alive() and len(statuses) < 40:
    statuses.append(child_of(check))
thread.join()
print(set(statuses))
"""
    assert run(code, expected, NUMBA_CACHE_DIR=str(tmp_path)) == "{0}\n"


def test_a_hang_would_be_seen(expected, capsys):
    """The control: nothing is noted at the fork."""
    pytest.importorskip("numba")
    code = """
sys.meta_path.insert(0, Stops("numba"))
signal.alarm = lambda seconds, alarm=signal.alarm: alarm(3)
loading.note_what_is_lost.__code__ = (lambda: None).__code__
print(fork_during(check))
"""
    assert run(code, expected) == "-14\n"
    assert "fork_during" in capsys.readouterr().out


BRIEF = {
    "fractions": "gpuinit.normal((3, 4), seed=1)",
    "pathlib": "gpuinit.normal((3, 4), seed=1)",
    "hashlib": "gpuinit.he_normal(3, seed=1, name='w')",
}


@pytest.mark.parametrize("module", BRIEF)
def test_a_fork_waits_for_imports_of_milliseconds(expected, module):
    """Which are not noted: the child makes such an array too."""
    code = f"""
os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
for name in ("gpuinit.exact", {module!r}):
    sys.modules.pop(name, None)
def wait_a_moment():
    if os.getpid() == parent:
        reached.set()
        time.sleep(0.2)
sys.meta_path.insert(0, Stops({module!r}, wait_a_moment))
CHILD = lambda: {BRIEF[module]}
print(fork_during(lambda: {BRIEF[module]}))
assert loading.brief.acquire(blocking=False)
"""
    assert run(code, expected) == "0\n"


def test_a_child_waits_for_no_import_that_a_fork_did_not_wait_for(expected):
    """Where a thread holds the lock of brief imports for longer than a fork waits."""
    code = """
os.environ["GPUINIT_CPU_ENGINE"] = "numpy"
def hold():
    with loading.brief:
        stop_here()
CHILD = lambda: gpuinit.normal((3, 4), seed=1, name="w")
print(fork_during(hold))
assert loading.brief.acquire(blocking=False)
"""
    assert run(code, expected) == "0\n"


def test_an_interrupt_as_a_load_is_noted_leaves_nothing_noted(expected):
    code = """
class Interrupted(list):
    def append(self, entry):
        super().append(entry)
        raise KeyboardInterrupt
loading.under_way = Interrupted()
for _ in range(2):
    try:
        with loading.loading("numba"):
            pass
    except KeyboardInterrupt:
        print(loading.under_way, loading.unfinished())
"""
    assert run(code, expected) == "[] set()\n" * 2


def test_what_is_not_to_be_loaded_now_is_not_remembered(expected):
    """A handler of a signal that comes while its thread loads Numba, say."""
    code = """
with loading.loading("numba"):
    assert "an import" in devices.cuda_problem()
print("an import" in (devices.cuda_problem() or ""))
"""
    assert run(code, expected) == "False\n"


def test_without_a_fork_nothing_is_lost():
    from gpuinit import loading

    assert loading.lost == set()
    assert loading.can_load("anything")
    assert Path(loading.__file__).parent == Path(gpuinit.__file__).parent
