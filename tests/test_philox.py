"""Philox4x32-10 against the published known answers and a plain reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from reference import philox4x32

ROWS = [
    line.split()
    for line in (Path(__file__).parent / "philox_known_answers.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def known_answers():
    for row in ROWS:
        numbers = [int(word, 16) for word in row]
        yield numbers[:4], numbers[4:6], numbers[6:]


def test_the_table_has_the_three_published_rows():
    assert [len(row) for row in ROWS] == [10, 10, 10]


def test_reference_gives_the_known_answers():
    for counter, key, words in known_answers():
        assert philox4x32(counter, key) == words


def test_device_gives_the_known_answers(device):
    counters, keys, words = zip(*known_answers(), strict=True)
    blocks = [c[0] | c[1] << 32 for c in counters]
    streams = [c[2] | c[3] << 32 for c in counters]
    made = device.philox4x32(blocks, streams, [k[0] | k[1] << 32 for k in keys])
    assert made.tolist() == list(words)


def test_device_equals_the_reference_at_every_carry(device):
    edges = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**61 - 1, 2**63, 2**64 - 1]
    cases = [(b, s, k) for b in edges for s in edges for k in edges]
    made = device.philox4x32(*map(list, zip(*cases, strict=True)))
    split = [[(low & 0xFFFFFFFF, low >> 32) for low in case] for case in cases]
    expected = [philox4x32([*block, *stream], key) for block, stream, key in split]
    assert made.tolist() == expected
    assert len(np.unique(made, axis=0)) == len(cases)
