"""The rotated codecs tq2, tq3 and tq4: rotation, Lloyd-Max levels, one scale for the vector.

    x -> x' = x 2^-e -> y = sqrt(d) R x' -> z = y / norm(x'), close to N(0, 1) -> codes, levels q
                                                             scale rule (x', y, q) -> scale 2^e

Float32, and the order of operations is the specification (see `quantize`). Source: TurboQuant (arXiv
2504.19874), algorithm 1; the scale rules are those of DRIVE and EDEN (arXiv 2105.08339, 2108.08842).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codebooks import Codebook
from .hadamard import hadamard_transform
from .normalise import lanes16_sum, normalise
from .rotation import rotate, signs

__all__ = ["SCALE_RULES", "assign", "lloyd_max_dequantize", "lloyd_max_quantize"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Codes = NDArray[np.uint8]


class Match(NamedTuple):
    """What a scale rule may use: of a normalised vector x' and its code word q (integer levels)."""

    n2: F32  # <x', x'>
    r: F32  # sqrt(n2)
    xc: F32  # <sqrt(d) R x', q>
    cc: F32  # <q, q>: an integer below 2^24, so exact
    unit: float  # of the codebook
    d: int


def _stored(m: Match) -> F32:
    """The norm of x, as TurboQuant stores it: the centroids at their nominal size."""
    return m.r * np.float32(m.unit / np.sqrt(m.d))


def _norm(m: Match) -> F32:
    """norm(x) / norm(c): the decoded vector has the norm of x."""
    root: F32 = np.sqrt(m.cc)
    return m.r / root


def _mse(m: Match) -> F32:
    """<x, c> / <c, c>: the least squared error."""
    return (m.xc * np.float32(1 / np.sqrt(m.d))) / m.cc


def _unbiased(m: Match) -> F32:
    """<x, x> / <x, c>: <x, decoded x> = <x, x>, no shrink of inner products (EDEN, arXiv 2108.08842)."""
    return m.n2 / (m.xc * np.float32(1 / np.sqrt(m.d)))


SCALE_RULES: dict[str, Callable[[Match], F32]] = {
    "stored": _stored,
    "norm": _norm,
    "mse": _mse,
    "unbiased": _unbiased,
}
"""Scale rules of the rotated codecs; the position in the table is the rule's number in a codec code."""


def assign(z: F32, book: Codebook) -> Codes:
    """The code of each z (in standard deviations): uint8, same shape.

    |z| on a threshold takes the smaller level. The sign bit decides the half, for zeros too.
    """
    half = len(book.positive)
    size = np.abs(z)
    magnitude = np.zeros(z.shape, np.uint8)
    for threshold in book.thresholds:
        magnitude += size > threshold  # the number of thresholds below |z|
    return np.where(np.signbit(z), np.uint8(half - 1) - magnitude, np.uint8(half) + magnitude)


def lloyd_max_quantize(x: F32, rule: str, *, book: Codebook) -> tuple[Codes, F32]:
    """Rotation, Lloyd-Max levels, one scale: x float32 [n, d] -> codes [n, d], scales float32 [n, 1].

    The scale multiplies the integer level, in the domain of the orthonormal rotation.
    """
    d = x.shape[-1]
    scaled, e, live = normalise(x)
    n2 = lanes16_sum(scaled * scaled)[:, None]
    n2 = np.where(live, n2, np.float32(1))  # no division by zero; vectors of zeros are set at the end
    r: F32 = np.sqrt(n2)
    y = hadamard_transform(signs(d) * scaled)  # sqrt(d) R x'

    inv = np.float32(1) / r
    codes = assign(y * inv, book)

    q = book.levels[codes]
    cc = np.sum(q.astype(np.int32) ** 2, axis=-1, keepdims=True).astype(np.float32)
    xc = lanes16_sum(y * q.astype(np.float32))[:, None]
    with np.errstate(divide="ignore"):  # <x, c> is 0 for vectors of zeros only
        scale = SCALE_RULES[rule](Match(n2, r, xc, cc, book.unit, d))
    with np.errstate(over="ignore", under="ignore"):  # infinite: refused by quantize(); zero: fine
        scale = np.ldexp(scale, e)
    return np.where(live, codes, np.uint8(len(book.positive))), np.where(live, scale, np.float32(0))


def lloyd_max_dequantize(codes: Codes, scales: F64, *, book: Codebook) -> F64:
    """R^T (scale * level): codes [n, d], scales [n, 1] -> float64 [n, d]."""
    return rotate(scales * book.levels[codes].astype(np.float64), inverse=True)
