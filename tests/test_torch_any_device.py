"""gpuinit.torch on devices without a kernel, or where it cannot be used: what the CPU makes is sent there."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from contextvars import copy_context

import cuda_sim
import pytest

import gpuinit

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')

import torch_made_up  # noqa: E402
from torch_devices import placer, tobytes  # noqa: E402

import gpuinit.torch as gt  # noqa: E402
from gpuinit import devices  # noqa: E402
from gpuinit.torch import fill  # noqa: E402

PROBLEM = "CuPy is not installed. To install it: do"


@pytest.fixture(scope="module")
def trials():
    """What went wrong in a process where torch has a device more."""
    done = subprocess.run([sys.executable, torch_made_up.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("trial", torch_made_up.TRIALS, ids=lambda trial: trial.__name__)
def test_a_device_of_torch_s_that_has_no_kernel(trials, trial):
    assert trials[trial.__name__] is None, trials[trial.__name__]


@pytest.mark.parametrize("device", ["mps", "xpu", "xla", "cuda:1"])
def test_fake_tensors_of_devices_that_are_not_here_are_left_alone(device):
    with torch._subclasses.FakeTensorMode():
        tensor = torch.empty(3, 4, device=device)
    state, version = torch.get_rng_state(), tensor._version
    for make in (gt.he_normal_, gt.init.xavier_uniform_):
        assert make(tensor) is tensor
    assert tensor.device.type == device.split(":")[0]
    assert torch.equal(state, torch.get_rng_state())
    assert tensor._version == version


# CUDA that torch can use, and gpuinit cannot


@pytest.fixture
def on_cuda(cupy_sim, monkeypatch):
    """Give what places a tensor on the stand-in's device; no kernel may run there."""
    monkeypatch.setattr(devices, "fallback_warned", False)
    monkeypatch.setattr(fill, "SCRATCH", 64)
    cuda_sim.launches.clear()
    yield placer("cuda-sim", monkeypatch)
    assert cuda_sim.launches == []


@pytest.mark.parametrize("layout", [lambda tensor: tensor, lambda tensor: tensor.T])
def test_without_cupy_the_cpu_makes_it_with_one_warning(on_cuda, monkeypatch, layout):
    monkeypatch.setattr(devices, "cuda_problem", lambda: PROBLEM)
    tensors = [on_cuda(layout(torch.full((23, 9), 9.0))) for _ in range(2)]
    with pytest.warns(gpuinit.FallbackWarning, match=f"^CUDA .* made on the CPU: {PROBLEM}$") as caught:
        _ = [gt.he_normal_(tensor, seed=3) for tensor in tensors]
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the caller's line, not ours
    expected = gt.he_normal_(torch.empty(tensors[0].shape), seed=3)
    assert [tobytes(tensor) for tensor in tensors] == [tobytes(expected)] * 2


def test_the_warning_as_an_error_is_one_before_anything_is_drawn_or_written(on_cuda, monkeypatch):
    monkeypatch.setattr(devices, "cuda_problem", lambda: PROBLEM)
    tensor = on_cuda(torch.full((23, 9), 9.0))
    state = torch.get_rng_state()
    for checking in (False, True, False):
        with pytest.raises(gpuinit.FallbackWarning, match=PROBLEM):
            copy_context().run(lambda checking=checking: [fill.checking.set(checking), gt.he_normal_(tensor)])
    assert tobytes(tensor) == tobytes(torch.full((23, 9), 9.0))
    assert torch.equal(state, torch.get_rng_state())


def test_meta_and_fake_tensors_need_no_cupy(monkeypatch):
    monkeypatch.setattr(devices, "cuda_problem", lambda: pytest.fail("asked"))
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(3, 4, device="cuda")
    for tensor in (fake, torch.empty(3, 4, device="meta"), torch.empty(3, 4)):
        gt.he_normal_(tensor, seed=3)


def test_rocm_is_no_cuda(on_cuda, monkeypatch):
    """Where torch is built for ROCm its devices are called cuda too. There is no remedy, so no warning."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    tensor = on_cuda(torch.full((23, 9), 9.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gt.he_normal_(tensor, seed=3)
    assert tobytes(tensor) == tobytes(gt.he_normal_(torch.empty(23, 9), seed=3))
