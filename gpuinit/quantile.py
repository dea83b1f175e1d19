"""The sampler in NumPy: stream format 1.

Twin: kernels/fill.cu has the same names in the same order; its header says what is computed and from which
counter, and the tests compare the two by bytes. Where the kernel makes one block of four words, a function
here makes `n` blocks in a few passes over arrays that stay in the cache.

Every float operation is a separate IEEE round-to-nearest add, multiply or divide of 1 by a number, in the
kernel's order. NumPy never fuses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNIFORM = 0
TRUNCATED_NORMAL = 1

# Multipliers and Weyl increments of philox4x32 (SC'11, section 3.3): the increments are the fractions of the
# golden ratio and of sqrt(3), times 2**32.
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

# R(v) = P(v)/Q(v) in float32, relative error 7.3e-8, constants first (tools/fit_quantile.py).
P = tuple(map(np.float32, (0.09126182, 1.1120256, 3.4368744, 2.5214055, 0.20533383)))
Q = tuple(map(np.float32, (0.09126182, 1.2680678, 4.831078, 5.1258583)))

# R(v) = P(v)/Q(v) in float64, relative error 7.2e-18, constants first (tools/fit_quantile.py).
P64 = (
    0.012972411312794016,
    0.44511913530726677,
    6.138307102239534,
    43.844162448203335,
    174.84171944281806,
    393.0584632004382,
    482.53567887695226,
    300.5202791102226,
    82.7780024537458,
    7.638722566804412,
    0.10408770881319832,
)
Q64 = (
    0.012972411312794016,
    0.4673001400527829,
    6.827259552312625,
    52.28011698854188,
    227.05006713244106,
    567.883983210436,
    799.349934192021,
    597.1511740409888,
    212.68095413312133,
    29.54093152000372,
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
    u: Array  # (lanes, n) of the sample's type, like v, p and q
    v: Array  # on even
    p: Array  # on odd
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
        v=a.view(sample_type).reshape(lanes, n),
        p=b.view(sample_type).reshape(lanes, n),
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


def numerator(v: Array, p: Array) -> Array:
    np.multiply(v, P[-1], out=p)
    for coefficient in P[-2:0:-1]:
        np.add(p, coefficient, out=p)
        np.multiply(p, v, out=p)
    return np.add(p, P[0], out=p)


def denominator(v: Array, q: Array) -> Array:
    np.add(v, Q[-1], out=q)
    np.multiply(q, v, out=q)
    for coefficient in Q[-2:0:-1]:
        np.add(q, coefficient, out=q)
        np.multiply(q, v, out=q)
    return np.add(q, Q[0], out=q)


def truncated_normal(u: Array, scratch: Scratch) -> Array:
    """The truncated normal sample in units of its bound; the cut at 1 is what proves |sample| <= 1.

    One reciprocal serves the four samples of a block: 1/q0 = q1 * ((q2*q3) / (q0*q1*q2*q3)).
    """
    v = np.multiply(u, u, out=scratch.v)
    np.subtract(np.float32(1), v, out=v)
    q = denominator(v, scratch.q)
    p = numerator(v, scratch.p)
    pairs = scratch.words.view(np.float32)[0:2]  # the words are spent
    inverse = scratch.words.view(np.float32)[2]
    np.multiply(q[0::2], q[1::2], out=pairs)  # q0*q1, q2*q3
    np.multiply(pairs[0], pairs[1], out=inverse)
    np.divide(np.float32(1), inverse, out=inverse)
    np.multiply(inverse, pairs, out=pairs)  # the inverses of q2*q3, q0*q1
    in_pairs = (2, 2, -1)
    np.multiply(pairs[::-1, None], q.reshape(in_pairs)[:, ::-1], out=v.reshape(in_pairs))
    np.multiply(p, v, out=p)
    np.minimum(p, np.float32(1), out=p)
    return np.multiply(u, p, out=u)


def weights(
    block: Array, stream: int, keys: Array, distribution: int, limit: float, scratch: Scratch
) -> Array:
    """The float32 weights of these blocks, one block a row."""
    even, odd = philox4x32(block, stream, keys, scratch)
    np.copyto(scratch.words[0::2], even, casting="unsafe")
    np.copyto(scratch.words[1::2], odd, casting="unsafe")
    w = uniform(scratch.words, scratch.u)
    if distribution == TRUNCATED_NORMAL:
        w = truncated_normal(w, scratch)
    np.multiply(w, np.float32(limit), out=scratch.weights.T)
    return scratch.weights


def uniform64(even: Array, odd: Array, u: Array) -> Array:
    """u in [-1, 1] from 64 bits, as for 32."""
    np.left_shift(odd, WORD_BITS, out=odd)
    np.bitwise_or(even, odd, out=even)
    np.copyto(u, even.view(np.int64), casting="unsafe")
    return np.multiply(u, 2.0**-63, out=u)


def numerator64(v: Array, p: Array) -> Array:
    np.multiply(v, P64[-1], out=p)
    for coefficient in P64[-2:0:-1]:
        np.add(p, coefficient, out=p)
        np.multiply(p, v, out=p)
    return np.add(p, P64[0], out=p)


def denominator64(v: Array, q: Array) -> Array:
    np.add(v, Q64[-1], out=q)
    np.multiply(q, v, out=q)
    for coefficient in Q64[-2:0:-1]:
        np.add(q, coefficient, out=q)
        np.multiply(q, v, out=q)
    return np.add(q, Q64[0], out=q)


def truncated_normal64(u: Array, scratch: Scratch) -> Array:
    v = np.multiply(u, u, out=scratch.v)
    np.subtract(1.0, v, out=v)
    inverse = np.divide(1.0, denominator64(v, scratch.q), out=scratch.q)
    ratio = np.multiply(numerator64(v, scratch.p), inverse, out=scratch.p)
    np.minimum(ratio, 1.0, out=ratio)
    return np.multiply(u, ratio, out=u)


def weights64(
    block: Array, stream: int, keys: Array, distribution: int, limit: float, scratch: Scratch
) -> Array:
    """The float64 weights of these blocks, one block a row."""
    even, odd = philox4x32(block, stream, keys, scratch)
    w = uniform64(even, odd, scratch.u)
    if distribution == TRUNCATED_NORMAL:
        w = truncated_normal64(w, scratch)
    np.multiply(w, limit, out=scratch.weights.T)
    return scratch.weights
