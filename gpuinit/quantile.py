"""The sampler in NumPy: stream format 2.

Twin: kernels/fill.cu has the same names in the same order; its header says what is computed and from which
counter, and the tests compare the two by bytes. Where the kernel makes one block of four words, a function
here makes `n` blocks in a few passes over arrays that stay in the cache. Those of the normal serve float32
and float64 alike.

Every float operation is a separate IEEE round-to-nearest add, multiply or divide of 1 by a number, in the
kernel's order. NumPy never fuses them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuinit.kernel_files import normal_table

Array = npt.NDArray[Any]
Numbers = tuple[Any, ...]  # scalars of NumPy, as the kernel's Numbers; the first alone where that is all

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
R = tuple(map(np.float32, (0.41277757, 0.04760623, 0.0046481327, 0.30843925)))
Y = tuple(map(np.float32, (0.96703994, 1.5457196)))
N = tuple(map(np.float32, (0.06913901,)))
Q = tuple(map(np.float32, (0.043334197, 1.7829732)))

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

# Constants that NumPy would otherwise convert at every call.
MULTIPLIERS = np.array([[PHILOX_M0], [PHILOX_M1]], np.uint64)
LOW_WORD = np.array([0xFFFFFFFF], np.uint64)
WORD_BITS = np.array([32], np.uint64)


class Scratch(NamedTuple):
    """Working memory for n blocks. Arrays that share their memory are not needed at the same time."""

    even: Array  # (2, n) uint64: words 0 and 2 of the Philox state
    odd: Array  # (2, n) uint64: words 1 and 3
    product: Array  # (2, n) uint64
    words: Array  # (4, n) uint32
    u: Array  # (lanes, n) of the sample's type, like t, y and q
    t: Array  # on even
    y: Array  # on odd
    q: Array  # on product
    weights: Array  # (n, lanes), on even


def make_memory(n: int) -> Array:
    """Memory for the scratch of up to n blocks."""
    return np.empty((5, 2 * n), np.uint64)


def make_scratch(memory: Array, n: int, sample_type: npt.DTypeLike) -> Scratch:
    """Scratch for n blocks of float32 samples, four to a block, or of float64 ones, two."""
    a, b, c, d, e = memory[:, : 2 * n]
    lanes = 16 // np.dtype(sample_type).itemsize
    return Scratch(
        even=a.reshape(2, n),
        odd=b.reshape(2, n),
        product=c.reshape(2, n),
        words=d.view(np.uint32).reshape(4, n),
        u=e.view(sample_type).reshape(lanes, n),
        t=a.view(sample_type).reshape(lanes, n),
        y=b.view(sample_type).reshape(lanes, n),
        q=c.view(sample_type).reshape(lanes, n),
        weights=a.view(sample_type).reshape(n, lanes),
    )


def round_keys(key: int) -> Array:
    """The key of every round, (PHILOX_ROUNDS, 2, 1)."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    keys = [(k0 + r * PHILOX_W0, k1 + r * PHILOX_W1) for r in range(PHILOX_ROUNDS)]
    return np.array(keys, np.uint64)[:, :, None] & LOW_WORD


def philox4x32(block: Array, stream: int, keys: Array, scratch: Scratch) -> tuple[Array, Array]:
    """Words 0 and 2, and words 1 and 3, of every block; the second with waste in its high halves."""
    even, odd, product = scratch.even, scratch.odd, scratch.product
    np.bitwise_and(block, LOW_WORD, out=even[0])
    np.right_shift(block, WORD_BITS, out=odd[0])
    even[1] = stream & 0xFFFFFFFF
    odd[1] = stream >> 32
    for key in keys:
        np.multiply(even, MULTIPLIERS, out=product)
        crossed = product[::-1]
        np.right_shift(crossed, WORD_BITS, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, key, out=even)
        np.bitwise_and(even, LOW_WORD, out=even)  # the waste in odd went no further
        odd, product = crossed, odd
    return even, odd


def uniform(words: Array, u: Array) -> Array:
    """u in [-1, 1]: the word as a signed integer, in units of 2**31. Both ends are reached."""
    np.copyto(u, words.view(np.int32), casting="unsafe")
    return np.multiply(u, np.float32(2**-31), out=u)


def quadratic(t: Array, y: Array, other: Array) -> Array:
    """Y, which N and Q share."""
    np.subtract(Y[0], t, out=y)
    np.subtract(Y[1], t, out=other)
    return np.multiply(y, other, out=y)


def denominator(t: Array, y: Array, q: Array) -> Array:
    np.subtract(Q[1], t, out=q)
    np.multiply(y, q, out=q)
    return np.add(q, Q[0], out=q)


def truncated_normal(u: Array, scratch: Scratch) -> Array:
    """The truncated normal sample in units of its bound; the cut at 1 is what proves |sample| <= 1.

    One reciprocal serves the four samples of a block: 1/q0 = q1 * ((q2*q3) / (q0*q1*q2*q3)).
    """
    t = np.multiply(u, u, out=scratch.t)
    y = quadratic(t, scratch.y, scratch.q)
    q = denominator(t, y, scratch.q)
    np.multiply(t, R[1], out=t)
    line = np.add(t, R[0], out=t)
    spent = scratch.words.view(np.float32)
    pairs, evens, inverse = spent[0:2], spent[2:4], spent[2]
    np.multiply(q[0::2], q[1::2], out=pairs)  # q0*q1, q2*q3
    np.multiply(pairs[0], pairs[1], out=inverse)
    np.divide(np.float32(1), inverse, out=inverse)
    np.multiply(inverse, R[3], out=inverse)
    np.multiply(inverse, pairs, out=pairs)  # R3/(q2*q3), R3/(q0*q1)
    np.multiply(pairs[::-1], q[1::2], out=evens)  # R3/q0, R3/q2
    np.multiply(pairs[::-1], q[0::2], out=q[1::2])  # R3/q1, R3/q3
    np.add(evens, R[2], out=q[0::2])
    np.add(q[1::2], R[2], out=q[1::2])
    np.add(y, N[0], out=y)
    np.multiply(y, q, out=y)
    ratio = np.add(y, line, out=y)
    np.minimum(ratio, np.float32(1), out=ratio)
    return np.multiply(u, ratio, out=u)


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
    signed = np.int32 if narrow else np.int64
    a, b, c, d = (x.reshape(-1) for x in (scratch.even, scratch.odd, scratch.product, scratch.words))
    word, tail = (d, a) if narrow else (a, d)
    return NormalScratch(
        word=word.view(signed).reshape(shape),
        u=u,
        tail=tail.view(u.dtype).reshape(shape),
        below=b.view(signed).reshape(shape),
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
    """The last operations, in the order of the kernel."""
    scale, *shifted = numbers
    np.multiply(w, scale, out=w if shifted else out)
    if not shifted:
        return
    mean, low, high, *_ = shifted
    np.add(w, mean, out=w if distribution >= UNIFORM_BETWEEN else out)
    if distribution >= UNIFORM_BETWEEN:
        np.maximum(w, low, out=w)
        np.minimum(w, high, out=out)


def weights_of(
    words: Array,
    distribution: int,
    numbers: Numbers,
    scratch: Scratch,
    uniform: Callable[[Array, Array], Array],
    truncated_normal: Callable[[Array, Scratch], Array],
) -> Array:
    """The weights of words as wide as a sample; the last two are the functions of that width."""
    if distribution == NORMAL:
        w = normal(normal_scratch(scratch))
    elif distribution == NORMAL_BETWEEN:
        w = normal_between(numbers, normal_scratch(scratch))
    else:
        w = uniform(words, scratch.u)
        if distribution == TRUNCATED_NORMAL:
            w = truncated_normal(w, scratch)
    to_weight(w, distribution, numbers, scratch.weights.T)
    return scratch.weights


def weights(
    block: Array, stream: int, keys: Array, distribution: int, numbers: Numbers, scratch: Scratch
) -> Array:
    """The float32 weights of these blocks, one block a row."""
    even, odd = philox4x32(block, stream, keys, scratch)
    np.copyto(scratch.words[0::2], even, casting="unsafe")
    np.copyto(scratch.words[1::2], odd, casting="unsafe")
    return weights_of(scratch.words, distribution, numbers, scratch, uniform, truncated_normal)


def join64(even: Array, odd: Array) -> Array:
    """Words of 64 bits, in even, from their halves."""
    np.left_shift(odd, WORD_BITS, out=odd)
    return np.bitwise_or(even, odd, out=even)


def uniform64(words: Array, u: Array) -> Array:
    """u in [-1, 1] from 64 bits, as for 32."""
    np.copyto(u, words.view(np.int64), casting="unsafe")
    return np.multiply(u, 2.0**-63, out=u)


def numerator64(v: Array, n: Array) -> Array:
    np.add(v, N64[-1], out=n)
    np.multiply(n, v, out=n)
    for coefficient in N64[-2:0:-1]:
        np.add(n, coefficient, out=n)
        np.multiply(n, v, out=n)
    return np.add(n, N64[0], out=n)


def denominator64(v: Array, q: Array) -> Array:
    np.add(v, Q64[-1], out=q)
    np.multiply(q, v, out=q)
    for coefficient in Q64[-2:0:-1]:
        np.add(q, coefficient, out=q)
        np.multiply(q, v, out=q)
    return np.add(q, Q64[0], out=q)


def truncated_normal64(u: Array, scratch: Scratch) -> Array:
    """The same, two samples to a block."""
    v = np.multiply(u, u, out=scratch.t)
    np.subtract(1.0, v, out=v)
    q = denominator64(v, scratch.q)
    n = numerator64(v, scratch.y)
    inverse = np.multiply(q[0], q[1], out=v[0])
    np.divide(1.0, inverse, out=inverse)
    np.multiply(inverse, R64[1], out=inverse)
    np.multiply(inverse, q, out=q)  # R1/q1, R1/q0
    np.multiply(n, q[::-1], out=n)
    ratio = np.add(n, R64[0], out=n)
    np.minimum(ratio, 1.0, out=ratio)
    return np.multiply(u, ratio, out=u)


def weights64(
    block: Array, stream: int, keys: Array, distribution: int, numbers: Numbers, scratch: Scratch
) -> Array:
    """The float64 weights of these blocks, one block a row."""
    words = join64(*philox4x32(block, stream, keys, scratch))
    return weights_of(words, distribution, numbers, scratch, uniform64, truncated_normal64)
