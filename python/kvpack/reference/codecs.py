"""The table of codecs that quantize, `CODECS`, and what a codec is here.

A codec is one entry of the table: a function from vectors to codes and float32 scales, and one from codes to levels; a
value is scale * level, in the rotated domain plus the mean if there is one. The number of codes of a vector is its head
size d; it has one scale for each block of `scale_block` values. Codecs that are different say so by methods of their
own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import block_levels, blocks_quantize, rotated_blocks_quantize
from .codebooks import CODEBOOKS, Codebook
from .fp8 import e4m3_value, fp8_quantize
from .kivi import kivi_dequantize, kivi_quantize, kivi_rows, kivi_token
from .packing import pack_codes, pack_elements, unpack_codes, unpack_elements
from .qjl import qjl_quantize, qjl_residual
from .rotated import Mean, mean_of
from .rotation import rotate
from .split import part_sizes, split_mean, split_quantize, split_rotate_back
from .tcq import tcq_levels, tcq_quantize
from .tq import lloyd_max_levels, lloyd_max_quantize

__all__ = ["CODECS", "Codec"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
F16 = NDArray[np.float16]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Codec:
    """One codec that quantizes (`exact` does not, and is not here)."""

    id: int  # in codec codes
    bits: float  # of one code; on average, where they differ
    quantize: Callable[[F32, str, str, bool, Mean | None], tuple[Codes, F32]]  # x [n, 64, d], side, rule, search, mean
    levels: Callable[[Codes, str], NDArray[Any]]  # codes [n, 64, d], side
    rotated: bool = True
    scale_rules: bool = True
    scale_block: int = 0  # values that share one fp16 scale; 0: all of a vector
    stream: bool = False  # codes are the bits of a stream (packing of 3 bits)
    elements: bool = False  # codes lie one after the other, as the elements of `exact`
    asymmetric: bool = False  # scales are steps and zeros
    split: bool = False  # of two parts that a map of channels makes; x is gathered before it comes here

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

    def map_bytes(self, d: int) -> int:
        """Bytes of a row's map of channels."""
        return d // 8 if self.split else 0

    def mean_of(self, x: F32) -> tuple[NDArray[np.int8], F32]:
        """Means of tiles float32 [n, 64, d] in the codec's domain: levels int8 [n, d], scales float32 [n]."""
        return mean_of(x)

    def from_domain(self, x: F64, maps: Codes | None) -> F64:
        """Tiles [n, 64, d] from the codec's domain to that of the vectors; maps [n, map_bytes], None without."""
        return rotate(x, inverse=True) if self.rotated else x

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


@dataclass(frozen=True)
class _Split(Codec):
    """A codec of two parts that are Lloyd-Max codes of some channels each."""

    books: tuple[Codebook, Codebook] = (CODEBOOKS["tq3"], CODEBOOKS["tq2"])

    def scale_rows(self, d: int, side: str) -> int:
        return 2

    def code_bytes(self, d: int) -> int:
        return sum(8 * n * book.bits for n, book in zip(part_sizes(d), self.books, strict=True))

    def pack(self, codes: Codes, side: str) -> Codes:
        parts = np.split(codes, [part_sizes(codes.shape[-1])[0]], axis=-1)
        packed = [pack_codes(part, book.bits, side) for part, book in zip(parts, self.books, strict=True)]
        return np.concatenate(packed, axis=-1)

    def unpack(self, packed: Codes, side: str, d: int) -> Codes:
        sizes = part_sizes(d)
        parts = np.split(packed, [8 * sizes[0] * self.books[0].bits], axis=-1)
        codes = [unpack_codes(p, book.bits, side, n) for p, book, n in zip(parts, self.books, sizes, strict=True)]
        return np.concatenate(codes, axis=-1)

    def mean_of(self, x: F32) -> tuple[NDArray[np.int8], F32]:
        return split_mean(x)

    def from_domain(self, x: F64, maps: Codes | None) -> F64:
        return split_rotate_back(x, np.zeros((len(x), self.map_bytes(x.shape[-1])), np.uint8) if maps is None else maps)

    def dequantize(self, codes: Codes, scales: F16, side: str) -> F64:
        parts = np.split(codes, [part_sizes(codes.shape[-1])[0]], axis=-1)
        levels = [book.levels[part] for part, book in zip(parts, self.books, strict=True)]
        wide = scales.astype(np.float64)
        return np.concatenate([levels[n] * wide[..., n : n + 1] for n in range(2)], axis=-1)


def _lloyd_max(id: int, name: str) -> Codec:
    book = CODEBOOKS[name]
    there, back = partial(lloyd_max_quantize, book=book), partial(lloyd_max_levels, book=book)
    return Codec(id, book.bits, there, back)


def _projected(id: int, name: str) -> Codec:
    """Of the residual of the codec `name`."""
    book = CODEBOOKS[name]
    return _Projected(id, book.bits + 1, partial(qjl_quantize, book=book), partial(lloyd_max_levels, book=book))


def _split(id: int, outliers: str, others: str) -> Codec:
    books = CODEBOOKS[outliers], CODEBOOKS[others]
    bits = (books[0].bits + 3 * books[1].bits) / 4  # of a quarter of the channels, and of the rest
    return _Split(id, bits, partial(split_quantize, books=books), _same, split=True, books=books)


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
    "tq2.5": _split(23, "tq3", "tq2"),
    "tq3.5": _split(24, "tq4", "tq3"),
}
"""Every codec that quantizes, by name."""
