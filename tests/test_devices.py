"""Which device is used, and the fallback where CUDA cannot be."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import multiprocessing
import os
import subprocess
import sys
import threading
import types
import unittest.mock
import warnings

import cuda_sim
import numpy as np
import pytest
from conftest import forget

import gpuinit
from gpuinit import devices
from gpuinit.backends import cpu, cuda

EXPECTED = gpuinit.he_normal((5, 7), seed=1, device="cpu").tobytes()


def test_the_backends_have_the_same_functions():
    for name in ("empty", "fill"):
        signatures = [
            [(p.name, p.default, p.kind) for p in inspect.signature(getattr(b, name)).parameters.values()]
            for b in (cpu, cuda)
        ]
        assert signatures[0] == signatures[1]


# Choosing among usable devices


def test_the_default_device_is_cuda_where_it_can_be_used(cupy_sim):
    w = gpuinit.he_normal((5, 7), seed=1)
    assert isinstance(w, cupy_sim.ndarray)
    assert w.get().tobytes() == EXPECTED
    assert isinstance(gpuinit.he_normal((5, 7), device="cpu"), np.ndarray)


def test_a_numbered_device_is_used_and_the_current_one_kept(cupy_sim):
    for device in ("cuda:1", cupy_sim.cuda.Device(1)):
        w = gpuinit.he_normal((5, 7), seed=1, device=device)
        assert w.device.id == 1
        assert w.get().tobytes() == EXPECTED
        assert cupy_sim.current == [0]
    with cupy_sim.cuda.Device(1):
        assert gpuinit.he_normal(3, device="cuda").device.id == 1
        assert gpuinit.he_normal(3).device.id == 1
        assert gpuinit.he_normal(3, device="cuda:0").device.id == 0


def test_the_current_device_is_kept_after_an_error(cupy_sim, monkeypatch):
    monkeypatch.setattr(cuda, "launch_shape", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpuinit.he_normal(3, device="cuda:1")
    assert cupy_sim.current == [0]


def test_a_device_that_is_not_there_is_an_error(cupy_sim):
    for device in ("cuda:2", "cuda:7"):
        with pytest.raises(ValueError, match=rf"^device must be one of cuda:0 to cuda:1, got '{device}'$"):
            gpuinit.he_normal(3, device=device)


def test_out_decides_the_device(cupy_sim):
    host, first = np.ones((5, 7), np.float32), cupy_sim.empty((5, 7), np.float32)
    with cupy_sim.cuda.Device(1):
        second = cupy_sim.empty((5, 7), np.float32)
    for out in (first, second):
        assert gpuinit.he_normal((5, 7), seed=1, out=out) is out
        assert gpuinit.he_normal((5, 7), seed=1, out=out, device="cuda") is out
        assert out.get().tobytes() == EXPECTED
    for out, device, place in (
        (host, "cuda", "cpu"),
        (host, "cuda:0", "cpu"),
        (first, "cpu", "cuda:0"),
        (first, "cuda:1", "cuda:0"),
        (second, "cuda:0", "cuda:1"),
    ):
        message = rf"^out must be on '{device}', as asked, got an array on {place}$"
        with pytest.raises(ValueError, match=message):
            gpuinit.he_normal((5, 7), out=out, device=device)
    assert (host == 1).all()


class Offers:
    """An array of another library on a device."""

    def __init__(self, array: cuda_sim.ndarray) -> None:
        self.host, self.device = array.host, array.device


class OffersInterface(Offers):
    read_only = False
    shift = 0

    @property
    def __cuda_array_interface__(self):
        interface = cuda_sim.ndarray(self.host, self.device).__cuda_array_interface__
        pointer, _ = interface["data"]
        return dict(interface, data=(pointer + self.shift, self.read_only))


class OffersDlpack(Offers):
    kind = 2

    def __dlpack__(self, **keywords):
        raise AssertionError("the stand-in reads the array itself")

    def __dlpack_device__(self):
        return self.kind, self.device.id


class OffersManaged(OffersDlpack):
    kind = 13


class OffersBoth(OffersDlpack):
    """As torch does for bfloat16: its CUDA array interface has a type that NumPy does not know."""

    @property
    def __cuda_array_interface__(self):
        interface = cuda_sim.ndarray(self.host, self.device).__cuda_array_interface__
        return dict(interface, typestr="<V4")


@pytest.mark.parametrize("offers", [OffersInterface, OffersDlpack, OffersManaged, OffersBoth])
@pytest.mark.parametrize("number", [0, 1])
def test_out_may_be_of_another_library_on_any_device(cupy_sim, offers, number):
    with cupy_sim.cuda.Device(number):
        out = offers(cupy_sim.empty((5, 7), np.float32))
    assert gpuinit.he_normal((5, 7), seed=1, out=out) is out
    assert out.host.tobytes() == EXPECTED
    assert gpuinit.he_normal((5, 7), seed=1, out=out, device=f"cuda:{number}") is out


def test_read_only_and_misaligned_memory_on_a_device_is_refused(cupy_sim):
    out = OffersInterface(cupy_sim.empty((5, 7), np.float32))
    before = out.host.tobytes()
    out.read_only = True
    with pytest.raises(ValueError, match=r"^out must be writable, got a read-only array$"):
        gpuinit.he_normal((5, 7), out=out)
    out.read_only, out.shift = False, 2
    with pytest.raises(ValueError, match=r"^out must be aligned to its items on a CUDA device, got address"):
        gpuinit.he_normal((5, 7), out=out)
    assert out.host.tobytes() == before


def test_the_copy_that_cupy_makes_across_devices_is_seen(cupy_sim):
    """The control: an array taken on the wrong device would be filled, and lost."""
    with cupy_sim.cuda.Device(1):
        out = cupy_sim.empty((5, 7), np.float32)
    assert not np.shares_memory(cupy_sim.asarray(out).host, out.host)


def test_the_stand_in_refuses_what_cupy_would_misread(cupy_sim):
    """The controls for what the other tests rely on."""
    out = cupy_sim.empty(8, np.float32)
    good = [out, *map(np.uint64, (0, 8, 1, 0, 0, 0)), np.uint32(1), np.float32(1)]
    kernel = cuda.kernel("float32")
    kernel((1, 1), (2, 1), tuple(good))
    for position, wrong in [(1, 0), (1, np.int64(0)), (7, np.uint64(1)), (8, 1.0), (8, np.float64(1))]:
        bad = [*good[:position], wrong, *good[position + 1 :]]
        with pytest.raises(TypeError, match=f"argument {position} must be"):
            kernel((1, 1), (2, 1), tuple(bad))
    with pytest.raises(TypeError, match="takes 9 arguments, got 8"):
        kernel((1, 1), (2, 1), tuple(good[:-1]))
    with pytest.raises(ValueError, match="launch bounds"):
        kernel((1, 1), (512, 1), tuple(good))
    with cupy_sim.cuda.Device(1), pytest.raises(ValueError, match="not on the current device"):
        kernel((1, 1), (2, 1), tuple(good))


def test_no_launch_for_no_elements(cupy_sim, monkeypatch):
    monkeypatch.setattr(cuda, "launch_shape", lambda *_: pytest.fail("launched"))
    for shape in [(0,), (0, 4096), (4096, 0)]:
        assert gpuinit.he_normal(shape, device="cuda").shape == shape
    assert gpuinit.he_normal((4, 6), index=np.s_[2:2], device="cuda").shape == (0, 6)


def test_first_calls_from_many_threads_agree(cupy_sim):
    results = []
    barrier = threading.Barrier(16)

    def work():
        barrier.wait()
        results.append(gpuinit.he_normal((5, 7), seed=1, device="cuda").get().tobytes())

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [EXPECTED] * 16


# The fallback


class NoCupy:
    """A finder that gives an error for `import cupy`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "cupy":
            raise self.error


def broken_import(error):
    def arrange(monkeypatch):
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.setattr(sys, "meta_path", [NoCupy(error), *sys.meta_path])

    return arrange


def broken_runtime(status, driver=0):
    def fail():
        raise cuda_sim.CUDARuntimeError(status)

    def arrange(monkeypatch):
        runtime = types.SimpleNamespace(
            CUDARuntimeError=cuda_sim.CUDARuntimeError,
            getDeviceCount=fail,
            driverGetVersion=lambda: driver,
        )
        cupy = types.SimpleNamespace(
            cuda=types.SimpleNamespace(runtime=runtime, Device=cuda_sim.Device), ndarray=cuda_sim.ndarray
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    return arrange


def broken_compiler(error):
    def fail(self):
        raise error

    def arrange(monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", cuda_sim)
        monkeypatch.setattr(cuda_sim.RawKernel, "compile", fail)

    return arrange


def cupy_that_is(module):
    def arrange(monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", module)

    return arrange


def made_up_module(**parts):
    """A module of another author, from a file."""
    module = types.ModuleType("cupy")
    module.__dict__.update(parts, __file__="/home/me/cupy.py")
    return module


def folder_called_cupy(monkeypatch):
    """Which Python imports as a package without a file."""
    monkeypatch.setitem(sys.modules, "cupy", None)  # so that it is gone afterwards, if it was not there
    del sys.modules["cupy"]
    folder = importlib.machinery.ModuleSpec("cupy", None, is_package=True)
    folder.submodule_search_locations = ["/home/me/cupy"]
    finder = types.SimpleNamespace(find_spec=lambda name, *_: folder if name == "cupy" else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])


def refuse_to_count():
    raise ImportError("libcuda.so.1: cannot open shared object file")


ANSWERS_NOTHING = types.SimpleNamespace(
    CUDARuntimeError=cuda_sim.CUDARuntimeError, getDeviceCount=refuse_to_count
)
NOT_CUPY = r"the cupy that Python finds is not CuPy \({}\)\. To use CUDA, rename that, and install CuPy: pip"

CAUSES = {
    "an empty folder": (folder_called_cupy, NOT_CUPY.format("/home/me/cupy")),
    "another module": (cupy_that_is(made_up_module()), NOT_CUPY.format("/home/me/cupy.py")),
    "another module with a part of the name": (
        cupy_that_is(made_up_module(cuda=True)),
        NOT_CUPY.format("/home/me/cupy.py"),
    ),
    "another module made in memory": (cupy_that_is(object()), NOT_CUPY.format("made in memory")),
    "a module that says yes to all": (
        cupy_that_is(unittest.mock.MagicMock(__file__="x")),
        NOT_CUPY.format("x"),
    ),
    "a CuPy that does not answer": (
        cupy_that_is(made_up_module(cuda=types.SimpleNamespace(runtime=ANSWERS_NOTHING))),
        r"CuPy does not answer \(ImportError: libcuda\.so\.1: cannot open .*\)\. To reinstall it: pip",
    ),
    "no CuPy": (
        broken_import(ModuleNotFoundError("No module named 'cupy'", name="cupy")),
        r"CuPy is not installed\. To install it: pip install \"gpuinit\[cuda12\]\"",
    ),
    "a CuPy that lacks a part": (
        broken_import(ImportError("libcudart.so.12: cannot open", name="cupy_backends")),
        r"importing CuPy failed \(ImportError: libcudart.so.12: cannot open\)\. To reinstall it: pip",
    ),
    "a cache directory that cannot be made": (
        broken_import(PermissionError(13, "Permission denied", "/sys/nope")),
        r"importing CuPy failed \(PermissionError: .*/sys/nope'\)\. Set CUPY_CACHE_DIR to a directory",
    ),
    "a CuPy that fails in its own way": (
        broken_import(RuntimeError("odd")),
        r"importing CuPy failed \(RuntimeError: odd\)\. To reinstall it: pip",
    ),
    "no driver": (
        broken_runtime(35),
        r"there is no NVIDIA driver\. Install one, or run the container with --gpus all",
    ),
    "an old driver": (
        broken_runtime(35, 11020),
        r"the NVIDIA driver supports CUDA 11\.2 only, too old for this CuPy\. Update the driver",
    ),
    "no device": (broken_runtime(100), r"there is no CUDA device\. Check nvidia-smi"),
    "a forked process": (broken_runtime(3), r'CUDA does not start\..* use the "spawn" start method'),
    "another error": (broken_runtime(999), r"CUDA does not start \(CUDARuntimeError: cudaError 999\)"),
    "no headers": (
        broken_compiler(RuntimeError("Failed to find CUDA headers. Install cupy-cuda12x[ctk]")),
        r"CUDA's compiler or headers are missing \(RuntimeError: .*\)\. To install: pip install",
    ),
    "no compiler": (
        broken_compiler(RuntimeError("CuPy failed to load libnvrtc.so.12")),
        r"CUDA's compiler or headers are missing \(RuntimeError: .*\)\. To install: pip install",
    ),
    "a kernel cache that cannot be written": (
        broken_compiler(PermissionError(13, "Permission denied", "/ro/cache")),
        r"the kernel cannot be cached \(PermissionError: .*\)\. Set CUPY_CACHE_DIR to a directory",
    ),
    "a device that the compiler does not know": (
        broken_compiler(RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")),
        r"the kernel does not compile or load \(RuntimeError: CUDA_ERROR_NO_BINARY_FOR_GPU\)",
    ),
}


@pytest.fixture(params=CAUSES)
def broken(request, monkeypatch):
    """CUDA broken in one way; gives the pattern of the message."""
    arrange, pattern = CAUSES[request.param]
    with monkeypatch.context() as patch:
        arrange(patch)
        forget()
        yield f"^CUDA cannot be used, so the same weights are made on the CPU: {pattern}"
    forget()


def test_cuda_falls_back_to_the_same_weights_with_one_warning(broken):
    with pytest.warns(gpuinit.FallbackWarning, match=broken) as caught:
        made = [gpuinit.he_normal((5, 7), seed=1, device=d) for d in ("cuda", "cuda", "cuda:7")]
    assert [type(w) for w in made] == [np.ndarray] * 3
    assert [w.tobytes() for w in made] == [EXPECTED] * 3
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the caller's line, not ours


def test_the_fallback_as_an_error_is_one_every_time(broken):
    with warnings.catch_warnings():
        warnings.simplefilter("error", gpuinit.FallbackWarning)
        for _ in range(2):
            with pytest.raises(gpuinit.FallbackWarning, match=broken):
                gpuinit.he_normal((5, 7), seed=1, device="cuda")


def test_the_interpreters_option_makes_the_fallback_an_error():
    """With the start of the message: Python reads -W before it could import a category of this package."""
    code = "import sys; sys.modules['cupy'] = None; import gpuinit; gpuinit.he_normal(3, device='cuda')"
    command = [sys.executable, "-W", "error:CUDA cannot be used", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FallbackWarning: CUDA cannot be used" in done.stderr


def test_no_device_asked_for_is_no_warning(broken):
    assert gpuinit.he_normal((5, 7), seed=1).tobytes() == EXPECTED
    assert gpuinit.he_normal((5, 7), seed=1, device="cpu").tobytes() == EXPECTED


def test_a_device_that_is_no_name_is_an_error_whatever_cupy_is(broken):
    for device in (5, 0.5, object()):
        with pytest.raises(TypeError, match=r"^device must be None, \"cpu\", \"cuda\", \"cuda:N\" or a cupy"):
            gpuinit.he_normal((5, 7), device=device)


def test_out_on_a_device_that_cannot_be_used_is_an_error(broken):
    out = OffersInterface(cuda_sim.ndarray(np.ones((5, 7), np.float32)))
    with pytest.raises(RuntimeError, match=r"^out is on a CUDA device, but CUDA cannot be used: "):
        gpuinit.he_normal((5, 7), out=out)
    assert (out.host == 1).all()


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", MemoryError, "the CUDA device has no memory"),
        (
            "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: operation not permitted when stream is capturing",
            RuntimeError,
            r"^the kernel cannot be loaded while a CUDA graph is captured .* before the capture$",
        ),
    ],
)
def test_what_passes_is_an_error_that_is_not_remembered(cupy_sim, monkeypatch, cause, kind, message):
    def fail(self):
        raise RuntimeError(cause)

    out = cupy_sim.ndarray(np.ones((5, 7), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(cupy_sim.RawKernel, "compile", fail)
        with pytest.raises(kind, match=message):
            gpuinit.he_normal((5, 7), seed=1)
        with pytest.raises(kind, match=message):
            gpuinit.he_normal((5, 7), seed=1, out=out)
    assert (out.get() == 1).all()
    assert isinstance(gpuinit.he_normal((5, 7), seed=1), cupy_sim.ndarray)


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        ("out of memory", MemoryError, "no memory left for the kernel"),
        ("stream is capturing", RuntimeError, "before the capture$"),
        ("something else", RuntimeError, "does not compile or load"),
    ],
)
def test_a_second_kernel_that_cannot_be_loaded_is_an_error(cupy_sim, monkeypatch, cause, kind, message):
    """The one for distributions that are not round 0, which nothing has tried before."""
    gpuinit.he_normal((5, 7), seed=1, device="cuda")
    compile_kernel = cupy_sim.RawKernel.compile

    def fail(self):
        if "#define SHIFTED" in self.code:
            raise RuntimeError(cause)
        compile_kernel(self)

    out = cupy_sim.ndarray(np.ones((5, 7), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(cupy_sim.RawKernel, "compile", fail)
        with pytest.raises(kind, match=message):
            gpuinit.normal((5, 7), seed=1, out=out)
    assert (out.host == 1).all()
    gpuinit.normal((5, 7), seed=1, out=out)
    assert (out.host != 1).all()


def test_a_forked_child_looks_for_cuda_anew(cupy_sim, monkeypatch):
    assert devices.cuda_problem() is None
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setattr(cupy_sim.runtime, "getDeviceCount", lambda: 0)
    assert "there is no CUDA device" in devices.cuda_problem()


def fill_in_child(queue):
    queue.put(gpuinit.he_normal((700, 700), seed=2, device="cpu").tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_fill_on_the_cpu(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    expected = gpuinit.he_normal((700, 700), seed=2, device="cpu").tobytes()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=fill_in_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child.start()
    assert queue.get(timeout=60) == expected
    child.join()


@pytest.mark.parametrize("kind", ["empty folder", "module"])
def test_a_folder_or_module_called_cupy_on_the_path_is_a_cause_of_the_fallback(tmp_path, kind):
    """A folder alone does not hide a CuPy that is installed, so none is looked for there."""
    place = tmp_path / ("cupy" if kind == "empty folder" else "cupy.py")
    place.mkdir() if kind == "empty folder" else place.write_text("answer = 42")
    hidden = "import sys; sys.path[:] = [p for p in sys.path if not glob.glob(p + '/cupy/__init__.py')]; "
    code = f"import glob, gpuinit; {hidden if kind == 'empty folder' else ''}{CALL}"
    answer = run(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert answer.startswith("numpy|CUDA cannot be used")
    assert f"the cupy that Python finds is not CuPy ({place})" in answer


# With the real CuPy, in a process of its own

CALL = """
import sys, warnings
import gpuinit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    w = gpuinit.he_normal((5, 7), seed=1, device="cuda")
print(type(w).__module__, *[str(warning.message) for warning in caught], sep="|")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_real_cupy_with_a_cache_directory_that_cannot_be_made():
    for variable in ({"CUPY_CACHE_DIR": "/dev/null/x"}, {"CUPY_CACHE_DIR": "", "HOME": "/dev/null/x"}):
        answer = run(CALL, **variable)
        assert "numpy|CUDA cannot be used" in answer
        assert "Set CUPY_CACHE_DIR to a directory that can be written" in answer


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_real_cupy_without_a_visible_device():
    answer = run(CALL, CUDA_VISIBLE_DEVICES="")
    assert "there is no NVIDIA driver" in answer or "there is no CUDA device" in answer
