"""Quantizers: head vectors to codes and scales, and back. The table `CODECS` names them all.

Encoders work in float32, and the order of their operations is the specification: every backend gives the same
codes and the same scales, bit for bit. No operation may be contracted (FMA), reordered, or flush denormals to
zero. Decoders are specified in float64.

A codec here is one entry of the table: a function from vectors to codes and float32 scales, and one back. The
number of codes of a vector is its head size d; it has one scale for each block of `scale_block` values, the last
of which may be shorter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import blocks_dequantize, q4_0_quantize, q8_0_quantize
from .codebooks import CODEBOOKS
from .rotated import SCALE_RULES, lloyd_max_dequantize, lloyd_max_quantize

__all__ = [
    "CODECS",
    "HEAD_SIZES",
    "SCALE_RULES",
    "Codec",
    "check_head_size",
    "dequantize",
    "quantize",
    "scale_rule",
    "unsupported_head_size",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Codes = NDArray[np.uint8]

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256)
"""Head sizes that the codecs of this release accept: a power of two times 1, 12, 20 or 28, in this range."""

DEFAULT_RULE = "norm"


@dataclass(frozen=True)
class Codec:
    """One codec that quantizes (`exact` does not, and is not here)."""

    id: int  # in codec codes
    bits: int  # of one code
    rotated: bool  # and so has scale rules
    scale_block: int  # values that share one fp16 scale; 0: all of a vector
    quantize: Callable[[F32, str], tuple[Codes, F32]]
    dequantize: Callable[[Codes, F64], F64]

    def scales_of(self, d: int) -> int:
        """Scales of one vector of d values."""
        return -(-d // self.scale_block) if self.scale_block else 1


def _lloyd_max(id: int, bits: int) -> Codec:
    book = CODEBOOKS[bits]
    there = partial(lloyd_max_quantize, book=book)
    back = partial(lloyd_max_dequantize, book=book)
    return Codec(id, bits, True, 0, there, back)


CODECS: dict[str, Codec] = {
    "q8_0": Codec(1, 8, False, 32, q8_0_quantize, partial(blocks_dequantize, zero=128)),
    "q4_0": Codec(2, 4, False, 32, q4_0_quantize, partial(blocks_dequantize, zero=8)),
    "tq2": _lloyd_max(3, bits=2),
    "tq3": _lloyd_max(4, bits=3),
    "tq4": _lloyd_max(5, bits=4),
}
"""Every codec that quantizes, by name."""


def scale_rule(name: str, scale: str | None) -> str:
    """The scale rule that `scale` stands for, "" for codecs without one. ValueError for bad options."""
    if name == "exact" or not _lookup(name).rotated:
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


def quantize(
    x: NDArray[Any], name: str, scale: str | None = None, side: str = "key"
) -> tuple[Codes, NDArray[np.float16]]:
    """Codes and scales of head vectors.

    x: float32 or float16 (widened exactly) [..., tokens, d], d one of HEAD_SIZES. name: of a codec in CODECS.
    scale: a scale rule, for rotated codecs only; None is their default, "norm". side: for messages only.
    Returns codes uint8 [..., tokens, d] and scales float16 [..., tokens, scales of a vector]; fp16 is rounded
    to nearest even with denormals, so tiny vectors get scale 0 and decode to zeros.
    ValueError for NaN, infinities and scales beyond fp16 (naming the token), other dtypes, sizes and options.
    """
    codec, rule = _lookup(name), scale_rule(name, scale)
    if x.dtype not in (np.float32, np.float16):
        raise ValueError(f"x is {x.dtype}; {name} encodes float32 and float16")
    check_head_size(x.shape[-1])
    check_finite(x, side)

    codes, wide = codec.quantize(x.astype(np.float32).reshape(-1, x.shape[-1]), rule)
    with np.errstate(over="ignore", under="ignore"):
        scales = wide.astype(np.float16).reshape(*x.shape[:-1], codec.scales_of(x.shape[-1]))
    if not np.isfinite(scales).all():
        where = np.argwhere(~np.isfinite(scales))[0]
        value = wide.reshape(scales.shape)[tuple(where)]
        raise ValueError(f"{side} {_token(where[:-1])}: the scale {value:.4g} of {name} does not fit in fp16 (65504)")
    return codes.reshape(x.shape), scales


def dequantize(codes: Codes, scales: NDArray[np.float16], name: str) -> F64:
    """The float64 vectors that codes [..., d] and scales [..., scales of a vector] stand for: [..., d]."""
    flat_codes = codes.reshape(-1, codes.shape[-1])
    flat_scales = scales.astype(np.float64).reshape(-1, scales.shape[-1])
    return _lookup(name).dequantize(flat_codes, flat_scales).reshape(codes.shape)
