"""The stream format written as plainly as it can be, in Python integers and mpmath: slow and obvious."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mpmath import mp, mpf

WORD = 2**32


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Ten rounds: Salmon, Moraes, Dror, Shaw, SC'11."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = product1 // WORD ^ c1 ^ k0, product1 % WORD
        c2, c3 = product0 // WORD ^ c3 ^ k1, product0 % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def stream_of(name: str | None) -> int:
    if name is None:
        return 0
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def block(number: int, seed: int, name: str | None = None) -> list[int]:
    """The four words of one block."""
    stream = stream_of(name)
    return philox4x32(
        [number % WORD, number // WORD, stream % WORD, stream // WORD], [seed % WORD, seed // WORD]
    )


def signed(word: int, bits: int) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def word_of(element: int, seed: int, name: str | None = None) -> int:
    """The 32 bits of a float32 element, as a signed integer."""
    return signed(block(element // 4, seed, name)[element % 4], 32)


def word64_of(element: int, seed: int, name: str | None = None) -> int:
    """The 64 bits of a float64 element, as a signed integer."""
    words = block(element // 2, seed, name)
    low, high = words[2 * (element % 2)], words[2 * (element % 2) + 1]
    return signed(high * WORD + low, 64)


def exact_sample(word: int, bits: int) -> mpf:
    """The truncated normal sample of a signed word, in units of its bound."""
    c = mp.erf(mp.sqrt(2)) / 2  # Phi(2) - 1/2
    u = mpf(word) / 2 ** (bits - 1)
    return mp.sqrt(2) * mp.erfinv(2 * c * u) / 2
