"""The sampler in NumPy: stream format 2.

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
    block: Array, stream: int, keys: Array, distribution: int, limit: float, scratch: Scratch
) -> Array:
    """The float64 weights of these blocks, one block a row."""
    even, odd = philox4x32(block, stream, keys, scratch)
    w = uniform64(even, odd, scratch.u)
    if distribution == TRUNCATED_NORMAL:
        w = truncated_normal64(w, scratch)
    np.multiply(w, limit, out=scratch.weights.T)
    return scratch.weights
