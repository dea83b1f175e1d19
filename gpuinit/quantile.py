"""The sampler in NumPy: stream format 2.

Twin: kernels/fill.cu has the same names in the same order; its header says what is computed and from which
counter, and the tests compare the two by bytes. Where the kernel makes one block of four words, a function
here makes `n` blocks in a few passes over arrays that stay in the cache. Those of the normal serve float32
and float64 alike.

Every float operation is a separate IEEE round-to-nearest add, multiply or divide of 1 by a number, in the
kernel's order. NumPy never fuses them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuinit.kernel_files import normal_table

Array = npt.NDArray[Any]
Numbers = tuple[Any, ...]  # scalars of NumPy, as the kernel's Numbers; the first alone where that is all


def in_arrays(kind: npt.DTypeLike, *numbers: float) -> tuple[Array, ...]:
    """Numbers as NumPy takes them soonest: with scalars a call takes half as long again."""
    return tuple(np.array(number, kind) for number in numbers)


UNIFORM = 0
TRUNCATED_NORMAL = 1
NORMAL = 2
UNIFORM_BETWEEN = 3
NORMAL_BETWEEN = 4

# Multipliers and Weyl increments of philox4x32 (SC'11, section 3.3): the increments are the fractions of the
# golden ratio and of sqrt(3), times 2**32.
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

# R(t) = R0 + R1*t + N*(R2 + R3/Q), Y = (Y0 - t)*(Y1 - t), N = Y + N0, Q = Y*(Q1 - t) + Q0 in float32, with a
# weighted relative error of 1.7e-7 (tools/fit_quantile.py).
R = in_arrays(np.float32, 0.41277757, 0.04760623, 0.0046481327, 0.30843925)
Y = in_arrays(np.float32, 0.96703994, 1.5457196)
N = in_arrays(np.float32, 0.06913901)
Q = in_arrays(np.float32, 0.043334197, 1.7829732)
ONE, UNIT = in_arrays(np.float32, 1, 2.0**-31)

# R(v) = R0 + R1*N/Q, N and Q monic polynomials in v = 1 - t, in float64, weighted relative error 9.3e-18,
# constants first (tools/fit_quantile.py).
R64 = in_arrays(np.float64, 0.10441156857015813, 4.542458417924603)
N64 = in_arrays(
    np.float64,
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
Q64 = in_arrays(
    np.float64,
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
ONE64, UNIT64 = in_arrays(np.float64, 1, 2.0**-63)

M0, M1, LOW_WORD, WORD_BITS = in_arrays(np.uint64, PHILOX_M0, PHILOX_M1, 0xFFFFFFFF, 32)

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)  # of a sample

FEW_BLOCKS = 32  # with more, integers of Python take longer than arrays: benchmarks/cpu_blocks.py


class Pair(NamedTuple):
    """Two words of every block, 64 bits each: all of one, then all of the other."""

    both: Array  # (2 * n,) uint64
    first: Array  # (n,)
    second: Array  # (n,)
    low: Array  # (2 * n,) uint32: the low halves, eight bytes apart
    high: Array  # the high halves, likewise
    words: Array  # (2, n) int32: the low halves


class Scratch(NamedTuple):
    """Working memory for n blocks. Arrays that share their memory are not needed at the same time.

    Arrays of samples are (lanes, n). Those of float32 have the lanes in the order that the words are made in:
    0, 2, 1 and 3.
    """

    even: Pair  # words 0 and 2 of the Philox state
    odd: Pair  # words 1 and 3
    product: Pair
    words: Array  # (4, n) int32, for float32; (2, n) int64 for float64, on even
    u: Array
    t: Array  # on even
    y: Array  # on odd
    q: Array  # on product
    r: Array  # on what float32 has its words on
    q_parts: tuple[Array, ...]  # for float32: lanes 0 and 2, lanes 1 and 3, then lane by lane
    r_parts: tuple[Array, ...]
    weights: Array  # (n, lanes), the lanes in their own order, on even
    placed: Array  # the same, in the order of u


def make_memory(n: int) -> Array:
    """Memory for the scratch of up to n blocks."""
    return np.empty((5, 2 * n), np.uint64)


def make_scratch(memory: Array, n: int, sample_type: npt.DTypeLike) -> Scratch:
    """Scratch for n blocks of float32 samples, four to a block, or of float64 ones, two."""
    parts = list(memory[:, : 2 * n])
    even, odd, product = map(make_pair, parts[:3])
    lanes = 16 // np.dtype(sample_type).itemsize
    t, y, q, r, u = (part.view(sample_type).reshape(lanes, n) for part in parts)
    words = parts[3].view(np.int32) if lanes == 4 else parts[0].view(np.int64)
    weights = parts[0].view(sample_type).reshape(n, lanes)
    q_parts, r_parts = ((x[:2], x[2:], *x) for x in (q, r))
    words = words.reshape(lanes, n)
    return Scratch(even, odd, product, words, u, t, y, q, r, q_parts, r_parts, weights, place(weights))


def make_pair(both: Array) -> Pair:
    halves, n = both.view(np.uint32), both.size // 2
    low = 0 if sys.byteorder == "little" else 1
    words = halves.view(np.int32)[low::2].reshape(2, n)
    return Pair(both, both[:n], both[n:], halves[low::2], halves[1 - low :: 2], words)


def place(weights: Array) -> Array:
    """Weights (n, lanes) as an array of samples has them."""
    if weights.shape[1] == 2:
        return weights.T
    return weights.reshape(-1, 2, 2).T


@lru_cache(maxsize=16)  # the parameters of a model have one seed
def round_keys(key: int) -> list[tuple[Array, ...]]:
    """The two halves of the key of every round."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    keys = [(k0 + r * PHILOX_W0, k1 + r * PHILOX_W1) for r in range(PHILOX_ROUNDS)]
    return [in_arrays(np.uint64, a & 0xFFFFFFFF, b & 0xFFFFFFFF) for a, b in keys]


def philox4x32(block: Array, stream: int, key: int, scratch: Scratch) -> tuple[Pair, Pair]:
    """Words 0 and 2, and words 1 and 3, of every block; the second with waste in its high halves."""
    if block.size <= FEW_BLOCKS:
        return philox4x32_of_few(block, stream, key, scratch)
    even, odd, product = scratch.even, scratch.odd, scratch.product
    np.bitwise_and(block, LOW_WORD, even.first)
    np.right_shift(block, WORD_BITS, odd.first)
    even.second.fill(stream & 0xFFFFFFFF)
    odd.second.fill(stream >> 32)
    multiply, xor = np.multiply, np.bitwise_xor
    for k0, k1 in round_keys(key):
        multiply(even.first, M0, product.second)
        multiply(even.second, M1, product.first)
        xor(product.high, odd.low, even.low)  # whose high halves stay 0
        xor(even.first, k0, even.first)
        xor(even.second, k1, even.second)
        odd, product = product, odd
    return even, odd


def philox4x32_of_few(block: Array, stream: int, key: int, scratch: Scratch) -> tuple[Pair, Pair]:
    """The same for few blocks, for which the sixty calls of NumPy take three times as long: all blocks in
    one integer of Python, 64 bits for each.
    """
    nbytes = block.nbytes
    ones, low_words = in_each(1, block.size), in_each(0xFFFFFFFF, block.size)
    blocks = int.from_bytes(block.astype("<u8", copy=False).tobytes(), "little")
    c0, c1 = blocks & low_words, blocks >> 32 & low_words
    c2, c3 = (stream & 0xFFFFFFFF) * ones, (stream >> 32) * ones
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0 = product1 >> 32 & low_words ^ c1 ^ k0 * ones
        c1 = product1 & low_words
        c2 = product0 >> 32 & low_words ^ c3 ^ k1 * ones
        c3 = product0 & low_words
        k0 = k0 + PHILOX_W0 & 0xFFFFFFFF
        k1 = k1 + PHILOX_W1 & 0xFFFFFFFF
    for pair, first, second in ((scratch.even, c0, c2), (scratch.odd, c1, c3)):
        both = first | second << 8 * nbytes
        pair.both[:] = np.frombuffer(both.to_bytes(2 * nbytes, "little"), "<u8")
    return scratch.even, scratch.odd


@cache  # FEW_BLOCKS numbers of blocks
def in_each(number: int, blocks: int) -> int:
    """The number in each of so many 64 bits."""
    return int.from_bytes(number.to_bytes(8, "little") * blocks, "little")


def uniform(words: tuple[Pair, Pair], u: Array) -> Array:
    """u in [-1, 1]: the word as a signed integer, in units of 2**31. Both ends are reached."""
    take_low_words(words, u)
    return np.multiply(u, UNIT, u)


def take_low_words(words: tuple[Pair, Pair], out: Array) -> None:
    """The words as signed integers, in the type of out, (4, n)."""
    even, odd = words
    out[:2] = even.words  # half the time of np.copyto
    out[2:] = odd.words


def quadratic(t: Array, y: Array, other: Array) -> Array:
    """Y, which N and Q share."""
    np.subtract(Y[0], t, y)
    np.subtract(Y[1], t, other)
    return np.multiply(y, other, y)


def denominator(t: Array, y: Array, q: Array) -> Array:
    np.subtract(Q[1], t, q)
    np.multiply(y, q, q)
    return np.add(q, Q[0], q)


def truncated_normal(u: Array, scratch: Scratch) -> Array:
    """The truncated normal sample in units of its bound; the cut at 1 is what proves |sample| <= 1.

    One reciprocal serves the four samples of a block: 1/q0 = q1 * ((q2*q3) / (q0*q1*q2*q3)).
    """
    t = np.multiply(u, u, scratch.t)
    y = quadratic(t, scratch.y, scratch.q)
    denominator(t, y, scratch.q)
    np.multiply(t, R[1], t)
    line = np.add(t, R[0], t)
    q_evens, q_odds, q0, q2, q1, q3 = scratch.q_parts
    evens, odds, inverse, _, first, second = scratch.r_parts
    np.multiply(q2, q3, first)
    np.multiply(q0, q1, second)
    np.multiply(first, second, inverse)
    np.divide(ONE, inverse, inverse)
    np.multiply(inverse, R[3], inverse)
    np.multiply(inverse, first, first)  # R3/(q0*q1)
    np.multiply(inverse, second, second)  # R3/(q2*q3)
    np.multiply(odds, q_odds, evens)  # R3/q0, R3/q2
    np.multiply(odds, q_evens, odds)  # R3/q1, R3/q3
    np.add(scratch.r, R[2], scratch.r)
    np.add(y, N[0], y)
    np.multiply(y, scratch.r, y)
    ratio = np.add(y, line, y)
    np.minimum(ratio, ONE, out=ratio)
    return np.multiply(u, ratio, u)


class NormalScratch(NamedTuple):
    """The same memory as the normal uses it, once the words are made."""

    word: Array  # (lanes, n), signed and as wide as a sample: on words, or on even for float64
    u: Array  # (lanes, n)
    tail: Array  # (lanes, n): on even, or on words for float64
    below: Array  # (lanes, n), as word: on odd
    is_below: Array  # (lanes, n) bool: on product
    row: Array  # (2, n) int64, of the table: on odd
    coefficient: Array  # (2, n): on product
    r: Array  # (2, n): on product, or on even for float64


def normal_scratch(scratch: Scratch) -> NormalScratch:
    u = scratch.u
    narrow, shape, half = len(u) == 4, u.shape, (2, u.shape[1])
    a, b, c = scratch.even.both, scratch.odd.both, scratch.product.both
    return NormalScratch(
        word=scratch.words,
        u=u,
        tail=scratch.t if narrow else scratch.r,
        below=b.view(scratch.words.dtype).reshape(shape),
        is_below=c.view(np.bool_)[: u.size].reshape(shape),
        row=b.view(np.int64).reshape(half),
        coefficient=c.view(u.dtype)[: 2 * half[1]].reshape(half),
        r=(c if narrow else a).view(u.dtype)[-2 * half[1] :].reshape(half),
    )


class Segments(NamedTuple):
    """Where the polynomials of the normal's quantile are, for float32 or float64."""

    columns: Array  # of the table, constants first
    shift: Array  # of the bits of a tail probability: what is left is the number of the segment
    first: Array  # that of the table's first segment, for a probability in units of 1
    octave: Array  # the segments of an octave
    fraction: Array  # the bits below
    one: Array  # the bits of 1.0
    origin: Array  # of t


@cache
def segments(sample_type: np.dtype) -> Segments:
    columns = np.ascontiguousarray(normal_table(sample_type).T)
    if sample_type == np.float64:
        numbers = (48, (1023 - 96) * 16, 16, 0xFFFFFFFFFFFF, 0x3FF0000000000000)
    else:
        numbers = (20, (127 - 64) * 8, 8, 0xFFFFF, 0x3F800000)
    bits = np.dtype(f"i{sample_type.itemsize}")
    origin = np.array(1 if sample_type == np.float64 else 0, sample_type)
    shift, first, octave, fraction, one = (np.array(number, bits) for number in numbers)
    return Segments(columns, shift, first, octave, fraction, one, origin)


def multiply_by_ratio(scratch: NormalScratch, unit: int) -> Array:
    """u * R of the tail probability in scratch.tail, in units of 2**-unit, by the polynomial of its segment.

    The kernel's ratio and the product after it, for half the lanes of float32 at a time.
    """
    u = scratch.u
    table = segments(u.dtype)
    bits = scratch.tail.view(scratch.word.dtype)
    np.right_shift(bits, table.shift, out=scratch.word)
    np.subtract(scratch.word, table.first + table.octave * unit, out=scratch.word)
    np.bitwise_and(bits, table.fraction, out=bits)
    np.bitwise_or(bits, table.one, out=bits)
    if table.origin:
        np.subtract(scratch.tail, table.origin, out=scratch.tail)
    row, coefficient, r = scratch.row, scratch.coefficient, scratch.r
    *others, last = table.columns
    for pair in range(0, len(u), 2):
        np.copyto(row, scratch.word[pair : pair + 2])
        np.take(last, row, out=r, mode="wrap")  # "raise" takes a copy, "clip" half as long again
        for column in reversed(others):
            np.multiply(r, scratch.tail[pair : pair + 2], out=r)
            np.take(column, row, out=coefficient, mode="wrap")
            np.add(r, coefficient, out=r)
        np.multiply(u[pair : pair + 2], r, out=u[pair : pair + 2])
    return u


def normal(scratch: NormalScratch) -> Array:
    """The normal sample of scratch.word: u * R(1 - |u|), u = s / (2**31 + 1/2) for a word of 32 bits.

    For s = 0, u is 0, and the tail wraps round to something finite.
    """
    word, u = scratch.word, scratch.u
    unsigned = word.view(f"u{word.itemsize}")
    np.copyto(u, word, casting="unsafe")
    np.abs(word, out=word)
    np.left_shift(unsigned, unsigned.dtype.type(1), out=unsigned)
    np.subtract(unsigned.dtype.type(1), unsigned, out=unsigned)
    np.copyto(scratch.tail, unsigned, casting="unsafe")
    return multiply_by_ratio(scratch, 8 * word.itemsize)


def normal_between(numbers: Numbers, scratch: NormalScratch) -> Array:
    """The normal sample between two bounds: that of the middle of the word's share of the probability.

    Distances of words are exact, so that no sample loses digits, near the mean or far out.
    """
    _, _, _, _, step, start_above, start_below, tail_above, tail_below, split = numbers
    word, u, tail, below, is_below = scratch.word, scratch.u, scratch.tail, scratch.below, scratch.is_below
    signed, unsigned = word.dtype.type, f"u{word.itemsize}"
    np.less(word, split, out=is_below)
    np.negative(is_below.view(np.int8), out=below)
    distance = tail.view(signed)
    np.subtract(word, split, out=distance)
    np.bitwise_xor(distance, below, out=distance)
    np.copyto(u, distance.view(unsigned), casting="unsafe")
    np.multiply(u, step, out=u)
    np.add(u, choose(below, start_below, start_above, distance), out=u)
    np.bitwise_xor(word, np.iinfo(signed).max, out=word)
    np.bitwise_xor(word, below, out=word)
    np.copyto(tail, word.view(unsigned), casting="unsafe")
    np.multiply(tail, step, out=tail)
    np.add(tail, choose(below, tail_below, tail_above, word), out=tail)
    np.bitwise_and(below, np.iinfo(signed).min, out=below)
    np.bitwise_xor(u.view(signed), below, out=u.view(signed))
    return multiply_by_ratio(scratch, 8 * word.itemsize - 1)


def choose(mask: Array, then: Any, otherwise: Any, out: Array) -> Array:
    """then where all bits of the mask are set, otherwise where none is: bit by bit, as a branch is slow."""
    one, other = then.view(out.dtype), otherwise.view(out.dtype)
    np.bitwise_and(mask, one ^ other, out=out)
    chosen: Array = np.bitwise_xor(out, other, out=out)
    return chosen.view(then.dtype)


def to_weight(w: Array, distribution: int, numbers: Numbers, out: Array) -> None:
    """The last operations, in the order of the kernel; out is in the order of w."""
    scale, *shifted = numbers
    w = w.reshape(out.shape)
    np.multiply(w, scale, w if shifted else out)
    if not shifted:
        return
    mean, low, high, *_ = shifted
    np.add(w, mean, w if distribution >= UNIFORM_BETWEEN else out)
    if distribution >= UNIFORM_BETWEEN:
        np.maximum(w, low, out=w)
        np.minimum(w, high, out=out)


def weights_of(
    words: Any,
    distribution: int,
    numbers: Numbers,
    scratch: Scratch,
    out: Array,
    uniform: Callable[[Any, Array], Array],
    truncated_normal: Callable[[Array, Scratch], Array],
) -> None:
    """Write the weights of words as wide as a sample to out; the last two are the functions of that width."""
    if distribution == NORMAL:
        w = normal(normal_scratch(scratch))
    elif distribution == NORMAL_BETWEEN:
        w = normal_between(numbers, normal_scratch(scratch))
    else:
        w = uniform(words, scratch.u)
        if distribution == TRUNCATED_NORMAL:
            w = truncated_normal(w, scratch)
    to_weight(w, distribution, numbers, out)


def weights(
    block: Array, stream: int, key: int, distribution: int, numbers: Numbers, scratch: Scratch, out: Array
) -> None:
    """Write the float32 weights of these blocks to out, which is as `place` has them."""
    words = philox4x32(block, stream, key, scratch)
    if distribution in (NORMAL, NORMAL_BETWEEN):
        take_low_words(words, scratch.words)
    weights_of(words, distribution, numbers, scratch, out, uniform, truncated_normal)


def join64(even: Pair, odd: Pair) -> None:
    """Words of 64 bits, in even, from their halves."""
    np.left_shift(odd.both, WORD_BITS, odd.both)
    np.bitwise_or(even.both, odd.both, even.both)


def uniform64(words: Array, u: Array) -> Array:
    """u in [-1, 1] from 64 bits, as for 32."""
    u[...] = words
    return np.multiply(u, UNIT64, u)


def numerator64(v: Array, n: Array) -> Array:
    np.add(v, N64[-1], n)
    np.multiply(n, v, n)
    for coefficient in N64[-2:0:-1]:
        np.add(n, coefficient, n)
        np.multiply(n, v, n)
    return np.add(n, N64[0], n)


def denominator64(v: Array, q: Array) -> Array:
    np.add(v, Q64[-1], q)
    np.multiply(q, v, q)
    for coefficient in Q64[-2:0:-1]:
        np.add(q, coefficient, q)
        np.multiply(q, v, q)
    return np.add(q, Q64[0], q)


def truncated_normal64(u: Array, scratch: Scratch) -> Array:
    """The same, two samples to a block."""
    v = np.multiply(u, u, scratch.t)
    np.subtract(ONE64, v, v)
    q = denominator64(v, scratch.q)
    n = numerator64(v, scratch.y)
    inverse = np.multiply(q[0], q[1], v[0])
    np.divide(ONE64, inverse, inverse)
    np.multiply(inverse, R64[1], inverse)
    np.multiply(inverse, q, q)  # R1/q1, R1/q0
    np.multiply(n, q[::-1], n)
    ratio = np.add(n, R64[0], n)
    np.minimum(ratio, ONE64, out=ratio)
    return np.multiply(u, ratio, u)


def weights64(
    block: Array, stream: int, key: int, distribution: int, numbers: Numbers, scratch: Scratch, out: Array
) -> None:
    """The same for float64."""
    join64(*philox4x32(block, stream, key, scratch))
    weights_of(scratch.words, distribution, numbers, scratch, out, uniform64, truncated_normal64)
