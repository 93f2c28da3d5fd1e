"""fp8: e4m3 codes with one fp16 scale for each vector, whose largest value becomes 448, the largest e4m3.

e4m3 (OCP, "e4m3fn"): sign, 4 bits of exponent (bias 7), 3 of mantissa; subnormals below 2^-6, no infinities, and a NaN
(0x7f, 0xff) that is never made. Float32, and the order of operations is the specification (see `quantize`).
"""

import numpy as np
from numpy.typing import NDArray

from .normalise import normalise
from .rotated import Mean

__all__ = ["e4m3", "e4m3_value", "fp8_quantize"]

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]

LARGEST = np.float32(448)
SMALLEST_NORMAL = np.float32(2.0**-6)


def e4m3(y: F32) -> Codes:
    """float32 to e4m3, to nearest even, larger magnitudes to 448. The sign stays, that of zeros too."""
    bits = y.view(np.uint32)
    size = np.minimum(bits & np.uint32(0x7FFFFFFF), LARGEST.view(np.uint32))
    normal = (size + np.uint32(0x7FFFF) + (size >> 20 & np.uint32(1)) >> 20) - np.uint32(960)
    subnormal = (size.view(np.float32) + np.float32(2**14)).view(np.uint32) & np.uint32(0xFF)  # in steps of 2^-9
    magnitude = np.where(size < SMALLEST_NORMAL.view(np.uint32), subnormal, normal)
    codes: Codes = (magnitude | bits >> 24 & np.uint32(0x80)).astype(np.uint8)
    return codes


def e4m3_value(codes: Codes, side: str) -> NDArray[np.float64]:
    """What codes stand for."""
    exponent, mantissa = codes >> 3 & 15, (codes & 7).astype(np.float64)
    magnitude = np.ldexp(mantissa + np.where(exponent, 8.0, 0.0), np.maximum(exponent, 1).astype(np.int32) - 10)
    values: NDArray[np.float64] = np.where(codes & 0x80, -magnitude, magnitude)
    return values


def fp8_quantize(x: F32, side: str, rule: str, search: bool, mean: Mean | None) -> tuple[Codes, F32]:
    """x float32 [n, 64, d] -> codes [n, 64, d], scales float32 [n, 64, 1]. Vectors of zeros: codes 0, scale 0."""
    scaled, e, live = normalise(x)
    step = np.where(live, np.max(np.abs(scaled), axis=-1, keepdims=True), LARGEST) / LARGEST
    inv = (np.float32(1) / step).astype(np.float32, copy=False)
    codes = e4m3(scaled * inv)
    return np.where(live, codes, np.uint8(0)), np.where(live, np.ldexp(step, e), np.float32(0))
