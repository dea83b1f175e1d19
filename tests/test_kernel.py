"""The kernel's source: NVRTC compiles it for every architecture, and nothing in it can be fused."""

from __future__ import annotations

import importlib.util
import itertools
import re

import host_build
import numpy as np
import pytest

from gpuinit.backends import cuda

ARCHITECTURES = (75, 80, 90, 100, 120)

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="CuPy, which brings NVRTC's bindings, is not installed"
)


def compile_to_ptx(source: str, options: tuple[str, ...]) -> str:
    image, ptx, log = cuda.compile_offline(source, options)
    assert log == ""  # not even a warning
    assert len(image) > 1000
    return ptx


@needs_nvrtc
@pytest.mark.parametrize("key_in_memory", [False, True], ids=["key", "key in memory"])
@pytest.mark.parametrize("shifted", [False, True], ids=["round 0", "shifted"])
@pytest.mark.parametrize("headers", [True, False], ids=["as CuPy", "no include path"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_the_kernel_with_nothing_fused_or_approximate(
    architecture, headers, shifted, key_in_memory
):
    options = cuda.compiler_options(architecture)
    if not headers:
        options = tuple(option for option in options if not option.startswith("-I"))
    ptx = compile_to_ptx(cuda.source(shifted, key_in_memory), options)
    for name in ("float32", "float16", "bfloat16", "float64"):
        assert f".entry fill_{name}(" in ptx
    assert faults(ptx) == []
    assert "st.global.v4" in ptx


# An approximation y of 1 / x and one Newton step: what `reciprocal` may fuse.
RECIPROCAL = re.compile(
    r"rcp\.approx\.ftz\.f32 (?P<y>%f\d+), (?P<x>%f\d+);\s*//.*\s*"
    r"neg\.ftz\.f32 +\t(?P<minus>%f\d+), (?P=x);\s*"
    r"(?:mov\.f32 +\t%f\d+, 0f3F800000;\s*)?"  # 1, where it is first used
    r"fma\.rn\.ftz\.f32 +\t(?P<error>%f\d+), (?P=minus), (?P=y), \S+;\s*"
    r"fma\.rn\.ftz\.f32 +\t%f\d+, (?P=y), (?P=error), (?P=y);"
)


def faults(ptx: str) -> list[str]:
    """Fused, approximate or contractible float operations: PTX fuses a mul or add that has no rounding."""
    ptx = RECIPROCAL.sub("", ptx)
    found = re.findall(r"\bfma\.\S+|\S+\.approx\S*", ptx)
    return found + re.findall(r"\b(?:mul|add|sub|div)(?:\.ftz|\.sat)*\.f(?:32|64)\b", ptx)


@needs_nvrtc
def test_a_plain_product_and_sum_are_seen():
    """The control: without the intrinsics the operations could fuse, with contraction they do."""
    for choice in itertools.product((False, True), repeat=2):
        code = cuda.source(*choice)
        plain = code.replace("__fmul_rn(a, b)", "a * b").replace("__fadd_rn(a, b)", "a + b")
        assert plain != code
        fused = tuple(option for option in cuda.compiler_options(90) if "fmad" not in option)
        assert any(fault.startswith("fma") for fault in faults(compile_to_ptx(plain, fused)))
    unrefined = cuda.source().replace("return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);", "return y;")
    assert unrefined != cuda.source()
    assert any(".approx" in fault for fault in faults(compile_to_ptx(unrefined, cuda.compiler_options(90))))


def run_on_host(library, distribution: int, numbers: tuple[float, ...], n: int = 2**16) -> bytes:
    out = np.zeros(n, np.float32)
    import ctypes

    arguments = [ctypes.c_void_p(out.ctypes.data)]
    arguments += [ctypes.c_uint64(x) for x in (0, n, 1, 0, 7, 0)]
    arguments += [ctypes.c_uint32(distribution), *map(ctypes.c_float, numbers)]
    arguments += [ctypes.c_int32(0)] if len(numbers) > 1 else []
    host_build.launch(library, "fill_float32", (3,), (64,), arguments)
    return out.tobytes()


@pytest.mark.skipif(host_build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(not host_build.FUSING, reason="only x86-64 hosts are told to fuse")
def test_contraction_changes_the_bits_and_is_off_in_the_host_build():
    """The control of the host layer: were contraction on, a quarter or an eighth of all would differ."""
    for distribution, numbers, least in ((1, (1.0,), 1 / 4), (2, (0.3, 0.7, *(0.0,) * 7), 1 / 8)):
        code = cuda.source(shifted=distribution > 1)
        off = run_on_host(host_build.build(code), distribution, numbers)
        on = run_on_host(host_build.build(code, host_build.CONTRACTION_ON), distribution, numbers)
        different = np.frombuffer(off, np.uint32) != np.frombuffer(on, np.uint32)
        assert different.mean() > least


@needs_nvrtc
@pytest.mark.parametrize("shifted", [False, True], ids=["round 0", "shifted"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_key_in_memory_is_loaded_once_and_16_bytes_wide_in_ptx(architecture, shifted):
    ptx = compile_to_ptx(cuda.source(shifted, key_in_memory=True), cuda.compiler_options(architecture))
    for name in ("float32", "float16", "bfloat16", "float64"):
        before_any_loop, *_ = re.split(r"^\$L\w+:", entry(ptx, f"fill_{name}"), flags=re.MULTILINE)
        given = re.search(rf"ld\.param\.u64 +\t(%rd\d+), \[fill_{name}_param_5\];", before_any_loop)[1]
        address = re.search(rf"cvta\.to\.global\.u64 +\t(%rd\d+), {given};", before_any_loop)[1]
        loads = re.findall(rf"\bld\.\S+ +\t.*\[{address}.*\];", entry(ptx, f"fill_{name}"))
        assert len(loads) == 1
        assert re.match(r"ld\.global\.(?:nc\.)?v4\.u32", loads[0])
        assert loads[0] in before_any_loop


def test_the_launch_fits_the_kernels_bounds():
    bounds = re.search(r"#define BLOCK_SIZE (\d+)", cuda.source())
    assert int(bounds[1]) == cuda.THREADS_PER_BLOCK
    assert cuda.source().count("__launch_bounds__(BLOCK_SIZE)") == 4


def test_the_launch_shape_is_one_that_devices_take():
    for length in (1, 5, 1000, 2**20, 2**40):
        for rows in (1, 2, 1000, 2**20, 2**40):
            for lanes in (2, 4, 8):
                grid, block = cuda.launch_shape(length, rows, lanes, 132 * 8)
                assert block[0] * block[1] == cuda.THREADS_PER_BLOCK
                assert 1 <= grid[0] < 2**31
                assert 1 <= grid[1] <= 65535
                assert grid[0] * grid[1] <= 132 * 8


def test_the_grid_is_as_many_blocks_as_the_device_holds_at_once(cupy_sim, monkeypatch):
    assert cuda.resident_blocks(0, "float32") == 5 * cupy_sim.MULTIPROCESSORS  # 46 registers count as 48
    assert cuda.launch_shape(2**30, 1, 4, 660) == ((660, 1), (256, 1))
    cuda.resident_blocks.cache_clear()
    monkeypatch.setattr(cupy_sim.RawKernel, "num_regs", 255)
    assert cuda.resident_blocks(0, "float32") == cupy_sim.MULTIPROCESSORS
    cuda.resident_blocks.cache_clear()
    monkeypatch.setattr(cupy_sim.RawKernel, "num_regs", 16)
    assert cuda.resident_blocks(0, "float32") == 8 * cupy_sim.MULTIPROCESSORS  # no more threads than 2048


def test_the_threads_of_a_block_fit_the_row():
    assert cuda.launch_shape(128, 1000, 4, 660) == ((1, 125), (32, 8))
    assert cuda.launch_shape(4096, 16384, 4, 660) == ((4, 165), (256, 1))
    assert cuda.launch_shape(1, 10**6, 4, 660) == ((1, 660), (1, 256))


def test_the_kernel_needs_no_header():
    assert "#include" not in cuda.source()


# What only a device compiles, and the host build cannot show, is read from the PTX.

ROUNDING = """
extern "C" __global__ void probe_rounding(float *given, uint32 *made)
{
    float first = given[0], second = given[1];
    made[0] = round_to_float16(first, second);
    made[1] = round_to_bfloat16(first, second);
}
"""


def entry(ptx: str, name: str) -> str:
    """The PTX of one kernel."""
    return ptx.split(f".entry {name}(")[1].split(".entry")[0]


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_keep_subnormal_numbers_and_the_bound_in_ptx(architecture):
    ptx = compile_to_ptx(cuda.source(), cuda.compiler_options(architecture))
    for name in ("float32", "float16", "bfloat16"):
        operations = re.findall(r"\b(?:mul|add)\.\S+", entry(ptx, f"fill_{name}"))
        assert operations.count("mul.rn.f32") >= 8  # four weights, normal or uniform
        assert operations.count("add.rn.ftz.sat.f32") >= 4
    ptx = compile_to_ptx(cuda.source(shifted=True), cuda.compiler_options(architecture))
    for name in ("float32", "float16", "bfloat16"):
        operations = re.findall(r"\b(?:mul|add|min|max)\.\S+", entry(ptx, f"fill_{name}"))
        # four weights of each of three distributions, two of which are cut
        assert all(operations.count(f"{last}.rn.f32") >= 12 for last in ("mul", "add"))
        assert all(operations.count(f"{last}.f32") >= 8 for last in ("min", "max"))
        assert not {"min.ftz.f32", "max.ftz.f32"} & {*operations}


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_weight_is_rounded_into_the_low_half_in_ptx(architecture):
    ptx = entry(
        compile_to_ptx(cuda.source() + ROUNDING, cuda.compiler_options(architecture)), "probe_rounding"
    )
    first, second = (
        re.search(rf"ld\.global\S*\.f32\s+(%f\d+), \[%rd\d+{place}\]", ptx)[1] for place in ("", r"\+4")
    )
    if architecture >= 80:  # the first operand goes to the high half
        assert re.search(rf"cvt\.rn\.f16x2\.f32 %r\d+, {second}, {first};", ptx)
        assert re.search(rf"cvt\.rn\.bf16x2\.f32 %r\d+, {second}, {first};", ptx)
    else:
        halves = rf"cvt\.rn\.f16\.f32 low, {first}; cvt\.rn\.f16\.f32 high, {second};"
        assert re.search(halves + r" mov\.b32 %r\d+, {low, high};", ptx)
