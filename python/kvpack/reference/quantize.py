"""Quantizers: the vectors of tiles to codes and scales, and back. The table `CODECS` names them all.

Encoders work in float32, and the order of their operations is the specification: every backend gives the same
codes and the same scales, bit for bit. No operation may be contracted (FMA), reordered, or flush denormals to
zero. Decoders are specified in float64.

A codec here is one entry of the table: a function from vectors to codes and float32 scales, and one from codes to
levels; a value is scale * level, in the rotated domain plus the mean if there is one. The number of codes of
a vector is its head size d; it has one scale for each block of `scale_block` values. Codecs that are different say so
by methods of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import block_levels, blocks_quantize, rotated_blocks_quantize
from .codebooks import CODEBOOKS
from .fp8 import e4m3_value, fp8_quantize
from .kivi import kivi_dequantize, kivi_quantize, kivi_rows, kivi_token
from .packing import pack_codes, pack_elements, unpack_codes, unpack_elements
from .qjl import qjl_quantize, qjl_residual
from .rotated import SCALE_RULES, Mean, mean_of
from .rotation import rotate
from .tcq import tcq_levels, tcq_quantize
from .tq import lloyd_max_levels, lloyd_max_quantize

__all__ = [
    "CENTERS",
    "CODECS",
    "HEAD_SIZES",
    "SCALE_RULES",
    "Codec",
    "check_head_size",
    "dequantize",
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


@dataclass(frozen=True)
class Codec:
    """One codec that quantizes (`exact` does not, and is not here)."""

    id: int  # in codec codes
    bits: float  # of one code; of half-bit codes on average
    quantize: Callable[[F32, str, str, bool, Mean | None], tuple[Codes, F32]]  # x [n, 64, d], side, rule, search, mean
    levels: Callable[[Codes, str], NDArray[Any]]  # codes [n, 64, d], side
    rotated: bool = True
    scale_rules: bool = True
    scale_block: int = 0  # values that share one fp16 scale; 0: all of a vector
    stream: bool = False  # codes are the bits of a stream (packing of 3 bits)
    elements: bool = False  # codes lie one after the other, as the elements of `exact`
    asymmetric: bool = False  # scales are steps and zeros

    def scale_rows(self, d: int, side: str) -> int:
        """Rows of 64 fp16 scales of one side of a tile: one for each block of a vector, the last may be shorter."""
        return -(-d // self.scale_block) if self.scale_block else 1

    def code_bytes(self, d: int) -> int:
        """Bytes of the codes of one side of a tile."""
        return int(8 * d * self.bits)

    def pack(self, codes: Codes, side: str) -> Codes:
        """Codes [..., 64, d] of tiles -> their bytes [..., code_bytes]."""
        return pack_elements(codes, side) if self.elements else pack_codes(codes, self.bits, side, self.stream)

    def unpack(self, packed: Codes, side: str, d: int) -> Codes:
        """The inverse of `pack`."""
        if self.elements:
            return unpack_elements(packed, side, d, np.dtype(np.uint8))
        return unpack_codes(packed, self.bits, side, d, self.stream)

    def whole_tiles(self, side: str) -> bool:
        """Whether a side of a tile is quantized as a whole: its tokens have no scales or codes of their own."""
        return self.stream

    def culprit(self, x: NDArray[Any], side: str, where: NDArray[np.intp]) -> NDArray[np.intp]:
        """The vector [..., token] of x [..., tokens, d] that made the scale [..., token, row]."""
        return where[:-1]

    def dequantize(self, codes: Codes, scales: F16, side: str) -> F64:
        """Vectors of tiles [n, 64, d] in the codec's domain, without their mean; scales [n, 64, rows]."""
        wide = scales.astype(np.float64)
        if self.scale_block:
            wide = np.repeat(wide, self.scale_block, axis=-1)[..., : codes.shape[-1]]
        values: F64 = self.levels(codes, side) * wide
        return values


@dataclass(frozen=True)
class Kivi(Codec):
    """A codec whose scales are steps and zeros, those of keys per channel."""

    def scale_rows(self, d: int, side: str) -> int:
        return kivi_rows(d, side)

    def whole_tiles(self, side: str) -> bool:
        return side == "key"

    def culprit(self, x: NDArray[Any], side: str, where: NDArray[np.intp]) -> NDArray[np.intp]:
        return kivi_token(x, where) if side == "key" else where[:-1]

    def dequantize(self, codes: Codes, scales: F16, side: str) -> F64:
        return kivi_dequantize(codes, scales, side)


@dataclass(frozen=True)
class _Projected(Codec):
    """A codec of two parts, each with its codes and a row of scales: Lloyd-Max, and one bit of the residual."""

    @property
    def low(self) -> int:
        """Bits of the first part."""
        return int(self.bits) - 1

    def scale_rows(self, d: int, side: str) -> int:
        return 2

    def pack(self, codes: Codes, side: str) -> Codes:
        low, high = self._parts(codes)
        return np.concatenate((pack_codes(low, self.low, side), pack_codes(high, 1, side)), axis=-1)

    def unpack(self, packed: Codes, side: str, d: int) -> Codes:
        low, high = np.split(packed, [8 * d * (self.low)], axis=-1)
        return unpack_codes(low, self.low, side, d) | unpack_codes(high, 1, side, d) << np.uint8(self.low)

    def dequantize(self, codes: Codes, scales: F16, side: str) -> F64:
        low, high = self._parts(codes)
        wide = scales.astype(np.float64)
        values: F64 = self.levels(low, side) * wide[..., :1] + qjl_residual(high, wide[..., 1:])
        return values

    def _parts(self, codes: Codes) -> tuple[Codes, Codes]:
        return codes & np.uint8((1 << self.low) - 1), codes >> np.uint8(self.low)


def _lloyd_max(id: int, name: str) -> Codec:
    book = CODEBOOKS[name]
    there, back = partial(lloyd_max_quantize, book=book), partial(lloyd_max_levels, book=book)
    return Codec(id, book.bits, there, back)


def _projected(id: int, name: str) -> Codec:
    """Of the residual of the codec `name`."""
    book = CODEBOOKS[name]
    return _Projected(id, book.bits + 1, partial(qjl_quantize, book=book), partial(lloyd_max_levels, book=book))


def _blocks(id: int, bits: int, rotated: bool = False) -> Codec:
    there = partial(rotated_blocks_quantize if rotated else blocks_quantize, bits=bits)
    return Codec(id, bits, there, partial(block_levels, bits=bits), rotated, scale_rules=False, scale_block=32)


def _trellis(id: int, k: float) -> Codec:
    return Codec(id, k, partial(tcq_quantize, k=k), partial(tcq_levels, k=k), stream=True)


def _kivi(id: int, bits: int) -> Codec:
    there = partial(kivi_quantize, bits=bits)
    return Kivi(id, bits, there, _same, False, scale_rules=False, scale_block=32, asymmetric=True)


def _same(codes: Codes, side: str) -> Codes:
    return codes


CODECS: dict[str, Codec] = {
    "q8_0": _blocks(1, 8),
    "q4_0": _blocks(2, 4),
    "tq2": _lloyd_max(3, "tq2"),
    "tq3": _lloyd_max(4, "tq3"),
    "tq4": _lloyd_max(5, "tq4"),
    "tq1": _lloyd_max(6, "tq1"),
    "tqr3": _lloyd_max(7, "tqr3"),
    "q5_0": _blocks(8, 5),
    "rq8_0": _blocks(9, 8, rotated=True),
    "rq4_0": _blocks(10, 4, rotated=True),
    "tcq1": _trellis(11, 1),
    "tcq2": _trellis(12, 2),
    "tcq3": _trellis(13, 3),
    "tcq4": _trellis(14, 4),
    "fp8": Codec(15, 8, fp8_quantize, e4m3_value, rotated=False, scale_rules=False, elements=True),
    "kivi2": _kivi(16, 2),
    "kivi4": _kivi(17, 4),
    "tcq2.5": _trellis(18, 2.5),
    "tcq3.5": _trellis(19, 3.5),
    "tqp2": _projected(20, "tq1"),
    "tqp3": _projected(21, "tq2"),
    "tqp4": _projected(22, "tq3"),
}
"""Every codec that quantizes, by name."""


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


def means(x: NDArray[Any], name: str, center: str, side: str = "key") -> tuple[NDArray[np.int8], F16]:
    """The means of centring, of rows x [..., tokens, d]: levels int8 [..., n, d], scales float16 [..., n].

    center "tile": n is the number of tiles. "mean": one for each group of 4 tiles (of a page), all of them equal to
    the mean of the row's first tile that has a vector other than zeros. "none": n = 0. ValueError as `quantize`.
    """
    if center not in CENTERS:
        raise ValueError(f"center {center!r} is not one of {', '.join(CENTERS)}")
    *lead, tokens, d = x.shape
    tiles = -(-tokens // 64)
    if center == "none" or tiles == 0:
        return np.zeros((*lead, 0, d), np.int8), np.zeros((*lead, 0), np.float16)
    if not _lookup(name).rotated:
        raise ValueError(f"{name} is not rotated, and cannot be centred; center={center!r} fits rotated codecs only")
    check_finite(x, side)
    levels, wide = mean_of(_tiles(x).astype(np.float32))
    scales = _fp16(wide, lambda where: f"{side}: the scale of a mean of {name},").reshape(*lead, tiles)
    levels = levels.reshape(*lead, tiles, d)
    if center == "tile":
        return levels, scales
    first = np.argmax(scales != 0, axis=-1)[..., None]
    groups = np.arange(0, tiles, 4) + 3  # a group has it unless the first such tile comes after it
    known = (first <= groups)[..., None]
    levels = np.where(known, np.take_along_axis(levels, first[..., None], axis=-2), 0).astype(np.int8)
    return levels, np.where(known[..., 0], np.take_along_axis(scales, first, axis=-1), np.float16(0))


def _of_tiles(mean: tuple[NDArray[np.int8], F16], tiles: int, center: str) -> Mean:
    """The mean of each tile: levels [n, d], scales [n]."""
    levels, scales = mean
    if center == "mean":
        index = np.arange(tiles) // 4
        levels, scales = levels[..., index, :], scales[..., index]
    return levels.reshape(-1, levels.shape[-1]), scales.reshape(-1)


def quantize(
    x: NDArray[Any],
    name: str,
    scale: str | None = None,
    side: str = "key",
    center: str = "none",
    search: bool = False,
    mean: tuple[NDArray[np.int8], F16] | None = None,
) -> tuple[Codes, F16]:
    """Codes and scales of head vectors.

    x: float32 or float16 (widened exactly) [..., tokens, d], d one of HEAD_SIZES. name: of a codec in CODECS.
    scale: a scale rule, for codecs that have them only; None is their default, "norm". center: see `means`;
    mean: what it gave, None: what it gives for x. search: of the encode scale, for codecs with scale rules.
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
    found = means(x, name, center, side) if mean is None else mean
    of_tiles = None if center == "none" else _of_tiles(found, tiles, center)
    codes, wide = codec.quantize(_tiles(x).astype(np.float32), side, rule, search, of_tiles)
    wide = wide.reshape(*lead, tiles * 64, -1)
    scales = _fp16(wide, lambda where: f"{side} {_token(codec.culprit(x, side, where))}: the scale of {name},")
    codes = codes.reshape(*lead, tiles * 64, d)
    whole = codec.whole_tiles(side) or center != "none"
    return (codes, scales) if whole else (codes[..., :tokens, :], scales[..., :tokens, :])


def dequantize(
    codes: Codes, scales: F16, name: str, side: str = "key", mean: tuple[NDArray[np.int8], F16] | None = None
) -> F64:
    """The float64 vectors that codes [..., tokens, d] and scales [..., tokens, scales of a vector] stand for.

    side: matters to trellis codes. mean: as `means` gives it, for as many tiles or groups of 4 of them.
    """
    codec = _lookup(name)
    *lead, tokens, d = codes.shape
    tiles = -(-tokens // 64)
    x = codec.dequantize(_tiles(codes), _tiles(scales), side)
    if mean is not None and mean[0].shape[-2]:
        center = "tile" if mean[0].shape[-2] == tiles else "mean"
        of_tile = _of_tiles(mean, tiles, center)
        x = x + (of_tile[0].astype(np.float64) * of_tile[1].astype(np.float64)[:, None])[:, None, :]
    if codec.rotated:
        x = rotate(x, inverse=True)
    return x.reshape(*lead, tiles * 64, d)[..., :tokens, :]
