"""The codecs of two parts tqp2 to tqp4: a Lloyd-Max code of one bit less, and the signs of its projected residual.

    y = sqrt(d) R x' (- mean)     rho = y - step * level      rho is about sqrt(pi/2) / d * |rho| * S^T sign(S rho)

S is a Gaussian d x d matrix with entries of mean square 1, independent of the rotation: inner products with the
decoded vector are unbiased (not so with a matrix of signs: the constant is that of the normal distribution).

Float32, and the order of operations is the specification (see `quantize`). Source: TurboQuant (arXiv 2504.19874),
algorithm 2, TurboQuant_prod; QJL (arXiv 2406.03482).
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .codebooks import Codebook
from .normalise import lanes16_sum
from .rotated import Mean, to_rotated
from .rotation import splitmix64
from .tq import lloyd_max_code

__all__ = ["projection", "qjl_quantize", "qjl_residual"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Codes = NDArray[np.uint8]

SEED = 0x716A_6C70_726F_8000
"""The head size is added. "qjlpro" in ASCII, shifted left by 16 bits, and 64 * 2^9: of the draws 0, 1, 2, ... the first
one that is typical at every head size. Residuals of random directions come back with the error and the slope that all
matrices have on average, to 1 % and 0.5 %; at d = 64, one draw may be off by 5 %."""
STEPS = 32
"""Integers in a standard deviation of the normal distribution that the entries are drawn from."""


@lru_cache(maxsize=8)
def projection(d: int) -> NDArray[np.int8]:
    """int8 [d, d], read-only: G for head size d, entries from N(0, 32^2), rounded. S = G / sqrt(mean of G^2).

    Entry i of the rows, one after the other, comes from bits 16 (i % 4) and up of word i / 4 of splitmix64: the top bit
    is the sign (1: negative), the magnitude is the number of k in 0..126 with C[k] <= the other 15 bits.
    """
    borders = [round(2**15 * math.erf((k + 0.5) / STEPS / math.sqrt(2))) for k in range(127)]
    words = splitmix64(SEED + d, d * d // 4)
    fields = (words[:, None] >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF)).reshape(d, d)
    magnitude = np.searchsorted(borders, (fields & np.uint64(0x7FFF)).astype(np.int64), side="right")
    g = np.where(fields >> np.uint64(15), -magnitude, magnitude).astype(np.int8)
    g.flags.writeable = False
    return g


def project(x: F32) -> F64:
    """G q of the last axis, exact integers: q is x in steps of max |x| / 127, rounded; zeros for next to nothing."""
    peak = np.max(np.abs(x), axis=-1, keepdims=True)
    known = peak >= np.float32(2.0**-100)
    inverse = np.where(known, np.float32(127) / np.where(known, peak, np.float32(1)), np.float32(0))
    g = projection(x.shape[-1]).astype(np.float64)
    out: F64 = np.rint(x * inverse).astype(np.float64) @ g.T
    return out


def qjl_quantize(x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, book: Codebook) -> tuple[Codes, F32]:
    """x float32 [n, 64, d] -> codes [n, 64, d], scales float32 [n, 64, 2].

    The low bits of a code are the Lloyd-Max code, the bit above them is set where the projected residual is not
    negative. The second scale is the root mean square of the residual, in the domain of the orthonormal rotation: it
    fits in fp16 wherever the values of x do.
    """
    d = x.shape[-1]
    rotated = to_rotated(x, mean)
    codes, scale = lloyd_max_code(rotated, rule, search, book)
    step = np.where(rotated.live, scale, np.float32(0)) * np.float32(np.sqrt(d))
    residual = rotated.y - step * book.levels[codes].astype(np.float32)
    size = np.sqrt(lanes16_sum(residual * residual)[..., None]) * np.float32(1 / d)
    signs = ((project(residual) >= 0) | ~rotated.live).astype(np.uint8)
    scales = np.concatenate((rotated.stored(scale), rotated.stored(size)), axis=-1)
    return codes | signs << np.uint8(book.bits), scales


def qjl_residual(signs: Codes, sizes: F64) -> F64:
    """The decoded residuals of sign bits [n, 64, d] and second scales [n, 64, 1], in the rotated domain."""
    g = projection(signs.shape[-1]).astype(np.float64)
    s = g / np.sqrt(np.mean(g**2))
    out: F64 = math.sqrt(math.pi / 2 / len(s)) * sizes * ((2.0 * signs - 1.0) @ s)
    return out
