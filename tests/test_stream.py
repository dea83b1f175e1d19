"""Which word makes which weight: the stream format, against plain integers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from reference import block, signed, stream_of, word64_of, word_of

import gpuinit

BIG = (2**20, 2**20)


def expected_uniform(elements, seed, name, limit):
    """float32 weights of the uniform initialiser, element by element."""
    u = [np.float32(word_of(i, seed, name)) * np.float32(2**-31) for i in elements]
    return np.array([x * np.float32(limit) for x in u], np.float32)


def made(device, start, stop, **keywords):
    """Elements start to stop of a one-dimensional array far larger than memory."""
    part = gpuinit.uniform(2**62, 0.3, index=slice(start, stop), device=device.name, **keywords)
    return device.numpy(part)


@pytest.mark.parametrize(
    ("seed", "name"),
    [(0, None), (1, "w"), (2**32 - 1, ""), (2**32, "é"), (2**63, "a.b"), (2**64 - 1, "x" * 1000)],
)
def test_every_float32_weight_comes_from_its_own_word(device, seed, name):
    weights = made(device, 0, 41, seed=seed, name=name)
    assert weights.tobytes() == expected_uniform(range(41), seed, name, 0.3).tobytes()


# Where a counter word carries: block 2**32 starts at element 2**34 (float32) and 2**33 (float64).
@pytest.mark.parametrize("element", [2**32, 2**33, 2**34, 2**35, 2**61, 2**62 - 8])
def test_the_counter_carries_beyond_32_bits(device, element):
    around = range(element - 9, element + 8)
    weights = made(device, around.start, around.stop, seed=3, name="w")
    assert weights.tobytes() == expected_uniform(around, 3, "w", 0.3).tobytes()
    wide = made(device, around.start, around.stop, seed=3, name="w", dtype="float64")
    u = [float(word64_of(i, 3, "w")) * 2.0**-63 for i in around]
    assert wide.tobytes() == (np.array(u) * 0.3).tobytes()


def test_float64_takes_the_low_word_first(device):
    words = block(0, 9)
    low_first = signed(words[1] << 32 | words[0], 64)
    high_first = signed(words[0] << 32 | words[1], 64)
    weight = made(device, 0, 1, seed=9, dtype="float64").item()
    assert weight == float(low_first) * 2.0**-63 * 0.3
    assert weight != float(high_first) * 2.0**-63 * 0.3  # the control: swapped words differ


def test_truncated_normal_takes_the_words_in_order(device):
    words = np.array([block(number, 4, "n") for number in range(5)], np.uint32)
    weights = gpuinit.truncated_normal(20, 0.5, seed=4, name="n", device=device.name)
    expected = device.truncated_normal(words)  # 2 * stddev is 1
    assert device.numpy(weights).tobytes() == expected.tobytes()
    swapped = device.truncated_normal(words[:, [1, 0, 2, 3]])
    assert device.numpy(weights).tobytes() != swapped.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stddev", [0.02, 1e-6, 3e-8, 100.0])
def test_the_16_bit_types_are_the_float32_weights_rounded_to_even(device, dtype, stddev):
    keywords = {"seed": 5, "device": device.name}
    weights = device.numpy(gpuinit.truncated_normal(100_003, stddev, dtype=dtype, **keywords))
    wide = device.numpy(gpuinit.truncated_normal(100_003, stddev, **keywords))
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    assert weights.dtype == kind
    assert weights.tobytes() == wide.astype(kind).tobytes()


def test_bfloat16_has_thousands_of_values(device):
    w = gpuinit.he_normal((2048, 2048), seed=6, dtype="bfloat16", device=device.name)
    assert len(np.unique(device.numpy(w).view(np.uint16))) > 3000


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_lie_further_apart_than_32_bits_reach(device, dtype):
    index = np.s_[:, 2**60 + 1 : 2**60 + 12]
    keywords = {"seed": 7, "index": index, "dtype": dtype, "device": device.name}
    part = device.numpy(gpuinit.uniform((3, 2**61), 0.3, **keywords))
    for row, weights in enumerate(part):
        elements = range(row * 2**61 + 2**60 + 1, row * 2**61 + 2**60 + 12)
        expected = expected_uniform(elements, 7, None, 0.3)
        if dtype == "float64":
            expected = np.array([float(word64_of(i, 7)) * 2.0**-63 for i in elements]) * 0.3
        assert weights.tobytes() == expected.tobytes()


def test_the_stream_of_a_name_is_the_start_of_its_blake2b():
    from gpuinit.stream import parse_name

    # From BLAKE2b's definition, by another route: b2sum -l 64 of the same bytes.
    assert parse_name("abc").to_bytes(8, "little").hex() == "d8bb14d833d59559"
    assert parse_name(None) == 0
    assert parse_name("") == stream_of("") != 0


def test_a_part_of_an_array_far_larger_than_memory(device):
    """The issue's own example: rows 7 and 8, columns 100 to 199 of a million by a million."""
    part = device.numpy(gpuinit.he_normal(BIG, index=np.s_[7:9, 100:200], seed=1, device=device.name))
    limit = np.float32(2) * np.float32(np.sqrt(2 / 2**20) / 0.87962566103423976)
    for row, weights in zip((7, 8), part, strict=True):
        first = row * 2**20 + 100
        words = np.array([block(first // 4 + k, 1) for k in range(25)], np.uint32)
        expected = device.truncated_normal(words).reshape(-1) * limit
        assert weights.tobytes() == expected.tobytes()
