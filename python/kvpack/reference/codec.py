"""Codecs on bytes: tokens to the canonical bytes of their tiles and back; the records and pages of tiles.

    side of a tile     [scales][mean][codes]                            64 tokens, one KV head
    record of a tile   [K scales][V scales][K mean][V mean][K codes][V codes]
    page               [KV head][slot 0..3][record]                     4 tiles

Every section is a multiple of 64 bytes. `exact` has no scales; its codes are the elements themselves.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .packing import (
    SIDES,
    TILE,
    check_side,
    pack_codes,
    pack_elements,
    pack_scales,
    unpack_codes,
    unpack_elements,
    unpack_scales,
)
from .quantize import CODECS, SCALE_RULES, check_finite, check_head_size, dequantize, quantize, scale_rule

__all__ = [
    "SIDES",
    "codec_code",
    "decode",
    "encode",
    "join_pages",
    "join_record",
    "names",
    "page_bytes",
    "record_bytes",
    "sections",
    "side_bytes",
    "split_pages",
    "split_record",
]

U8 = NDArray[np.uint8]
Sections = tuple[int, int, int]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # NumPy has no bfloat16: its bits
}
"""Element dtypes of `exact`, and how NumPy holds them; the position in the table is the dtype's number."""

PAGE_TILES = 4


def names() -> list[str]:
    """Every codec of this release, `exact` first, in the order of their ids."""
    return ["exact", *CODECS]


def codec_code(name: str, scale: str | None = None, dtype: str = "float32") -> int:
    """The codec as one int: id | rule << 8 | dtype << 16 (rule 0 unless rotated, dtype 0 unless exact)."""
    rule = scale_rule(name, scale)
    if name == "exact":
        return list(DTYPES).index(_dtype(dtype)) << 16
    return CODECS[name].id | (list(SCALE_RULES).index(rule) << 8 if CODECS[name].rotated else 0)


def sections(name: str, head_dim: int, dtype: str = "float32") -> Sections:
    """Bytes of (scales, mean, codes) of one side of a tile, key or value. `dtype` is for exact only."""
    check_head_size(head_dim)
    scale_rule(name, None)  # the name is known
    if name == "exact":
        return 0, 0, TILE * head_dim * DTYPES[_dtype(dtype)].itemsize
    codec = CODECS[name]
    return 2 * TILE * codec.scales_of(head_dim), 0, TILE * head_dim * codec.bits // 8


def side_bytes(name: str, head_dim: int, side: str = "key", dtype: str = "float32") -> int:
    """Bytes of one side of a tile. ValueError for an unknown codec, side, dtype or head size."""
    check_side(side)
    return sum(sections(name, head_dim, dtype))


def encode(x: NDArray[Any], name: str, scale: str | None = None, side: str = "key") -> U8:
    """Canonical bytes of tokens: uint8 [..., ceil(tokens / 64), side_bytes].

    x: [..., tokens, d], float32 or float16; for `exact` also uint16, the bits of bfloat16 (its elements are
    kept as they are). The last tile is filled up with vectors of zeros.
    scale: a scale rule, for rotated codecs only; None is their default, "norm".
    ValueError for NaN and infinities, scales beyond fp16 (both name the token), unknown options and sizes.
    """
    check_side(side)
    scale_rule(name, scale)
    x = np.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x has the shape {x.shape}; it needs [..., tokens, d]")
    *lead, tokens, d = x.shape
    check_head_size(d)
    tiles = (tokens + TILE - 1) // TILE

    def in_tiles(rows: NDArray[Any]) -> NDArray[Any]:
        return rows.reshape(*lead, tiles, TILE, rows.shape[-1])

    filled = np.zeros((*lead, tiles * TILE, d), x.dtype)
    filled[..., :tokens, :] = x
    if name == "exact":
        if x.dtype not in DTYPES.values():
            raise ValueError(f"x is {x.dtype}; exact keeps float32, float16, and uint16 for bfloat16")
        check_finite(x, side)
        return pack_elements(in_tiles(filled), side)
    codes, scales = quantize(filled, name, scale, side)
    return np.concatenate(
        (pack_scales(in_tiles(scales)), pack_codes(in_tiles(codes), CODECS[name].bits, side)), axis=-1
    )


def decode(
    packed: U8, name: str, side: str, head_dim: int, tokens: int | None = None, dtype: str = "float32"
) -> NDArray[np.float64]:
    """The values that canonical bytes stand for: float64 [..., tokens, head_dim].

    packed: uint8 [..., tiles, side_bytes]. tokens: how many are wanted, from the first; None: all.
    dtype: of the elements, for `exact` only. ValueError for sizes that do not fit.
    """
    scale_bytes, mean_bytes, code_bytes = sections(name, head_dim, dtype)
    if packed.ndim < 2 or packed.shape[-1] != side_bytes(name, head_dim, side, dtype):
        want = scale_bytes + mean_bytes + code_bytes
        raise ValueError(f"packed has the shape {packed.shape}; {name} needs [..., tiles, {want}] for d = {head_dim}")
    *lead, tiles, _ = packed.shape
    tokens = tiles * TILE if tokens is None else tokens
    if not 0 <= tokens <= tiles * TILE:
        raise ValueError(f"{tokens} tokens are not in {tiles} tiles; they hold up to {tiles * TILE}")
    code_part = packed[..., scale_bytes + mean_bytes :]
    if name == "exact":
        elements = unpack_elements(code_part, side, head_dim, DTYPES[dtype])
        if dtype == "bfloat16":  # the upper half of a float32
            elements = (elements.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = elements.astype(np.float64)
    else:
        codes = unpack_codes(code_part, CODECS[name].bits, side, head_dim)
        x = dequantize(codes, unpack_scales(packed[..., :scale_bytes]), name)
    return x.reshape(*lead, tiles * TILE, head_dim)[..., :tokens, :]


def record_bytes(key: Sections, value: Sections) -> int:
    """Bytes of a record, from the `sections` of both sides."""
    return sum(key) + sum(value)


def page_bytes(key: Sections, value: Sections, kv_heads: int) -> int:
    """Bytes of a page of 4 tiles."""
    return kv_heads * PAGE_TILES * record_bytes(key, value)


def join_record(key_side: U8, value_side: U8, key: Sections, value: Sections) -> U8:
    """Both sides of tiles, uint8 [..., key or value bytes] -> their records, uint8 [..., record_bytes]."""
    of_key = np.split(key_side, np.cumsum(key)[:2], axis=-1)
    of_value = np.split(value_side, np.cumsum(value)[:2], axis=-1)
    return np.concatenate([part for pair in zip(of_key, of_value, strict=True) for part in pair], axis=-1)


def split_record(records: U8, key: Sections, value: Sections) -> tuple[U8, U8]:
    """The inverse of join_record."""
    sizes = [size for pair in zip(key, value, strict=True) for size in pair]
    parts = np.split(records, np.cumsum(sizes)[:-1], axis=-1)
    return np.concatenate(parts[0::2], axis=-1), np.concatenate(parts[1::2], axis=-1)


def join_pages(records: U8) -> U8:
    """Records of a row, uint8 [kv_heads, tiles, record_bytes] -> pages, uint8 [ceil(tiles / 4), page_bytes].

    Tile t lies in page t // 4, slot t % 4. Slots without a tile are zero here; nothing may read them.
    """
    heads, tiles, size = records.shape
    pages = (tiles + PAGE_TILES - 1) // PAGE_TILES
    filled = np.zeros((heads, pages * PAGE_TILES, size), np.uint8)
    filled[:, :tiles] = records
    pages_first = np.swapaxes(filled.reshape(heads, pages, PAGE_TILES * size), 0, 1)
    return pages_first.reshape(pages, heads * PAGE_TILES * size)


def split_pages(pages: U8, kv_heads: int, tiles: int) -> U8:
    """The inverse of join_pages: uint8 [kv_heads, tiles, record_bytes]."""
    size = pages.shape[-1] // (kv_heads * PAGE_TILES)
    heads_first = np.swapaxes(pages.reshape(len(pages), kv_heads, PAGE_TILES, size), 0, 1)
    return heads_first.reshape(kv_heads, len(pages) * PAGE_TILES, size)[:, :tiles]


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype
