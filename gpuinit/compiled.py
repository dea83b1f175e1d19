"""The sampler compiled for the CPU by Numba: stream format 2.

Twins: kernels/fill.cu and gpuinit/quantile.py have the same names in the same order, and the tests compare
them by bytes. The constants are written out here, as in the kernel, and not imported: Numba freezes them into
the machine code that it keeps on disk, and compiles anew only when this very file changes.

Where the kernel's thread makes one block, a function here makes BLOCKS of them side by side. They run once,
while Numba compiles: their numbers are vectors of LLVM, and each of Python's operators on these emits one
instruction. So nothing is left to a vectoriser's judgement, and every float operation is a separate IEEE
round-to-nearest one in the kernel's order. LLVM fuses none while `fastmath` is off; a test reads the
assembly.

Importing this module imports Numba, so only gpuinit/backends/cpu.py does, and late.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

UNIFORM = 0
TRUNCATED_NORMAL = 1

# Multipliers and Weyl increments of philox4x32 (SC'11, section 3.3).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

# R(t) = R0 + R1*t + N*(R2 + R3/Q), Y = (Y0 - t)*(Y1 - t), N = Y + N0, Q = Y*(Q1 - t) + Q0 in float32, with a
# weighted relative error of 1.7e-7 (tools/fit_quantile.py).
R0, R1, R2, R3 = map(np.float32, (0.41277757, 0.04760623, 0.0046481327, 0.30843925))
Y0, Y1 = map(np.float32, (0.96703994, 1.5457196))
N0 = np.float32(0.06913901)
Q0, Q1 = map(np.float32, (0.043334197, 1.7829732))

# R(v) = R0 + R1*N/Q, N and Q monic polynomials in v = 1 - t, in float64, weighted relative error 9.3e-18,
# constants first (tools/fit_quantile.py).
R64 = (0.10441156857015813, 4.542458417924603)
N64 = (
    0.002425975850266509,
    0.08301813801091237,
    1.1406042206919167,
    8.103931143111144,
    32.062861048550324,
    71.20019308647001,
    85.66270153974064,
    51.47534857961033,
    13.189084017454736,
)
Q64 = (
    0.012304641324063564,
    0.4445631917015149,
    6.517378109542563,
    50.104883348364446,
    218.5920655295031,
    549.5499832962482,
    778.0011993750466,
    584.8669118160961,
    209.70818874502353,
    29.332203457829202,
)

LOW_WORD = 0xFFFFFFFF

# Blocks side by side. With fewer the processor waits for its multiplier, with more the numbers do not stay in
# its registers: measured with AVX-512, AVX2 and SSE.
BLOCKS = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16

INT32, INT64 = ir.IntType(32), ir.IntType(64)
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
WIDTHS = {INT32: 32, INT64: 64, FLOAT: 32, DOUBLE: 64}


class Lanes:
    """A vector of numbers in the function that is being compiled.

    An operator emits one LLVM instruction. Its other operand is a vector of the same type, or a number, which
    every lane takes.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value
        self.element, self.count = value.type.element, value.type.count

    def emit(self, instruction: str, *operands: Any) -> Lanes:
        """The result of an instruction of llvmlite's builder."""
        return Lanes(self.builder, getattr(self.builder, instruction)(self.value, *operands))

    def other(self, operand: Lanes | float) -> ir.Value:
        """The second operand as LLVM knows it."""
        if isinstance(operand, Lanes):
            return operand.value
        number = float(operand) if self.element in (FLOAT, DOUBLE) else operand
        return ir.Constant(self.value.type, [ir.Constant(self.element, number)] * self.count)

    def float_or_integer(self, instruction: str, operand: Lanes | float) -> Lanes:
        """The result of an instruction that has two names."""
        prefix = "f" if self.element in (FLOAT, DOUBLE) else ""
        return self.emit(prefix + instruction, self.other(operand))

    def __add__(self, operand: Lanes | float) -> Lanes:
        return self.float_or_integer("add", operand)

    def __sub__(self, operand: Lanes | float) -> Lanes:
        return self.float_or_integer("sub", operand)

    def __rsub__(self, number: float) -> Lanes:
        return Lanes(self.builder, self.other(number)) - self

    def __mul__(self, operand: Lanes | float) -> Lanes:
        return self.float_or_integer("mul", operand)

    def __rtruediv__(self, number: float) -> Lanes:
        return Lanes(self.builder, self.builder.fdiv(self.other(number), self.value))

    def __and__(self, operand: Lanes | int) -> Lanes:
        return self.emit("and_", self.other(operand))

    def __or__(self, operand: Lanes | int) -> Lanes:
        return self.emit("or_", self.other(operand))

    def __xor__(self, operand: Lanes | int) -> Lanes:
        return self.emit("xor", self.other(operand))

    def __lshift__(self, bits: int) -> Lanes:
        return self.emit("shl", self.other(bits))

    def __rshift__(self, bits: int) -> Lanes:
        return self.emit("lshr", self.other(bits))

    def at_most(self, number: float) -> Lanes:
        """The smaller one. Of a comparison LLVM would make a mask for what follows, which takes longer."""
        name = f"llvm.minnum.v{self.count}f{WIDTHS[self.element]}"
        minnum = get_or_insert_function(
            self.builder.module, ir.FunctionType(self.value.type, [self.value.type] * 2), name
        )
        return Lanes(self.builder, self.builder.call(minnum, [self.value, self.other(number)]))

    def below(self, number: int, then: Lanes, otherwise: Lanes) -> Lanes:
        """then if self < number else otherwise, for unsigned integers"""
        smaller = self.builder.icmp_unsigned("<", self.value, self.other(number))
        return Lanes(self.builder, self.builder.select(smaller, then.value, otherwise.value))

    def to(self, element: ir.Type) -> Lanes:
        """Signed integers rounded to floats."""
        return self.emit("sitofp", ir.VectorType(element, self.count))

    def bits(self, element: ir.Type) -> Lanes:
        """The same bits as lanes of another type, as many of them as there is room for."""
        count = self.count * WIDTHS[self.element] // WIDTHS[element]
        return self.emit("bitcast", ir.VectorType(element, count))

    def low_halves(self) -> Lanes:
        """The low 32 bits of every 64, of the first half of the lanes and of the second in turns."""
        halves = self.bits(INT32)
        half = self.count // 2
        return halves.shuffle(halves, [2 * place for i in range(half) for place in (i, half + i)])

    def shuffle(self, other: Lanes, places: Any) -> Lanes:
        """The lanes at these places of self and other, one after another."""
        mask = [ir.Constant(INT32, place) for place in places]
        return self.emit("shuffle_vector", other.value, ir.Constant(ir.VectorType(INT32, len(mask)), mask))


def interleave(a: Lanes, b: Lanes) -> tuple[Lanes, Lanes]:
    """Within every 128 bits, lanes of a and of b in turns: of the low half of these, and of the high half.

    So it takes one instruction of any processor; across the 128 bits it would take more.
    """
    half = 64 // WIDTHS[a.element]
    low = [place for i in range(a.count) if i % (2 * half) < half for place in (i, a.count + i)]
    return a.shuffle(b, low), a.shuffle(b, [place + half for place in low])


def in_every_lane(builder: ir.IRBuilder, number: ir.Value, count: int) -> Lanes:
    nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(INT32, 0))
    return Lanes(builder, first).shuffle(Lanes(builder, first), [0] * count)


def philox4x32(block, stream, key):
    """The four words of every block, 64 bits a lane, of which the high 32 are waste."""
    c0, c1 = block
    c2, c3 = stream
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0 = (c0 & LOW_WORD) * PHILOX_M0
        product1 = (c2 & LOW_WORD) * PHILOX_M1
        c0 = product1 >> 32 ^ c1 ^ k0
        c1 = product1
        c2 = product0 >> 32 ^ c3 ^ k1
        c3 = product0
        k0 += PHILOX_W0
        k1 += PHILOX_W1
    return c0, c1, c2, c3


def uniform(word):
    """u in [-1, 1]: the word as a signed integer, in units of 2**31. Both ends are reached."""
    return word.low_halves().to(FLOAT) * 2.0**-31


def quadratic(t):
    """Y, which N and Q share."""
    return (Y0 - t) * (Y1 - t)


def denominator(t, y):
    return y * (Q1 - t) + Q0


def quantile(u, t, y, r3_by_q):
    """The truncated normal sample in units of its bound. The cut at 1 is what proves |sample| <= 1."""
    line = t * R1 + R0
    return u * ((y + N0) * (r3_by_q + R2) + line).at_most(1)


def truncated_normal(u0, u1, u2, u3):
    """The four samples of every block. One reciprocal serves them: 1/q0 = q1 * ((q2*q3) / (q0*q1*q2*q3))."""
    t0, t1, t2, t3 = u0 * u0, u1 * u1, u2 * u2, u3 * u3
    y0, y1, y2, y3 = quadratic(t0), quadratic(t1), quadratic(t2), quadratic(t3)
    q0, q1, q2, q3 = denominator(t0, y0), denominator(t1, y1), denominator(t2, y2), denominator(t3, y3)
    q01 = q0 * q1
    q23 = q2 * q3
    inverse = 1 / (q01 * q23) * R3
    inverse01 = inverse * q23
    inverse23 = inverse * q01
    return (
        quantile(u0, t0, y0, inverse01 * q1),
        quantile(u1, t1, y1, inverse01 * q0),
        quantile(u2, t2, y2, inverse23 * q3),
        quantile(u3, t3, y3, inverse23 * q2),
    )


def weights(block, stream, key, distribution, limit):
    """The four float32 weights of every block."""
    w = map(uniform, philox4x32(block, stream, key))
    if distribution == TRUNCATED_NORMAL:
        w = truncated_normal(*w)
    return [sample * limit for sample in w]


def uniform64(low, high):
    """u in [-1, 1] from 64 bits, as for 32."""
    return (low & LOW_WORD | high << 32).to(DOUBLE) * 2.0**-63


def numerator64(v):
    n = (v + N64[-1]) * v
    for coefficient in N64[-2:0:-1]:
        n = (n + coefficient) * v
    return n + N64[0]


def denominator64(v):
    q = (v + Q64[-1]) * v
    for coefficient in Q64[-2:0:-1]:
        q = (q + coefficient) * v
    return q + Q64[0]


def quantile64(u, n, r1_by_q):
    return u * (n * r1_by_q + R64[0]).at_most(1)


def truncated_normal64(u0, u1):
    """The two samples of every block."""
    v0, v1 = 1 - u0 * u0, 1 - u1 * u1
    q0, q1 = denominator64(v0), denominator64(v1)
    inverse = 1 / (q0 * q1) * R64[1]
    return quantile64(u0, numerator64(v0), inverse * q1), quantile64(u1, numerator64(v1), inverse * q0)


def weights64(block, stream, key, distribution, limit):
    """The two float64 weights of every block."""
    words = philox4x32(block, stream, key)
    w = [uniform64(*words[:2]), uniform64(*words[2:])]
    if distribution == TRUNCATED_NORMAL:
        w = truncated_normal64(*w)
    return [sample * limit for sample in w]


def round_to_float16(first, second):
    """Two float32 weights rounded to nearest even into two 16-bit ones, the first in the low half."""
    return nearest_float16(first) | nearest_float16(second) << 16


def nearest_float16(weight):
    bits = weight.bits(INT32)
    sign = bits >> 16 & 0x8000
    magnitude = bits & 0x7FFFFFFF
    # The exponent is rebiased from 127 to 15, and 13 bits are cut off.
    normal = magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1) >> 13
    # Below 2**-14 the spacing is 2**-24 throughout, which is that of the float32 numbers in [0.5, 1).
    subnormal = (magnitude.bits(FLOAT) + 0.5).bits(INT32) - 0x3F000000
    return magnitude.below(0x38800000, subnormal, normal) | sign


def round_to_bfloat16(first, second):
    return nearest_bfloat16(first) >> 16 | nearest_bfloat16(second) & 0xFFFF0000


def nearest_bfloat16(weight):
    """In the high half; the low one is waste."""
    bits = weight.bits(INT32)
    return bits + 0x7FFF + (bits >> 16 & 1)


def packet_float32(*request):
    """The weights of BLOCKS blocks in order, in parts, as are those of the next three."""
    w0, w1, w2, w3 = weights(*request)
    low01, high01 = interleave(w0, w1)
    low23, high23 = interleave(w2, w3)
    low = interleave(low01.bits(INT64), low23.bits(INT64))
    high = interleave(high01.bits(INT64), high23.bits(INT64))
    return *low, *high


def packet_float16(*request):
    w0, w1, w2, w3 = weights(*request)
    return interleave(round_to_float16(w0, w1), round_to_float16(w2, w3))


def packet_bfloat16(*request):
    w0, w1, w2, w3 = weights(*request)
    return interleave(round_to_bfloat16(w0, w1), round_to_bfloat16(w2, w3))


def packet_float64(*request):
    return interleave(*weights64(*request))


# For each dtype: what makes it, the type that is written (Numba has no 16-bit floats), and that of the limit.
ENTRIES: dict[np.dtype, tuple[Callable[..., tuple[Lanes, ...]], type[np.generic], type[np.generic]]] = {
    np.dtype(np.float32): (packet_float32, np.float32, np.float32),
    np.dtype(np.float16): (packet_float16, np.int16, np.float32),
    np.dtype(bfloat16): (packet_bfloat16, np.uint16, np.float32),
    np.dtype(np.float64): (packet_float64, np.float64, np.float64),
}


def blocks_of_lanes(bits: int) -> list[int]:
    """The block of every lane: those with which a packet of weights of so many bits comes out in order."""
    in_second_half, next_pair = (1, 2) if bits == 16 else (BLOCKS // 4, 1)
    return [
        in_second_half * half + next_pair * pair + BLOCKS // 2 * lane
        for half in range(2)
        for pair in range(BLOCKS // 4)
        for lane in range(2)
    ]


def numba_type(scalar: type[np.generic]) -> types.Type:
    return numba.from_dtype(np.dtype(scalar))


@intrinsic(prefer_literal=True)
def store_packet(typing, out, place, low, high, stream, key, limit, distribution):
    """Write the weights of the block with these words and of the BLOCKS - 1 after it to out[place], ...

    The high word is that of them all.
    """
    packet = next(packet for packet, written, _ in ENTRIES.values() if numba_type(written) == out.dtype)

    def generate(context, builder, signature, arguments):
        array, place, low, high, stream, key, limit, _ = arguments

        def in_every_block(number):
            return in_every_lane(builder, number, BLOCKS)

        def words(number):
            low = in_every_block(number)
            return low, low >> 32

        low, high = in_every_block(low), in_every_block(high)
        numbers = [ir.Constant(INT64, number) for number in blocks_of_lanes(out.dtype.bitwidth)]
        low += Lanes(builder, ir.Constant(low.value.type, numbers))
        request = (low, high), words(stream), words(key), distribution.literal_value, in_every_block(limit)
        data = builder.gep(context.make_array(out)(context, builder, array).data, [place])
        for number, part in enumerate(packet(*request)):
            parts = builder.bitcast(data, part.value.type.as_pointer())
            target = builder.gep(parts, [ir.Constant(INT32, number)])
            builder.store(part.value, target, align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(out, place, low, high, stream, key, limit, distribution), generate


def fill(out, first, row_stride, key, stream, distribution, limit):
    """Row r of out, C-contiguous (rows, columns), gets the elements from first + r * row_stride on."""
    lanes = 2 if out.itemsize == 8 else 4
    size = BLOCKS * lanes
    flat, part = out.reshape(-1), np.empty(size, out.dtype)
    rows, columns = out.shape
    for row in range(rows):
        done = 0
        while done < columns:
            start = first + np.uint64(row) * row_stride + np.uint64(done)
            block, phase = start // np.uint64(lanes), np.int64(start % np.uint64(lanes))
            low, high = np.int64(block % np.uint64(2**32)), block // np.uint64(2**32)
            left = min(columns - done, (2**32 - low) * lanes - phase)  # with this high word
            whole = 0 if phase else left // size
            target, place, packets = (flat, row * columns + done, whole) if whole else (part, 0, 1)
            if distribution == TRUNCATED_NORMAL:
                for i in range(packets):
                    store_packet(
                        target, place + i * size, low + i * BLOCKS, high, stream, key, limit, TRUNCATED_NORMAL
                    )
            else:
                for i in range(packets):
                    store_packet(
                        target, place + i * size, low + i * BLOCKS, high, stream, key, limit, UNIFORM
                    )
            if whole:
                done += whole * size
            else:
                count = min(size - phase, left)
                # Cut first: an index that Python would let be negative costs LLVM its vector stores.
                made, wanted = part[phase : phase + count], out[row, done : done + count]
                for i in range(count):
                    wanted[i] = made[i]
                done += count


@cache
def kernel(dtype: np.dtype) -> Callable[..., None]:
    """The compiled function for a dtype: from Numba's cache on disk, else compiled now, which takes a second.

    Called as kernel(out, first, row_stride, key, stream, distribution, limit), see `fill`.
    """
    try:
        return compile_kernel(dtype, cache=True)
    except Exception:  # none of the cache's directories can be written, or what lies there cannot be read
        return compile_kernel(dtype, cache=False)


def compile_kernel(dtype: np.dtype, cache: bool) -> Callable[..., None]:
    _, written, limit = ENTRIES[dtype]
    u64 = types.uint64
    signature = types.void(numba_type(written)[:, ::1], u64, u64, u64, u64, types.uint32, numba_type(limit))
    # Without Python's check for a division by zero.
    compiled: Callable[..., None] = numba.njit(signature, error_model="numpy", nogil=True, cache=cache)(fill)
    return compiled
