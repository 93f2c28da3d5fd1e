"""What the rotated codecs share: vectors of a tile in the rotated domain, the mean of a tile, and the scale rules.

    x -> x' = x 2^-e -> y = sqrt(d) R x' (- mean) -> z = y / r, close to N(0, 1) -> integer levels q of the codec
                                                          scale rule (y, q) -> scale 2^e

Float32, and the order of operations is the specification (see `quantize`). Source: TurboQuant (arXiv
2504.19874), algorithm 1; the scale rules are those of DRIVE and EDEN (arXiv 2105.08339, 2108.08842).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .hadamard import hadamard_transform
from .normalise import lanes16_sum, normalise
from .rotation import signs

__all__ = [
    "GAINS",
    "SCALE_RULES",
    "Match",
    "Mean",
    "Rotated",
    "average_of",
    "match",
    "mean_levels",
    "mean_of",
    "squared_error",
    "to_rotated",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Codes = NDArray[np.uint8]
Mean = tuple[NDArray[np.int8], NDArray[np.float16]]
"""Means of tiles in the rotated domain: levels int8 [n, d] and their scales float16 [n]."""

GAINS = tuple(np.float32(g) for g in (0.88, 0.92, 0.96, 1.04, 1.08, 1.12))
"""What the search of the encode scale multiplies z by, besides 1."""


class Rotated(NamedTuple):
    """Vectors [n, 64, d] in the rotated domain; all fields but y have a last axis of length 1."""

    y: F32  # sqrt(d) R x', less the mean
    n2: F32  # <y, y> / d; 1 where not live
    r: F32  # sqrt(n2)
    e: NDArray[np.int32]
    live: NDArray[np.bool_]  # not all zeros

    def z(self, gain: np.float32) -> F32:
        """Coordinates for the quantizer, close to N(0, 1); zeros where not live."""
        inv = np.where(self.live, np.float32(1) / self.r, np.float32(0))
        return (self.y * inv) * gain

    def stored(self, scale: F32) -> F32:
        """scale * 2^e, 0 where not live: what is stored of the scale of x'."""
        with np.errstate(over="ignore", under="ignore"):  # infinite: refused by quantize(); zero: fine
            return np.where(self.live, np.ldexp(scale, self.e), np.float32(0))


def to_rotated(x: F32, mean: Mean | None) -> Rotated:
    """x float32 [n, 64, d] to the rotated domain, less the mean of each tile if there are means."""
    d = x.shape[-1]
    if mean is None:
        scaled, e, live = normalise(x)
        n2 = np.where(live, lanes16_sum(scaled * scaled)[..., None], np.float32(1))
        return Rotated(hadamard_transform(signs(d) * scaled), n2, np.sqrt(n2), e, live)
    step = mean[1].astype(np.float32)[:, None, None]
    # One power of two for the whole tile, so that its vectors and the mean are on one scale.
    peak = np.maximum(np.max(np.abs(x), axis=(1, 2), keepdims=True), step)
    e = np.frexp(np.where(peak == 0, np.float32(1), peak))[1] - np.int32(1)
    scaled = np.ldexp(x, -e)
    unit = np.ldexp(step, -e) * np.float32(np.sqrt(d))
    y = hadamard_transform(signs(d) * scaled) - unit * mean[0].astype(np.float32)[:, None, :]
    n2 = lanes16_sum(y * y)[..., None] * np.float32(1 / d)
    live = n2 > 0
    n2 = np.where(live, n2, np.float32(1))
    return Rotated(y, n2, np.sqrt(n2), np.broadcast_to(e, n2.shape), live)


def average_of(x: F32) -> tuple[F32, NDArray[np.int32], NDArray[np.bool_]]:
    """(mean, e, live) of tiles float32 [n, 64, d]: of vectors x 2^-e that are not all zeros; live: there are any."""
    tokens = np.count_nonzero(np.any(x != 0, axis=-1), axis=1)
    peak = np.max(np.abs(x), axis=(1, 2))
    live = tokens > 0
    e = np.frexp(np.where(live, peak, np.float32(1)))[1] - np.int32(1)
    scaled = np.ldexp(x, -e[:, None, None])
    total = np.zeros((len(x), x.shape[-1]), np.float32)
    for t in range(x.shape[1]):
        total = total + scaled[:, t]
    share = np.float32(1) / np.maximum(tokens, 1).astype(np.float32)
    return total * share[:, None], e, live


def mean_levels(
    y: F32, e: NDArray[np.int32], live: NDArray[np.bool_], norm: np.float32
) -> tuple[NDArray[np.int8], F32]:
    """Levels int8 [n, d] and scales float32 [n] of means y [n, d]; y * norm * 2^e is in the rotated domain."""
    top = np.max(np.abs(y), axis=-1)
    live = live & (top >= np.float32(2.0**-100))
    step = np.where(live, top, np.float32(127)) / np.float32(127)
    inv = np.float32(1) / step
    levels = np.where(live[:, None], np.rint(y * inv[:, None]), np.float32(0)).astype(np.int8)
    with np.errstate(over="ignore", under="ignore"):
        scale = np.ldexp(step * norm, e)
    return levels, np.where(live, scale, np.float32(0))


def mean_of(x: F32) -> tuple[NDArray[np.int8], F32]:
    """Means of tiles float32 [n, 64, d], of the vectors that are not all zeros (padding is), in the rotated domain.

    Returns levels int8 [n, d] and scales float32 [n], which may exceed fp16.
    """
    d = x.shape[-1]
    average, e, live = average_of(x)
    return mean_levels(hadamard_transform(signs(d) * average), e, live, np.float32(1 / np.sqrt(d)))


class Match(NamedTuple):
    """What a scale rule may use of a vector: its code word q are integer levels, times `unit` near N(0, 1)."""

    n2: F32
    r: F32
    xc: F32  # <R x', q>
    cc: F32  # <q, q>: an integer below 2^24, so exact
    unit: float
    d: int


def match(x: Rotated, q: NDArray[np.int8], unit: float) -> Match:
    """The match of vectors with their levels int8 [n, 64, d]."""
    d = q.shape[-1]
    cc = np.maximum(np.sum(q.astype(np.int32) ** 2, axis=-1, keepdims=True), 1).astype(np.float32)
    xc = lanes16_sum(x.y * q.astype(np.float32))[..., None] * np.float32(1 / np.sqrt(d))
    return Match(x.n2, x.r, xc, cc, unit, d)


def squared_error(scale: F32, m: Match) -> F32:
    """|x' - scale q|^2 - |x'|^2."""
    error = (scale * m.cc - (m.xc + m.xc)) * scale
    return error.astype(np.float32, copy=False)


def _stored(m: Match) -> F32:
    """The norm of x, as TurboQuant stores it: the centroids at their nominal size."""
    return m.r * np.float32(m.unit / np.sqrt(m.d))


def _norm(m: Match) -> F32:
    """norm(x) / norm(c): the decoded vector has the norm of x."""
    root: F32 = np.sqrt(m.cc)
    return m.r / root


def _mse(m: Match) -> F32:
    """<x, c> / <c, c>: the least squared error. A code word that points away from x gets 0."""
    ahead: F32 = np.maximum(m.xc, np.float32(0))
    return ahead / m.cc


def _unbiased(m: Match) -> F32:
    """<x, x> / <x, c>: <x, decoded x> = <x, x>, no shrink of inner products (EDEN, arXiv 2108.08842).

    There is no such scale for a code word that points away from x; it gets that of `norm`.
    """
    ahead = m.xc > 0
    return np.where(ahead, m.n2 / np.where(ahead, m.xc, np.float32(1)), _norm(m))


SCALE_RULES: dict[str, Callable[[Match], F32]] = {
    "stored": _stored,
    "norm": _norm,
    "mse": _mse,
    "unbiased": _unbiased,
}
"""Scale rules; the position in the table is the rule's number in a codec code."""
