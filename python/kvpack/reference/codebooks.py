"""Codebooks of the Lloyd-Max codecs (tq1 to tq4, tqr3): int8 levels, units, thresholds, and their derivation.

After the rotation, every coordinate of a vector divided by its root mean square is close to N(0, 1). A
codebook is therefore the Lloyd-Max quantizer of N(0, 1), one table for every head size (it costs about 0.1 %
of distortion against a table of the sphere at d = 128). Its centroids are stored as `int8 level * unit`, so
that the read path can multiply int8 by int8:

    code             0  ...  2^(b-1)-1 | 2^(b-1)  ...  2^b - 1        ascending level
    level        -L_max ...       -L_1 |    +L_1  ...  +L_max         integer, symmetric
    centroid             level * unit                                 in units of the standard deviation
    threshold                     between neighbouring levels, at the middle; the positive ones are listed

The integers are a format definition. The unit of each table was optimised after the rounding to integers;
`lloyd_max` and `distortion` prove what the rounding costs (under 0.06 % of distortion).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODEBOOKS", "Codebook", "distortion", "lloyd_max"]


@dataclass(frozen=True)
class Codebook:
    """A symmetric scalar codebook.

    positive: the positive int8 levels, ascending. unit: centroid of a level divided by the level.
    """

    positive: tuple[int, ...]
    unit: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.positive).bit_length()

    @property
    def levels(self) -> NDArray[np.int8]:
        """int8 [2^bits], ascending; code i stands for levels[i]."""
        return np.array([-level for level in reversed(self.positive)] + list(self.positive), np.int8)

    @property
    def centroids(self) -> NDArray[np.float64]:
        """float64 [2^(bits-1)]: the positive centroids, in standard deviations."""
        return np.array(self.positive, np.float64) * self.unit

    @property
    def thresholds(self) -> NDArray[np.float32]:
        """float32 [2^(bits-1) - 1]: the positive decision thresholds; products in float64, rounded once."""
        return np.array([(low + high) / 2 * self.unit for low, high in pairwise(self.positive)], np.float32)


CODEBOOKS: dict[str, Codebook] = {
    "tq1": Codebook((100,), 0.00797885),
    "tq2": Codebook((30, 100), 0.015104),
    "tq3": Codebook((10, 31, 55, 88), 0.024448),
    "tq4": Codebook((5, 15, 25, 36, 48, 62, 79, 104), 0.026219),
    # Two bits, then the sign of the residual: the levels of two bits (18 and 60 here) -+ the mean size of a residual,
    # E|z - c(z)| = 0.2753. A constant will do, for after the rotation the residuals of all vectors look alike; the
    # distortion is that of two bits less 0.2753^2.
    "tqr3": Codebook((7, 29, 49, 71), 0.025176),
}
"""The codebook of each codec."""


def _cells(centroids: Sequence[float]) -> list[tuple[float, float]]:
    """(probability, first moment) under N(0, 1) of each positive centroid's cell; borders at midpoints."""
    inner = [(low + high) / 2 for low, high in pairwise(centroids)]
    borders = [0.0, *inner, math.inf]

    def above(t: float) -> float:  # P(z > t); erfc keeps its relative precision in the tail
        return 0.5 * math.erfc(t / math.sqrt(2))

    def density(t: float) -> float:
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    return [(above(a) - above(b), density(a) - density(b)) for a, b in pairwise(borders)]


def lloyd_max(bits: int) -> list[float]:
    """The 2^(bits-1) positive centroids of the optimal scalar quantizer of N(0, 1), by Lloyd's iteration.

    Source: Max 1960, Lloyd 1982; TurboQuant (arXiv 2504.19874) section 3, in the limit of a large head size.
    """
    centroids = [4 * (i + 0.5) / 2 ** (bits - 1) for i in range(2 ** (bits - 1))]
    for _ in range(100_000):
        improved = [moment / probability for probability, moment in _cells(centroids)]
        step = max(abs(new - old) for new, old in zip(improved, centroids, strict=True))
        centroids = improved
        if step < 1e-13:
            break
    return centroids


def distortion(centroids: Sequence[float]) -> float:
    """E[(z - quantized z)^2] for z in N(0, 1), of a symmetric codebook with these positive centroids
    (ascending) and decision thresholds at the midpoints. In closed form."""
    cells = _cells(centroids)
    gain = sum(2 * c * moment - c * c * probability for c, (probability, moment) in zip(centroids, cells, strict=True))
    return 1 - 2 * gain
