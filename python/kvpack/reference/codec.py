"""Codecs on bytes: tokens to the canonical bytes of their tiles and back; the records and pages of tiles.

    side of a tile     [scales][codes]                                  64 tokens, one KV head
    record of a tile   [K scales][V scales][K codes][V codes]
    page               [KV head] of [record of slot 0..3][means, maps]  4 tiles

Every section is a multiple of 64 bytes. `exact` has no scales; its codes are the elements themselves.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .packing import (
    SIDES,
    TILE,
    check_side,
    pack_elements,
    pack_scales,
    unpack_elements,
    unpack_scales,
)
from .quantize import (
    CENTERS,
    CODECS,
    SCALE_RULES,
    check_finite,
    check_head_size,
    dequantize,
    maps,
    means,
    quantize,
    scale_rule,
)

__all__ = [
    "SIDES",
    "codec_code",
    "decode",
    "encode",
    "encode_means",
    "join_means",
    "join_pages",
    "join_record",
    "map_bytes",
    "means_bytes",
    "names",
    "page_bytes",
    "record_bytes",
    "sections",
    "side_bytes",
    "split_pages",
    "split_record",
]

U8 = NDArray[np.uint8]
Sections = tuple[int, int]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # NumPy has no bfloat16: its bits
}
"""Element dtypes of `exact`, and how NumPy holds them; the position in the table is the dtype's number."""

PAGE_TILES = 4
"""Tiles (slots) in a page."""

LINE = 64
"""Bytes that every section of a record is a multiple of; pages are aligned to it."""

MEANS_PER_PAGE = {"none": 0, "mean": 1, "tile": PAGE_TILES}


def names() -> list[str]:
    """Every codec of this release, `exact` first, in the order of their ids."""
    return ["exact", *CODECS]


def codec_code(
    name: str, scale: str | None = None, dtype: str = "float32", center: str = "none", search: bool = False
) -> int:
    """The codec as one int: id | rule << 8 | dtype << 16 | center << 24 | search << 28.

    The rule is 0 unless the codec has scale rules, the dtype 0 unless it is exact.
    """
    rule = scale_rule(name, scale)
    if name == "exact":
        return list(DTYPES).index(_dtype(dtype)) << 16
    options = CENTERS.index(center) << 24 | int(search) << 28
    return CODECS[name].id | (list(SCALE_RULES).index(rule) << 8 if rule else 0) | options


def sections(name: str, head_dim: int, side: str = "key", dtype: str = "float32") -> Sections:
    """Bytes of (scales, codes) of one side of a tile. `dtype` is for exact only."""
    check_head_size(head_dim)
    scale_rule(name, None)  # the name is known
    if name == "exact":
        return 0, TILE * head_dim * DTYPES[_dtype(dtype)].itemsize
    codec = CODECS[name]
    return 2 * TILE * codec.scale_rows(head_dim, side), codec.code_bytes(head_dim)


def side_bytes(name: str, head_dim: int, side: str = "key", dtype: str = "float32") -> int:
    """Bytes of one side of a tile, without means. ValueError for an unknown codec, side, dtype or head size."""
    check_side(side)
    return sum(sections(name, head_dim, side, dtype))


def encode(
    x: NDArray[Any],
    name: str,
    scale: str | None = None,
    side: str = "key",
    center: str = "none",
    search: bool = False,
    mean: U8 | None = None,
) -> U8:
    """Canonical bytes of tokens: uint8 [..., ceil(tokens / 64), side_bytes].

    x: [..., tokens, d], float32 or float16; for `exact` also uint16, the bits of bfloat16 (its elements are
    kept as they are). The last tile is filled up with vectors of zeros.
    scale, center, search: options of the codecs that have them, see `quantize`. mean: what is subtracted, as
    `encode_means` gives it; None: what it gives for x.
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
    found, known = (None, None) if mean is None else _split_means(mean, name, d)
    codes, scales = quantize(filled, name, scale, side, center, search, found, known)
    packed = CODECS[name].pack(in_tiles(codes), side)
    return np.concatenate((pack_scales(in_tiles(scales)), packed), axis=-1)


def map_bytes(name: str, head_dim: int) -> int:
    """Bytes of a map of channels: 0 for codecs without one."""
    return 0 if name == "exact" else CODECS[name].map_bytes(head_dim)


def encode_means(x: NDArray[Any], name: str, center: str, side: str = "key", known: U8 | None = None) -> U8:
    """What goes with tiles beside their bytes: uint8 [..., n, d + 2 + map_bytes].

    The levels and the scale of a mean, which there is none of with center "none", and the map of channels of codecs
    that have one. n: as `quantize.means` says; that of `quantize.maps`, where there are maps. known: maps to take,
    [..., n or tiles, map_bytes].
    """
    d = x.shape[-1]
    if name == "exact":
        return np.zeros((*x.shape[:-2], 0, d + 2), np.uint8)
    x = np.asarray(x)
    known = maps(x, name, center, side) if known is None else known
    levels, scales = means(x, name, center, side, known)
    tail = np.ascontiguousarray(scales.astype("<f2"))[..., None].view(np.uint8)
    mean = np.concatenate((levels.view(np.uint8), tail), axis=-1)
    if not known.shape[-1]:
        return mean
    return known if center == "none" else np.concatenate((mean, known), axis=-1)


def _split_means(mean: U8, name: str, d: int) -> tuple[tuple[NDArray[np.int8], NDArray[np.float16]] | None, U8 | None]:
    """The inverse of `encode_means`: levels int8 [..., n, d] with scales float16 [..., n], and maps."""
    size = map_bytes(name, d)
    mean, known = np.split(mean, [mean.shape[-1] - size], axis=-1)
    if not mean.shape[-1]:
        return None, known
    scales = np.ascontiguousarray(mean[..., -2:]).view("<f2")[..., 0]
    return (mean[..., :-2].view(np.int8), scales.astype(np.float16)), known if size else None


def decode(
    packed: U8,
    name: str,
    side: str,
    head_dim: int,
    tokens: int | None = None,
    dtype: str = "float32",
    mean: U8 | None = None,
) -> NDArray[np.float64]:
    """The values that canonical bytes stand for: float64 [..., tokens, head_dim].

    packed: uint8 [..., tiles, side_bytes]. tokens: how many are wanted, from the first; None: all.
    dtype: of the elements, for `exact` only. mean: as `encode_means` gives it; None: there is none.
    ValueError for sizes that do not fit.
    """
    scale_bytes, code_bytes = sections(name, head_dim, side, dtype)
    if packed.ndim < 2 or packed.shape[-1] != side_bytes(name, head_dim, side, dtype):
        want = scale_bytes + code_bytes
        raise ValueError(f"packed has the shape {packed.shape}; {name} needs [..., tiles, {want}] for d = {head_dim}")
    *lead, tiles, _ = packed.shape
    tokens = tiles * TILE if tokens is None else tokens
    if not 0 <= tokens <= tiles * TILE:
        raise ValueError(f"{tokens} tokens are not in {tiles} tiles; they hold up to {tiles * TILE}")
    code_part = packed[..., scale_bytes:]
    if name == "exact":
        elements = unpack_elements(code_part, side, head_dim, DTYPES[dtype])
        if dtype == "bfloat16":  # the upper half of a float32
            elements = (elements.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = elements.astype(np.float64)
    else:
        codes = CODECS[name].unpack(code_part, side, head_dim)
        scales = unpack_scales(packed[..., :scale_bytes])
        flat = (*lead, tiles * TILE)
        found, known = (None, None) if mean is None else _split_means(mean, name, head_dim)
        codes, scales = codes.reshape(*flat, head_dim), scales.reshape(*flat, scales.shape[-1])
        x = dequantize(codes, scales, name, side, found, known)
    return x.reshape(*lead, tiles * TILE, head_dim)[..., :tokens, :]


def record_bytes(key: Sections, value: Sections) -> int:
    """Bytes of a record, from the `sections` of both sides."""
    return sum(key) + sum(value)


def means_bytes(means: Sequence[tuple[str, int]], maps: int = 0) -> int:
    """Bytes of what follows the records of one KV head in a page.

    means: (center, head size) of keys and of values; maps: bytes of the maps of channels of both.
    """
    size = sum(MEANS_PER_PAGE[center] * (d + 2) for center, d in means) + maps
    return -(-size // LINE) * LINE


def page_bytes(
    key: Sections, value: Sections, kv_heads: int, means: Sequence[tuple[str, int]] = (), maps: int = 0
) -> int:
    """Bytes of a page of 4 tiles; `means` and `maps` as in `means_bytes`."""
    return kv_heads * (PAGE_TILES * record_bytes(key, value) + means_bytes(means, maps))


def join_record(key_side: U8, value_side: U8, key: Sections, value: Sections) -> U8:
    """Both sides of tiles, uint8 [..., key or value bytes] -> their records, uint8 [..., record_bytes]."""
    of_key = np.split(key_side, np.cumsum(key)[:-1], axis=-1)
    of_value = np.split(value_side, np.cumsum(value)[:-1], axis=-1)
    return np.concatenate([part for pair in zip(of_key, of_value, strict=True) for part in pair], axis=-1)


def split_record(records: U8, key: Sections, value: Sections) -> tuple[U8, U8]:
    """The inverse of join_record."""
    sizes = [size for pair in zip(key, value, strict=True) for size in pair]
    parts = np.split(records, np.cumsum(sizes)[:-1], axis=-1)
    return np.concatenate(parts[0::2], axis=-1), np.concatenate(parts[1::2], axis=-1)


def join_means(pages: int, sides: Sequence[tuple[str, U8]], maps: tuple[int, int] = (0, 0)) -> U8:
    """Means of a row, (center, uint8 [kv_heads, n, d + 2]) of keys and of values -> uint8 [kv_heads, pages, bytes].

    | K means | V means | K scales | V scales | K map | V map |, zeros where there is no tile, filled up to a multiple
    of 64 bytes. maps: the bytes of the maps that follow the means in `sides`; a page has that of its last tile.
    """
    levels, scales, channels = [], [], []
    for (center, entries), size in zip(sides, maps, strict=True):
        mean, known = np.split(entries, [entries.shape[-1] - size], axis=-1)
        heads, n, width = mean.shape
        count = MEANS_PER_PAGE[center]
        filled = np.zeros((heads, pages * count, width), np.uint8)
        filled[:, :n] = mean[:, : pages * count]
        of_page = filled.reshape(heads, pages, count, width)
        levels.append(of_page[..., :-2].reshape(heads, pages, count * max(width - 2, 0)))
        scales.append(of_page[..., -2:].reshape(heads, pages, count * min(width, 2)))
        if size:
            last = [min(t, n - 1) for t in range(3, 4 * pages, 4)] if center == "tile" else list(range(pages))
            channels.append(known[:, last])
    joined = np.concatenate([*levels, *scales, *channels], axis=-1)
    return np.pad(joined, ((0, 0), (0, 0), (0, -joined.shape[-1] % LINE)))


def join_pages(records: U8, means: U8 | None = None) -> U8:
    """Records of a row, uint8 [kv_heads, tiles, record_bytes] -> pages, uint8 [ceil(tiles / 4), page_bytes].

    Tile t lies in page t // 4, slot t % 4. Slots without a tile are zero here; nothing may read them.
    means: as `join_means` gives them; None: there are none.
    """
    heads, tiles, size = records.shape
    pages = (tiles + PAGE_TILES - 1) // PAGE_TILES
    filled = np.zeros((heads, pages * PAGE_TILES, size), np.uint8)
    filled[:, :tiles] = records
    of_page = filled.reshape(heads, pages, PAGE_TILES * size)
    if means is not None:
        of_page = np.concatenate((of_page, means), axis=-1)
    return np.swapaxes(of_page, 0, 1).reshape(pages, heads * of_page.shape[-1])


def split_pages(pages: U8, kv_heads: int, tiles: int, record: int) -> U8:
    """The records of pages: uint8 [kv_heads, tiles, record_bytes]; record: their size."""
    heads_first = np.swapaxes(
        pages.reshape(len(pages), kv_heads, pages.shape[1] // kv_heads)[..., : PAGE_TILES * record], 0, 1
    )
    return heads_first.reshape(kv_heads, len(pages) * PAGE_TILES, record)[:, :tiles]


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype
