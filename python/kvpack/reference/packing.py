"""Canonical bytes of one side of a tile: where each code and scale of 64 tokens goes (format version 1).

    side of a tile = [scales][mean][codes]                     mean: 0 bytes in this version

Scales are fp16, little endian, block major: [scale block][token].

Codes lie as a dot product reads them. The *lane* axis runs across a vector register, the *depth* axis is
summed over: keys (scores: sum over dims) have lane = token and depth = dim, values (output: sum over tokens)
have lane = dim and depth = token. Depth is cut into dwords of 4, and `dwords` of them, different for each
width, into a unit:

    superblock  of 64 lanes, outermost (the last one of a head size that is no multiple of 64 has fewer)
    unit        of 4 * dwords depth steps
    lane block  of 16 lanes
    plane       3 for 3-bit codes, 5 for 5 and 2.5 bits, 7 for 3.5 bits, else 1
    line        64 bytes: [lane in block][depth % 4]

A byte of a line holds codes of one lane: those at the same depth % 4 in every dword j of the unit:

    8 bit  the code                      (1 dword)
    4 bit  code_j << 4 j                 (2 dwords)
    2 bit  code_j << 2 j                 (4 dwords)
    1 bit  code_j << j                   (8 dwords)
    3 bit  plane p: code_2p | code_2p+1 << 3 | (bits 2p, 2p+1 of w) << 6    (8 dwords)
           where w = code_6 | code_7 << 3
    3 bit, stream (trellis codes)  byte p of the 24 bits code_j << 3 j     (8 dwords)
    2.5, 3.5 bit, streams  byte p of the 40 (56) bits code_j << floor(2.5 j) (3.5 j): a bit more in odd dwords (16)
    5 bit  plane p < 4: the low 4 bits of code_2p and code_2p+1, as at 4 bits; plane 4: high bits, as at 1 bit

Where the depth ends in the middle of a unit (keys of head sizes 80 and 112, of half-bit codes also 96 and 160), lane
blocks share units: those of 8 dwords two by two, those of 16 all four of the superblock. Of such a unit, dwords 4i ..
4i + 3 belong to the i-th of its lane blocks. Shared units follow the whole units of their superblock: first those of
the first 4 dwords that are left, in the order of the lane blocks, then those of the next 4.

`exact` keeps whole elements: keys [dim][token], values [token][dim], little endian; `fp8` its codes likewise.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SIDES",
    "TILE",
    "pack_codes",
    "pack_elements",
    "pack_scales",
    "unpack_codes",
    "unpack_elements",
    "unpack_scales",
]

U8 = NDArray[np.uint8]

TILE = 64
"""Tokens of a tile."""

SIDES = ("key", "value")
"""The position in this tuple is the side's number."""

_DWORDS: dict[float, int] = {8: 1, 5: 8, 4: 2, 3.5: 16, 3: 8, 2.5: 16, 2: 4, 1: 8}
_PLANES: dict[float, int] = {8: 1, 5: 5, 4: 1, 3.5: 7, 3: 3, 2.5: 5, 2: 1, 1: 1}


def check_side(side: str) -> None:
    """ValueError unless side is "key" or "value"."""
    if side not in SIDES:
        raise ValueError(f"side {side!r} is not one of {', '.join(SIDES)}")


def _check(bits: float, side: str, d: int) -> None:
    check_side(side)
    if bits not in _DWORDS:
        raise ValueError(f"{bits} bits per code are not supported; supported: 8, 5, 4, 3.5, 3, 2.5, 2, 1")
    if d < 16 or d % 16:
        raise ValueError(f"head size {d} is not a multiple of 16")


def _width(bits: float, j: int) -> int:
    """Bits of the codes of dword j."""
    return int(bits * (j + 1)) - int(bits * j)


def _fields_to_planes(codes: U8, bits: float, stream: bool) -> U8:
    """uint8 [..., dwords, 4] codes -> [..., planes, 4] bytes."""
    if bits == 3 and not stream:
        w = codes[..., 6, :] | codes[..., 7, :] << 3
        planes = [codes[..., 2 * p, :] | codes[..., 2 * p + 1, :] << 3 | (w >> 2 * p & 3) << 6 for p in range(3)]
        return np.stack(planes, axis=-2)
    if bits == 5:
        high = _merge(codes >> 4, 1)
        low = [_merge(codes[..., 2 * p : 2 * p + 2, :] & 15, 4) for p in range(4)]
        return np.stack([*low, high], axis=-2).astype(np.uint8)
    merged = _merge(codes, bits)
    return np.stack(
        [(merged >> np.uint64(8 * p) & np.uint64(255)).astype(np.uint8) for p in range(_PLANES[bits])], axis=-2
    )


def _merge(codes: NDArray[Any], bits: float) -> NDArray[np.uint64]:
    """[..., dwords, 4] -> [..., 4]: code_j << floor(bits * j), up to 64 bits."""
    wide = codes.astype(np.uint64)
    out = wide[..., 0, :]
    for j in range(1, codes.shape[-2]):
        out = out | wide[..., j, :] << np.uint64(bits * j)
    return out


def _planes_to_fields(planes: U8, bits: float, stream: bool) -> U8:
    """The inverse of _fields_to_planes."""
    if bits == 3 and not stream:
        w = planes[..., 0, :] >> 6 | planes[..., 1, :] >> 6 << 2 | planes[..., 2, :] >> 6 << 4
        fields = [planes[..., j // 2, :] >> 3 * (j % 2) & 7 for j in range(6)] + [w & 7, w >> 3]
    elif bits == 5:
        fields = [planes[..., j // 2, :] >> 4 * (j % 2) & 15 | (planes[..., 4, :] >> j & 1) << 4 for j in range(8)]
    else:
        merged = _merge(planes, 8)
        fields = [
            (merged >> np.uint64(bits * j) & np.uint64((1 << _width(bits, j)) - 1)).astype(np.uint8)
            for j in range(_DWORDS[bits])
        ]
    return np.stack(fields, axis=-2)


def _to_lines(fields: U8, bits: float, stream: bool, axes: int) -> U8:
    """uint8 [..., lane, dword, 4] codes of units -> bytes [..., plane, lane, 4], the last `axes` axes made one."""
    lines = np.swapaxes(_fields_to_planes(fields, bits, stream), -3, -2)
    return lines.reshape(*lines.shape[:-axes], math.prod(lines.shape[-axes:]))


def _from_lines(data: U8, bits: float, stream: bool) -> U8:
    """The inverse for whole units: uint8 [..., bytes] -> codes [..., unit, lane, dword, 4]."""
    size = 64 * _PLANES[bits]
    lines = data.reshape(*data.shape[:-1], data.shape[-1] // size, _PLANES[bits], 16, 4)
    return _planes_to_fields(np.swapaxes(lines, -3, -2), bits, stream)


def pack_codes(codes: U8, bits: float, side: str, stream: bool = False) -> U8:
    """uint8 [..., 64 tokens, d] codes of a tile -> uint8 [..., 8 * d * bits] canonical bytes.

    d: a multiple of 16. stream: of 3-bit codes, see above. ValueError for other sizes and for larger codes.
    """
    tokens, d = codes.shape[-2:]
    _check(bits, side, d)
    if tokens != TILE:
        raise ValueError(f"a tile has {TILE} tokens, not {tokens}")
    lead = codes.shape[:-2]
    lanes = codes if side == "key" else np.swapaxes(codes, -1, -2)  # [..., lane, depth]
    depth, dwords = lanes.shape[-1], _DWORDS[bits]
    large = lanes >> np.array([_width(bits, z // 4) for z in range(depth)], np.uint8) != 0
    if large.any():
        raise ValueError(f"code {int(lanes[large].max())} has more than {bits} bits")
    units = depth // (4 * dwords)
    sharing, parts = dwords // 4, depth // 16 % max(1, dwords // 4)  # lane blocks of a shared unit, 4 dwords left
    out = []
    for first in range(0, lanes.shape[-2], 64):
        superblock = lanes[..., first : first + 64, :]
        blocks = superblock.shape[-2] // 16
        whole = superblock[..., : 4 * dwords * units].reshape(*lead, blocks, 16, units, dwords, 4)
        # [..., lane block, lane, unit, dword, byte] -> [..., unit, lane block, lane, dword, byte]
        out.append(_to_lines(np.moveaxis(whole, -3, -5), bits, stream, 5))
        if parts:
            rest = superblock[..., 4 * dwords * units :].reshape(*lead, blocks // sharing, sharing, 16, parts, 4, 4)
            # [..., group, lane block, lane, part, dword, byte] -> [..., part, group, lane, lane block and dword, byte]
            shared = np.swapaxes(np.moveaxis(rest, -3, -6), -4, -3)
            out.append(_to_lines(shared.reshape(*lead, parts, blocks // sharing, 16, dwords, 4), bits, stream, 5))
    return np.concatenate(out, axis=-1)


def unpack_codes(packed: U8, bits: float, side: str, d: int, stream: bool = False) -> U8:
    """The inverse of pack_codes: uint8 [..., 8 * d * bits] -> uint8 [..., 64 tokens, d]."""
    _check(bits, side, d)
    if packed.shape[-1] != 8 * d * bits:
        raise ValueError(f"{packed.shape[-1]} bytes are not the {8 * d * bits:g} of {bits}-bit codes, head size {d}")
    lead = packed.shape[:-1]
    lanes, depth = (TILE, d) if side == "key" else (d, TILE)
    dwords = _DWORDS[bits]
    units = depth // (4 * dwords)
    sharing, parts = dwords // 4, depth // 16 % max(1, dwords // 4)
    out, start = [], 0
    for first in range(0, lanes, 64):
        blocks = min(64, lanes - first) // 16
        middle, end = (start + int(2 * blocks * each * bits) for each in (4 * dwords * units, depth))
        whole = _from_lines(packed[..., start:middle], bits, stream).reshape(*lead, units, blocks, 16, dwords, 4)
        fields = [np.moveaxis(whole, -5, -3).reshape(*lead, 16 * blocks, 4 * dwords * units)]
        if parts:
            shared = _from_lines(packed[..., middle:end], bits, stream)
            rest = shared.reshape(*lead, parts, blocks // sharing, 16, sharing, 4, 4)
            rest = np.moveaxis(np.swapaxes(rest, -4, -3), -6, -3)
            fields.append(rest.reshape(*lead, 16 * blocks, 16 * parts))
        out.append(np.concatenate(fields, axis=-1))
        start = end
    codes = np.concatenate(out, axis=-2)
    return codes if side == "key" else np.swapaxes(codes, -1, -2)


def pack_scales(scales: NDArray[np.float16]) -> U8:
    """float16 [..., 64 tokens, blocks] -> uint8 [..., 128 * blocks]: block major."""
    return _to_bytes(np.swapaxes(scales, -1, -2).astype("<f2"))


def unpack_scales(packed: U8) -> NDArray[np.float16]:
    """The inverse of pack_scales: uint8 [..., 128 * blocks] -> float16 [..., 64 tokens, blocks]."""
    blocks = packed.shape[-1] // (2 * TILE)
    scales = np.ascontiguousarray(packed).view("<f2").astype(np.float16)
    return np.swapaxes(scales.reshape(*packed.shape[:-1], blocks, TILE), -1, -2)


def pack_elements(x: NDArray[Any], side: str) -> U8:
    """Whole elements [..., 64 tokens, d] of 2 or 4 bytes -> uint8 [..., 64 * d * itemsize]."""
    check_side(side)
    order = np.swapaxes(x, -1, -2) if side == "key" else x
    return _to_bytes(order.astype(x.dtype.newbyteorder("<")))


def unpack_elements(packed: U8, side: str, d: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The inverse of pack_elements: [..., 64 tokens, d] of `dtype`."""
    check_side(side)
    shape = (d, TILE) if side == "key" else (TILE, d)
    elements = np.ascontiguousarray(packed).view(dtype.newbyteorder("<")).astype(dtype)
    x = elements.reshape(*packed.shape[:-1], *shape)
    return np.swapaxes(x, -1, -2) if side == "key" else x


def _to_bytes(x: NDArray[Any]) -> U8:
    """[..., rows, columns] of elements -> uint8 [..., rows * columns * itemsize]."""
    return np.ascontiguousarray(x).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]).view(np.uint8)
