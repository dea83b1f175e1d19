"""The kernel's reciprocal is 1 / x rounded to nearest, whatever the device's approximation within one ulp.

Newton's step from y is fma(y, fma(-x, y, 1), y). Scaling x by a power of two scales all of it exactly, so the
2**23 mantissas, each with the floats just below and above 1 / x, are all there is to try. One in 2**24 goes
wrong: from below for the mantissa of all ones, where y is a power of two. NVIDIA's own __frcp_rn takes the
same step from the same y, as tests/test_budget.py reads from its code, and is documented to round to nearest:
so no device has that y.
"""

from __future__ import annotations

import ctypes

import host_build
import numpy as np
import pytest

from gpuinit.backends import cuda

PROBE = """
extern "C" __global__ void probe_reciprocal(float *x, uint64 n)
{
    for (uint64 i = thread_x(); i < n; i += threads_x())
        x[i] = reciprocal(x[i]);
}
"""

MANTISSAS = np.arange(2**23, dtype=np.uint32)


def floats(exponent: int) -> np.ndarray:
    """Every float32 in [2**exponent, 2**(exponent + 1))."""
    return (MANTISSAS | np.uint32(exponent + 127 << 23)).view(np.float32)


@pytest.mark.skipif(host_build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("flag", "wrong"), [("-DAPPROXIMATE_BELOW", [2**23 - 1]), ("-DAPPROXIMATE_ABOVE", [])]
)
def test_every_mantissa_from_every_approximation(flag, wrong):
    x = floats(0)
    made = x.copy()
    arguments = [ctypes.c_void_p(made.ctypes.data), ctypes.c_uint64(made.size)]
    host_build.launch(
        host_build.build(cuda.source() + PROBE, flag), "probe_reciprocal", (1,), (1,), arguments
    )
    different = made.view(np.uint32) != (np.float32(1) / x).view(np.uint32)
    assert np.flatnonzero(different).tolist() == wrong


def test_every_mantissa_on_the_device(device):
    for exponent in (-21, -14, 0, 6):  # the denominators' product is between 8e-7 and 6e1
        x = floats(exponent)
        made = device.reciprocal(x)
        assert made.tobytes() == (np.float32(1) / x).tobytes()
