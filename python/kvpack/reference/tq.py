"""The Lloyd-Max codecs tq1 to tq4, and tqr3: each coordinate of the rotated vector to the nearest of 2^bits levels.

Float32, and the order of operations is the specification (see `quantize`). Source: TurboQuant (arXiv
2504.19874), algorithm 1.
"""

import numpy as np
from numpy.typing import NDArray

from .codebooks import Codebook
from .rotated import GAINS, SCALE_RULES, Mean, Rotated, match, squared_error, to_rotated

__all__ = ["assign", "lloyd_max_code", "lloyd_max_levels", "lloyd_max_quantize"]

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]


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


def lloyd_max_code(rotated: Rotated, rule: str, search: bool, book: Codebook) -> tuple[Codes, F32]:
    """Codes [n, 64, d] and float32 scales [n, 64, 1] of vectors in the rotated domain; x' is what the scales are of.

    The scale multiplies the integer level, in the domain of the orthonormal rotation. With `search`, the gain of z
    that leaves the least squared error after the scale rule is taken; 1, then the first, where they are equal.
    """
    codes = assign(rotated.z(np.float32(1)), book)
    best = match(rotated, book.levels[codes], book.unit)
    scale = SCALE_RULES[rule](best)
    if search:
        error = squared_error(scale, best)
        for gain in GAINS:
            other_codes = assign(rotated.z(gain), book)
            other = match(rotated, book.levels[other_codes], book.unit)
            other_scale = SCALE_RULES[rule](other)
            other_error = squared_error(other_scale, other)
            better = other_error < error
            codes = np.where(better, other_codes, codes)
            scale, error = np.where(better, other_scale, scale), np.where(better, other_error, error)
    return np.where(rotated.live, codes, np.uint8(len(book.positive))), scale


def lloyd_max_quantize(
    x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, book: Codebook
) -> tuple[Codes, F32]:
    """x float32 [n, 64, d] -> codes [n, 64, d], scales float32 [n, 64, 1]."""
    rotated = to_rotated(x, mean)
    codes, scale = lloyd_max_code(rotated, rule, search, book)
    return codes, rotated.stored(scale)


def lloyd_max_levels(codes: Codes, side: str, *, book: Codebook) -> NDArray[np.int8]:
    """The levels of codes [n, 64, d]."""
    return book.levels[codes]
