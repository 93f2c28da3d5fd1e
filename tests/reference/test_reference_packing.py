"""Canonical bytes: against the byte formulas, bijective, and inverted by unpacking."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvpack.reference import SIDES
from kvpack.reference.packing import (
    pack_codes,
    pack_elements,
    pack_scales,
    unpack_codes,
    unpack_elements,
    unpack_scales,
)

SHAPES: list[tuple[float, int]] = [
    (bits, d) for bits in (8, 5, 4, 3.5, 3, 2.5, 2, 1) for d in (64, 80, 96, 112, 128, 256)
]
UNIT_DWORDS = {8: 1, 5: 8, 4: 2, 3.5: 16, 3: 8, 2.5: 16, 2: 4, 1: 8}
LINES = {2.5: 5, 3: 3, 3.5: 7, 5: 5}


def random_codes(rng: np.random.Generator, bits: float, side: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Half-bit codes have the odd bit where depth / 4 is odd."""
    odd = np.arange(shape[-1 if side == "key" else -2]) // 4 % 2
    limit = np.where(odd, 2 ** math.ceil(bits), 2 ** math.floor(bits))
    codes: NDArray[np.uint8] = rng.integers(0, limit if side == "key" else limit[:, None], shape).astype(np.uint8)
    return codes


def places(bits: float, side: str, d: int, token: int, dim: int, stream: bool = False) -> list[tuple[int, int]]:
    """(byte, bit) of each bit of the code of (token, dim), lowest first: the formulas of the format."""
    lane, z = (token, dim) if side == "key" else (dim, token)
    lanes, depth = (64, d) if side == "key" else (d, 64)
    uv = UNIT_DWORDS[bits]
    lines = LINES.get(bits, 1)
    superblock = lane // 64
    blocks = min(4, (lanes - 64 * superblock) // 16)
    block, u, j = lane % 64 // 16, z // 4 // uv, z // 4 % uv
    whole = depth // (4 * uv)
    line = u * blocks + block
    if u == whole:  # shared by uv / 4 lane blocks: each has four of the dwords
        sharing = uv // 4
        line = u * blocks + j // 4 * (blocks // sharing) + block // sharing
        j = j % 4 + block % sharing * 4
    start = superblock * int(8 * depth * bits)

    def byte(plane: int) -> int:
        return start + (line * lines + plane) * 64 + lane % 16 * 4 + z % 4

    if bits == 5:  # low bits two by two, then a line of the high ones
        return [*((byte(j // 2), 4 * (j % 2) + k) for k in range(4)), (byte(4), j)]
    if bits != 3 or stream:  # one code after the other; of half-bit codes, one bit more in odd dwords
        return [(byte(n // 8), n % 8) for n in range(int(bits * j), int(bits * (j + 1)))]
    if j < 6:
        return [(byte(j // 2), 3 * (j % 2) + k) for k in range(3)]
    return [(byte(k // 2), 6 + k % 2) for k in range(3 * (j - 6), 3 * (j - 6) + 3)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("bits", "d"), SHAPES)
def test_every_bit_has_its_own_place_and_none_is_left(bits: float, d: int, side: str) -> None:
    seen = {p for token in range(64) for dim in range(d) for p in places(bits, side, d, token, dim)}
    assert len(seen) == 64 * d * bits
    assert seen == {(byte, bit) for byte in range(int(8 * d * bits)) for bit in range(8)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("bits", "d", "stream"),
    [(*shape, False) for shape in SHAPES] + [(*shape, True) for shape in SHAPES if shape[0] < 5],
)
def test_bytes_follow_the_formulas(bits: float, d: int, stream: bool, side: str) -> None:
    codes = random_codes(np.random.default_rng(d), bits, side, (64, d))
    expected = np.zeros(int(8 * d * bits), np.uint8)
    for token in range(64):
        for dim in range(d):
            for k, (byte, bit) in enumerate(places(bits, side, d, token, dim, stream)):
                expected[byte] |= (int(codes[token, dim]) >> k & 1) << bit
    packed = pack_codes(codes, bits, side, stream)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack_codes(packed, bits, side, d, stream), codes)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("bits", "d"), SHAPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lead=st.lists(st.integers(0, 3), max_size=2))
def test_round_trip(bits: float, d: int, side: str, seed: int, lead: list[int]) -> None:
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, bits, side, (*lead, 64, d))
    packed = pack_codes(codes, bits, side)
    assert packed.shape == (*lead, 8 * d * bits)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_codes(packed, bits, side, d), codes)
    noise = rng.integers(0, 256, packed.shape, np.uint8)  # every byte string is the packing of something
    np.testing.assert_array_equal(pack_codes(unpack_codes(noise, bits, side, d), bits, side), noise)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), blocks=st.sampled_from([1, 2, 4, 8]))
def test_scales_round_trip_block_major(seed: int, blocks: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**16, (3, 64, blocks), np.uint16)
    packed = pack_scales(bits.view(np.float16))
    assert packed.shape == (3, 128 * blocks)
    np.testing.assert_array_equal(unpack_scales(packed).view(np.uint16), bits)
    token, block = 37, blocks - 1
    place = 2 * (64 * block + token)
    assert packed[1, place] == bits[1, token, block] & 255
    assert packed[1, place + 1] == bits[1, token, block] >> 8


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_elements_are_dim_major_for_keys_and_token_major_for_values(dtype: type) -> None:
    bits = np.random.default_rng(0).integers(0, 256, (2, 64, 64 * np.dtype(dtype).itemsize), np.uint8)
    x: NDArray[Any] = bits.view(dtype)
    key, value = pack_elements(x, "key"), pack_elements(x, "value")
    size = x.itemsize
    assert key.shape == value.shape == (2, 64 * 64 * size)
    token, dim = 5, 44
    element = x[1, token, dim].tobytes()
    assert key[1, size * (64 * dim + token) :][:size].tobytes() == element
    assert value[1, size * (64 * token + dim) :][:size].tobytes() == element
    for side, packed in (("key", key), ("value", value)):
        assert unpack_elements(packed, side, 64, np.dtype(dtype)).tobytes() == x.tobytes()


def test_bad_arguments_are_refused() -> None:
    codes = np.zeros((64, 64), np.uint8)
    with pytest.raises(ValueError, match="6 bits per code are not supported"):
        pack_codes(codes, 6, "key")
    with pytest.raises(ValueError, match="side 'k'"):
        pack_codes(codes, 4, "k")
    with pytest.raises(ValueError, match="head size 72 is not a multiple of 16"):
        pack_codes(np.zeros((64, 72), np.uint8), 4, "key")
    with pytest.raises(ValueError, match="64 tokens, not 63"):
        pack_codes(codes[:63], 4, "key")
    with pytest.raises(ValueError, match="code 16 has more than 4 bits"):
        pack_codes(codes + np.uint8(16), 4, "key")
    with pytest.raises(ValueError, match="code 4 has more than 2.5 bits"):
        pack_codes(codes + np.uint8(4), 2.5, "value")
    with pytest.raises(ValueError, match="100 bytes are not the 2048"):
        unpack_codes(np.zeros(100, np.uint8), 4, "key", 64)
