"""The sampler compiled for the CPU by Numba: stream format 2.

Twins: kernels/fill.cu and gpuinit/quantile.py have the same names in the same order, and the tests compare
them by bytes. The constants are those of gpuinit/quantile.py. Numba freezes them into the machine code that
it keeps on disk, and compiles anew when this file or what a function closes over changes: see `constants`.

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
from typing import Any, NamedTuple
from zlib import crc32

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from gpuinit.kernel_files import normal_table
from gpuinit.quantile import (
    N64,
    NORMAL,
    NORMAL_BETWEEN,
    PHILOX_M0,
    PHILOX_M1,
    PHILOX_ROUNDS,
    PHILOX_W0,
    PHILOX_W1,
    Q64,
    R64,
    TRUNCATED_NORMAL,
    UNIFORM_BETWEEN,
    N,
    Q,
    R,
    Y,
    segments,
)

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

(R0, R1, R2, R3), (Y0, Y1), (N0,), (Q0, Q1) = ([float(x) for x in numbers] for numbers in (R, Y, N, Q))

LOW_WORD = 0xFFFFFFFF

# Blocks side by side. With fewer the processor waits for its multiplier, with more the numbers do not stay in
# its registers: measured with AVX-512, AVX2 and SSE.
BLOCKS = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16

INT32, INT64 = ir.IntType(32), ir.IntType(64)
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
WIDTHS = {INT32: 32, INT64: 64, FLOAT: 32, DOUBLE: 64}
AS_WIDE = {INT32: FLOAT, INT64: DOUBLE, FLOAT: INT32, DOUBLE: INT64}


class Lanes:
    """A vector of numbers in the function that is being compiled.

    An operator emits one LLVM instruction. Its other operand is a vector of the same type, or a number, which
    every lane takes.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value
        self.element, self.count = value.type.element, value.type.count
        self.bits_each = WIDTHS[self.element]

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

    def at_most(self, number: Lanes | float) -> Lanes:
        """The smaller one. Of a comparison LLVM would make a mask for what follows, which takes longer."""
        return self.call("minnum", "f", self.value.type, self.other(number))

    def at_least(self, number: Lanes | float) -> Lanes:
        """The larger one."""
        return self.call("maxnum", "f", self.value.type, self.other(number))

    def absolute(self) -> Lanes:
        """Of signed integers; the most negative one is itself."""
        return self.call("abs", "i", ir.IntType(1), ir.Constant(ir.IntType(1), 0))

    def call(self, name: str, letter: str, second_type: ir.Type, second: ir.Value) -> Lanes:
        """The result of an intrinsic function of LLVM."""
        types = self.value.type, second_type
        full_name = f"llvm.{name}.v{self.count}{letter}{WIDTHS[self.element]}"
        function = get_or_insert_function(self.builder.module, ir.FunctionType(types[0], types), full_name)
        return Lanes(self.builder, self.builder.call(function, [self.value, second]))

    def below(self, number: int, then: Lanes, otherwise: Lanes) -> Lanes:
        """then if self < number else otherwise, for unsigned integers"""
        smaller = self.builder.icmp_unsigned("<", self.value, self.other(number))
        return Lanes(self.builder, self.builder.select(smaller, then.value, otherwise.value))

    def is_below(self, number: Lanes) -> Lanes:
        """All bits of a lane where it is the smaller one of two signed integers, none elsewhere."""
        smaller = self.builder.icmp_signed("<", self.value, number.value)
        return Lanes(self.builder, self.builder.sext(smaller, self.value.type))

    def choose(self, then: Lanes, otherwise: Lanes) -> Lanes:
        """then where all bits are set, otherwise where none is"""
        mask = self.builder.trunc(self.value, ir.VectorType(ir.IntType(1), self.count))
        return Lanes(self.builder, self.builder.select(mask, then.value, otherwise.value))

    def to_floats(self) -> Lanes:
        """Signed integers rounded to floats as wide."""
        return self.emit("sitofp", ir.VectorType(AS_WIDE[self.element], self.count))

    def unsigned_to_floats(self) -> Lanes:
        """Unsigned integers rounded to floats as wide."""
        return self.emit("uitofp", ir.VectorType(AS_WIDE[self.element], self.count))

    def integers(self) -> Lanes:
        """The bits of floats."""
        return self.bits(AS_WIDE[self.element])

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


def transpose(rows: list[Lanes]) -> list[Lanes]:
    """Within every 128 bits: column i of the rows, for every i. Two rows of 64-bit numbers, or four of 32."""
    if len(rows) == 2:
        return list(interleave(*rows))
    element = rows[0].element
    low01, high01 = interleave(*rows[:2])
    low23, high23 = interleave(*rows[2:])
    pairs = (low01, low23), (high01, high23)
    return [x.bits(element) for a, b in pairs for x in interleave(a.bits(INT64), b.bits(INT64))]


def in_every_lane(builder: ir.IRBuilder, number: ir.Value, count: int) -> Lanes:
    nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(INT32, 0))
    return Lanes(builder, first).shuffle(Lanes(builder, first), [0] * count)


def look_up(table: ir.GlobalVariable, rows: Lanes) -> list[Lanes]:
    """The columns of a table, each lane from its row, by 16 bytes: a gather took five times as long."""
    builder, count = rows.builder, rows.count
    element = table.value_type.element.element
    at_once = 128 // WIDTHS[element]  # numbers in 16 bytes, and lanes between which they are transposed
    vector = ir.VectorType(element, at_once)
    places = [builder.extract_element(rows.value, ir.Constant(INT32, lane)) for lane in range(count)]
    columns = []
    for first in range(0, table.value_type.element.count, at_once):

        def load(lane: int, first: int = first) -> Lanes:
            zero = ir.Constant(INT32, 0)
            pointer = builder.gep(table, [zero, places[lane], ir.Constant(INT32, first)])
            return Lanes(builder, builder.load(builder.bitcast(pointer, vector.as_pointer()), align=16))

        joined = []
        for lane in range(at_once):
            parts = [load(other) for other in range(lane, count, at_once)]
            while len(parts) > 1:
                parts = [
                    a.shuffle(b, range(2 * a.count)) for a, b in zip(parts[::2], parts[1::2], strict=True)
                ]
            joined.append(parts[0])
        columns += transpose(joined)
    return columns


def numpy_type(element: ir.Type) -> np.dtype:
    """That of a float."""
    return np.dtype(f"f{WIDTHS[element] // 8}")


def table_of(module: ir.Module, element: ir.Type) -> ir.GlobalVariable:
    """The table of the normal's quantile in the module that is being compiled."""
    name = f"normal_table_{WIDTHS[element]}"
    if name not in module.globals:
        numbers = normal_table(numpy_type(element))
        rows = [ir.Constant(ir.ArrayType(element, len(row)), row.tolist()) for row in numbers]
        table = ir.GlobalVariable(module, ir.ArrayType(rows[0].type, len(rows)), name)
        table.initializer = ir.Constant(table.value_type, rows)
        table.global_constant, table.linkage, table.align = True, "internal", 16
    return module.globals[name]


class Numbers(NamedTuple):
    """As the kernel's, in every lane; None where a distribution has no such number."""

    scale: Lanes
    mean: Lanes | None = None
    low: Lanes | None = None
    high: Lanes | None = None
    step: Lanes | None = None
    start_above: Lanes | None = None
    start_below: Lanes | None = None
    tail_above: Lanes | None = None
    tail_below: Lanes | None = None
    split: Lanes | None = None


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
    return word.to_floats() * 2.0**-31


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


def ratio(a, unit):
    """R of tail probability a, in units of 2**-unit: the polynomial of its segment. For float64 too."""
    table, bits = segments(numpy_type(a.element)), a.integers()
    rows = (bits >> table.shift.item()) - (table.first + table.octave * unit).item()
    *others, r = look_up(table_of(a.builder.module, a.element), rows)
    t = (bits & table.fraction.item() | table.one.item()).bits(a.element) - table.origin.item()
    for coefficient in reversed(others):
        r = r * t + coefficient
    return r


def normal(s):
    """The normal sample: u * R(1 - |u|), u = s / (2**31 + 1/2) for the word as a signed integer s."""
    a = (1 - (s.absolute() << 1)).unsigned_to_floats()
    return s.to_floats() * ratio(a, s.bits_each)


def normal_between(s, n):
    """The normal sample between two bounds: that of the middle of the word's share of the probability."""
    sign = 2 ** (s.bits_each - 1)
    below = s.is_below(n.split)
    u = (s - n.split ^ below).unsigned_to_floats() * n.step + below.choose(n.start_below, n.start_above)
    a = (s ^ sign - 1 ^ below).unsigned_to_floats() * n.step + below.choose(n.tail_below, n.tail_above)
    return (u.integers() ^ (below & sign)).bits(u.element) * ratio(a, s.bits_each - 1)


def to_weight(sample, distribution, n):
    weight = sample * n.scale
    if distribution >= NORMAL:
        weight = weight + n.mean
    if distribution >= UNIFORM_BETWEEN:
        weight = weight.at_least(n.low).at_most(n.high)
    return weight


def weights_of(words, distribution, n, uniform, truncated_normal):
    """The weights of words as wide as a sample; the last two are the functions of that width."""
    if distribution == NORMAL:
        w = map(normal, words)
    elif distribution == NORMAL_BETWEEN:
        w = [normal_between(word, n) for word in words]
    else:
        w = map(uniform, words)
        if distribution == TRUNCATED_NORMAL:
            w = truncated_normal(*w)
    return [to_weight(sample, distribution, n) for sample in w]


def weights(block, stream, key, distribution, n):
    """The four float32 weights of every block."""
    words = [word.low_halves() for word in philox4x32(block, stream, key)]
    return weights_of(words, distribution, n, uniform, truncated_normal)


def join64(low, high):
    """Words of 64 bits from their halves."""
    return low & LOW_WORD | high << 32


def uniform64(word):
    """u in [-1, 1] from 64 bits, as for 32."""
    return word.to_floats() * 2.0**-63


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


def weights64(block, stream, key, distribution, n):
    """The two float64 weights of every block."""
    halves = philox4x32(block, stream, key)
    words = [join64(*halves[:2]), join64(*halves[2:])]
    return weights_of(words, distribution, n, uniform64, truncated_normal64)


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
    return transpose(weights(*request))


def packet_float16(*request):
    w0, w1, w2, w3 = weights(*request)
    return interleave(round_to_float16(w0, w1), round_to_float16(w2, w3))


def packet_bfloat16(*request):
    w0, w1, w2, w3 = weights(*request)
    return interleave(round_to_bfloat16(w0, w1), round_to_bfloat16(w2, w3))


def packet_float64(*request):
    return transpose(weights64(*request))


# For each dtype: what makes it, the type written (Numba has no 16-bit floats), and that of the sample.
ENTRIES: dict[np.dtype, tuple[Callable[..., Any], type[np.generic], type[np.generic]]] = {
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
def store_packet(typing, out, place, low, high, stream, key, numbers, distribution, constants):
    """Write the weights of the block with these words and of the BLOCKS - 1 after it to out[place], ...

    The high word is that of them all.
    """
    packet = next(packet for packet, written, _ in ENTRIES.values() if numba_type(written) == out.dtype)

    def generate(context, builder, signature, arguments):
        array, place, low, high, stream, key, numbers, *_ = arguments

        def in_every_block(number):
            return in_every_lane(builder, number, BLOCKS)

        def words(number):
            low = in_every_block(number)
            return low, low >> 32

        low, high = in_every_block(low), in_every_block(high)
        lanes = [ir.Constant(INT64, number) for number in blocks_of_lanes(out.dtype.bitwidth)]
        low += Lanes(builder, ir.Constant(low.value.type, lanes))
        each = [builder.extract_value(numbers, i) for i in range(len(numbers.type.elements))]
        n = Numbers(*map(in_every_block, each))
        data = builder.gep(context.make_array(out)(context, builder, array).data, [place])
        for number, part in enumerate(
            packet((low, high), words(stream), words(key), distribution.literal_value, n)
        ):
            parts = builder.bitcast(data, part.value.type.as_pointer())
            target = builder.gep(parts, [ir.Constant(INT32, number)])
            builder.store(part.value, target, align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    types_of = out, place, low, high, stream, key, numbers, distribution, constants
    return types.void(*types_of), generate


def make_fill(distribution: int, constants: int) -> Callable[..., None]:
    """The function to compile for a distribution."""

    def fill(out, starts, row_stride, key, stream, numbers):
        """Row r of group g of out, C-contiguous (rows, columns), gets the elements from
        starts[g] + r * row_stride on; the groups are as many as the starts, of as many rows each.
        """
        lanes = 2 if out.itemsize == 8 else 4
        size = BLOCKS * lanes
        flat, part = out.reshape(-1), np.empty(size, out.dtype)
        rows, columns = out.shape
        rows_each = rows // len(starts)
        for row in range(rows):
            first = starts[row // rows_each] + np.uint64(row % rows_each) * row_stride
            done = 0
            while done < columns:
                start = first + np.uint64(done)
                block, phase = start // np.uint64(lanes), np.int64(start % np.uint64(lanes))
                low, high = np.int64(block % np.uint64(2**32)), block // np.uint64(2**32)
                left = min(columns - done, (2**32 - low) * lanes - phase)  # with this high word
                whole = 0 if phase else left // size
                target, place, packets = (flat, row * columns + done, whole) if whole else (part, 0, 1)
                for i in range(packets):
                    to, first_low = place + i * size, low + i * BLOCKS
                    store_packet(target, to, first_low, high, stream, key, numbers, distribution, constants)
                if whole:
                    done += whole * size
                else:
                    count = min(size - phase, left)
                    # Cut first: an index that Python would let be negative costs LLVM its vector stores.
                    made, wanted = part[phase : phase + count], out[row, done : done + count]
                    for i in range(count):
                        wanted[i] = made[i]
                    done += count

    return fill


@cache
def kernel(dtype: np.dtype, distribution: int) -> Callable[..., None]:
    """The compiled function: from Numba's cache on disk, else compiled now, which takes a second or two.

    Called as kernel(out, starts, row_stride, key, stream, numbers), see `make_fill`.
    """
    try:
        return compile_kernel(dtype, distribution, cache=True)
    except Exception:  # none of the cache's directories can be written, or what lies there cannot be read
        return compile_kernel(dtype, distribution, cache=False)


def compile_kernel(dtype: np.dtype, distribution: int, cache: bool) -> Callable[..., None]:
    _, written, sample = ENTRIES[dtype]
    u64, number = types.uint64, numba_type(sample)
    split = types.int64 if sample is np.float64 else types.int32
    numbers = types.Tuple([number] * 9 + [split] if distribution >= NORMAL else [number])
    signature = types.void(numba_type(written)[:, ::1], u64[::1], u64, u64, u64, numbers)
    fill = make_fill(distribution, constants(np.dtype(sample), distribution))
    # Without Python's check for a division by zero.
    compiled: Callable[..., None] = numba.njit(signature, error_model="numpy", nogil=True, cache=cache)(fill)
    return compiled


def constants(sample_type: np.dtype, distribution: int) -> int:
    """A checksum of all that the compiled function takes from elsewhere."""
    philox = PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1, PHILOX_ROUNDS
    layout = [number.tolist() for number in segments(sample_type)[1:]] if distribution >= NORMAL else []
    numbers = [float(number) for number in (*R, *Y, *N, *Q, *R64, *N64, *Q64)]
    written = repr((philox, numbers, layout, distribution)).encode()
    table = normal_table(sample_type).tobytes() if distribution >= NORMAL else b""
    return crc32(table, crc32(written))
