"""Quantizers: the vectors of tiles to codes and scales, and back. The table `CODECS` (codecs.py) names them all.

Encoders work in float32, and the order of their operations is the specification: every backend gives the same
codes and the same scales, bit for bit. No operation may be contracted (FMA), reordered, or flush denormals to
zero. Decoders are specified in float64.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import CODECS, Codec
from .rotated import SCALE_RULES, Mean
from .split import find_maps, gather, row_maps

__all__ = [
    "CENTERS",
    "CODECS",
    "HEAD_SIZES",
    "SCALE_RULES",
    "Codec",
    "check_head_size",
    "dequantize",
    "maps",
    "means",
    "quantize",
    "scale_rule",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
F16 = NDArray[np.float16]
Codes = NDArray[np.uint8]

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256)
"""Head sizes that the codecs of this release accept: a power of two times 1, 12, 20 or 28, in this range."""

DEFAULT_RULE = "norm"

CENTERS = ("none", "mean", "tile")
"""What is subtracted before quantization: nothing, the frozen mean of the row, the mean of each tile. The position is
the number in a codec code."""


def scale_rule(name: str, scale: str | None) -> str:
    """The scale rule that `scale` stands for, "" for codecs without one. ValueError for bad options."""
    if name == "exact" or not _lookup(name).scale_rules:
        if scale is not None:
            raise ValueError(f"{name} has no scale rules; scale={scale!r} fits rotated codecs only")
        return ""
    rule = DEFAULT_RULE if scale is None else scale
    if rule not in SCALE_RULES:
        raise ValueError(f"scale {rule!r} is not one of {', '.join(SCALE_RULES)}")
    return rule


def check_head_size(d: int) -> None:
    """ValueError unless d is one of HEAD_SIZES."""
    if d not in HEAD_SIZES:
        raise ValueError(unsupported_head_size(d))


def unsupported_head_size(d: int) -> str:
    """The message for a head size that is not one of HEAD_SIZES."""
    allowed = ", ".join(map(str, HEAD_SIZES))
    return f"head size {d} is not supported; allowed: {allowed} (2^a times 1, 12, 20 or 28)"


def _lookup(name: str) -> Codec:
    if name not in CODECS:
        raise ValueError(f"codec {name!r} is not one of exact, {', '.join(CODECS)}")
    return CODECS[name]


def _token(index: NDArray[np.intp]) -> str:
    """The words for one vector of [..., tokens]."""
    *lead, token = index.tolist()
    return f"token {token}" + (f" of row {tuple(lead)}" if lead else "")


def check_finite(x: NDArray[Any], side: str) -> None:
    """ValueError, naming the first such token, for NaN and infinities. uint16 holds the bits of bfloat16."""
    finite = (x & 0x7F80) != 0x7F80 if x.dtype == np.uint16 else np.isfinite(x)
    if not finite.all():
        where = np.argwhere(~finite)[0]
        value = "not finite" if x.dtype == np.uint16 else f"{x[tuple(where)]}, not finite"
        raise ValueError(f"{side} {_token(where[:-1])}: dim {where[-1]} is {value}")


def _tiles(x: NDArray[Any]) -> NDArray[Any]:
    """[..., tokens, d] -> [n, 64, d], filled up with zeros to whole tiles."""
    *lead, tokens, d = x.shape
    filled = np.zeros((*lead, -(-tokens // 64) * 64, d), x.dtype)
    filled[..., :tokens, :] = x
    return filled.reshape(-1, 64, d)


def _fp16(wide: F32, what: Callable[[NDArray[np.intp]], str]) -> F16:
    """Scales in fp16; ValueError where one does not fit."""
    with np.errstate(over="ignore", under="ignore"):
        scales: F16 = wide.astype(np.float16)
    if not np.isfinite(scales).all():
        where = np.argwhere(~np.isfinite(scales))[0]
        raise ValueError(f"{what(where)} {wide[tuple(where)]:.4g}, does not fit in fp16 (65504)")
    return scales


def maps(x: NDArray[Any], name: str, center: str, side: str = "key") -> Codes:
    """The maps of channels of rows x [..., tokens, d]: uint8 [..., n, d / 8], of width 0 for codecs without them.

    center "tile": n is the number of tiles; otherwise one for each group of 4 tiles (of a page), that of the last one
    of them. ValueError as `quantize`.
    """
    *lead, tokens, d = x.shape
    tiles = -(-tokens // 64)
    size = _lookup(name).map_bytes(d)
    if size == 0 or tiles == 0:
        return np.zeros((*lead, tiles if center == "tile" else -(-tiles // 4), size), np.uint8)
    check_finite(x, side)
    found = row_maps(find_maps(_tiles(x).astype(np.float32)).reshape(*lead, tiles, size))
    return found if center == "tile" else found[..., [min(t, tiles - 1) for t in range(3, tiles + 3, 4)], :]


def means(
    x: NDArray[Any], name: str, center: str, side: str = "key", known: Codes | None = None
) -> tuple[NDArray[np.int8], F16]:
    """The means of centring, of rows x [..., tokens, d]: levels int8 [..., n, d], scales float16 [..., n].

    center "tile": n is the number of tiles. "mean": one for each group of 4 tiles (of a page), all of them equal to
    the mean of the row's first tile that has a vector other than zeros. "none": n = 0. known: maps of channels, as
    `maps` gives them or one for each tile; None: what it gives for x. ValueError as `quantize`.
    """
    if center not in CENTERS:
        raise ValueError(f"center {center!r} is not one of {', '.join(CENTERS)}")
    *lead, tokens, d = x.shape
    tiles = -(-tokens // 64)
    if center == "none" or tiles == 0:
        return np.zeros((*lead, 0, d), np.int8), np.zeros((*lead, 0), np.float16)
    codec = _lookup(name)
    if not codec.rotated:
        raise ValueError(f"{name} is not rotated, and cannot be centred; center={center!r} fits rotated codecs only")
    check_finite(x, side)
    rows = _gathered(x, codec, maps(x, name, center, side) if known is None else known)
    levels, wide = codec.mean_of(rows)
    scales = _fp16(wide, lambda where: f"{side}: the scale of a mean of {name},").reshape(*lead, tiles)
    levels = levels.reshape(*lead, tiles, d)
    if center == "tile":
        return levels, scales
    first = np.argmax(scales != 0, axis=-1)[..., None]
    groups = np.arange(0, tiles, 4) + 3  # a group has it unless the first such tile comes after it
    there = (first <= groups)[..., None]
    levels = np.where(there, np.take_along_axis(levels, first[..., None], axis=-2), 0).astype(np.int8)
    return levels, np.where(there[..., 0], np.take_along_axis(scales, first, axis=-1), np.float16(0))


def _of_tiles(entries: NDArray[Any], tiles: int, axis: int) -> NDArray[Any]:
    """What each tile has, [n, ...], of entries whose `axis` counts tiles, or groups of 4 of them."""
    index = np.arange(tiles) if entries.shape[axis] == tiles else np.arange(tiles) // 4
    each = np.take(entries, index, axis)
    rest = each.shape[axis + 1 :] if axis + 1 else ()
    return each.reshape(each.size // max(math.prod(rest), 1), *rest)


def _mean_of_tiles(mean: tuple[NDArray[np.int8], F16], tiles: int) -> Mean:
    """The mean of each tile: levels [n, d], scales [n]."""
    return _of_tiles(mean[0], tiles, -2), _of_tiles(mean[1], tiles, -1)


def _gathered(x: NDArray[Any], codec: Codec, known: Codes) -> F32:
    """The tiles float32 [n, 64, d] of x [..., tokens, d], the channels in the order of the parts."""
    rows: F32 = _tiles(x).astype(np.float32)
    return gather(rows, _of_tiles(known, -(-x.shape[-2] // 64), -2)) if codec.split else rows


def quantize(
    x: NDArray[Any],
    name: str,
    scale: str | None = None,
    side: str = "key",
    center: str = "none",
    search: bool = False,
    mean: tuple[NDArray[np.int8], F16] | None = None,
    known: Codes | None = None,
) -> tuple[Codes, F16]:
    """Codes and scales of head vectors.

    x: float32 or float16 (widened exactly) [..., tokens, d], d one of HEAD_SIZES. name: of a codec in CODECS.
    scale: a scale rule, for codecs that have them only; None is their default, "norm". center: see `means`;
    mean: what it gave, None: what it gives for x. known: maps of channels, as in `means`. search: of the encode
    scale, for codecs with scale rules.
    Returns codes uint8 [..., tokens, d] and scales float16 [..., tokens, scales of a vector]; fp16 is rounded
    to nearest even with denormals, so tiny vectors get scale 0 and decode to zeros. Where a tile is quantized as a
    whole (trellis codes, centring, keys of KIVI), a last tile is filled up with zeros, and both have it whole.
    ValueError for NaN, infinities and scales beyond fp16 (naming the token), other dtypes, sizes and options.
    """
    codec, rule = _lookup(name), scale_rule(name, scale)
    if x.dtype not in (np.float32, np.float16):
        raise ValueError(f"x is {x.dtype}; {name} encodes float32 and float16")
    if search and not codec.scale_rules:
        raise ValueError(f"{name} has no scale rules, and so no search of its scale")
    check_head_size(x.shape[-1])
    check_finite(x, side)
    *lead, tokens, d = x.shape
    tiles = -(-tokens // 64)
    if x.size == 0:
        rows = codec.scale_rows(d, side)
        return np.zeros((*lead, tokens, d), np.uint8), np.zeros((*lead, tokens, rows), np.float16)
    known = maps(x, name, center, side) if known is None else known
    found = means(x, name, center, side, known) if mean is None else mean
    of_tiles = None if center == "none" else _mean_of_tiles(found, tiles)
    codes, wide = codec.quantize(_gathered(x, codec, known), side, rule, search, of_tiles)
    wide = wide.reshape(*lead, tiles * 64, -1)
    scales = _fp16(wide, lambda where: f"{side} {_token(codec.culprit(x, side, where))}: the scale of {name},")
    codes = codes.reshape(*lead, tiles * 64, d)
    whole = codec.whole_tiles(side) or center != "none"
    return (codes, scales) if whole else (codes[..., :tokens, :], scales[..., :tokens, :])


def dequantize(
    codes: Codes,
    scales: F16,
    name: str,
    side: str = "key",
    mean: tuple[NDArray[np.int8], F16] | None = None,
    known: Codes | None = None,
) -> F64:
    """The float64 vectors that codes [..., tokens, d] and scales [..., tokens, scales of a vector] stand for.

    side: matters to trellis codes. mean, known: as `means` and `maps` give them, for as many tiles or groups of 4 of
    them; None: there are none.
    """
    codec = _lookup(name)
    *lead, tokens, d = codes.shape
    tiles = -(-tokens // 64)
    x = codec.dequantize(_tiles(codes), _tiles(scales), side)
    if mean is not None and mean[0].shape[-2]:
        levels, steps = _mean_of_tiles(mean, tiles)
        x = x + (levels.astype(np.float64) * steps.astype(np.float64)[:, None])[:, None, :]
    x = codec.from_domain(x, None if known is None else _of_tiles(known, tiles, -2))
    return x.reshape(*lead, tiles * 64, d)[..., :tokens, :]
