"""The plain codecs q8_0 and q4_0: blocks of 32 values, each with its scale. The values are those of ggml.

Of a head size that is no multiple of 32, the last block has fewer values, and its own scale.

Float32, and the order of operations is the specification (see `quantize`). They have no scale rules: `rule`
is not used. Source: ggml, quantize_row_q8_0_ref and quantize_row_q4_0_ref (q8_0 rounds ties away from zero
there, to even here).
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .normalise import normalise

__all__ = ["blocks_dequantize", "q4_0_quantize", "q8_0_quantize"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Codes = NDArray[np.uint8]
Array = TypeVar("Array", F32, F64, Codes)


def in_blocks(x: Array) -> Array:
    """[n, d] -> [n, ceil(d/32), 32]; a short last block is filled up with zeros, which change no maximum."""
    filled = np.pad(x, ((0, 0), (0, -x.shape[1] % 32)))
    return filled.reshape(len(x), filled.shape[1] // 32, 32)


def from_blocks(blocks: Array, d: int) -> Array:
    """The inverse: [n, ceil(d/32), 32] -> [n, d]."""
    return blocks.reshape(len(blocks), blocks.shape[1] * 32)[:, :d]


def q8_0_quantize(x: F32, rule: str) -> tuple[Codes, F32]:
    """x float32 [n, d] -> codes [n, d] in 1..255, scales float32 [n, ceil(d/32)]: a step is max|x| / 127."""
    scaled, e, live = normalise(in_blocks(x))
    peak = np.where(live, np.max(np.abs(scaled), axis=-1, keepdims=True), np.float32(127))
    step = peak / np.float32(127)
    inv = np.float32(1) / step
    codes = (np.rint(scaled * inv) + np.float32(128)).astype(np.uint8)  # rint: ties to even
    scale = np.where(live, np.ldexp(step, e), np.float32(0))
    return from_blocks(codes, x.shape[1]), scale[..., 0]


def q4_0_quantize(x: F32, rule: str) -> tuple[Codes, F32]:
    """x float32 [n, d] -> codes [n, d] in 0..15, scales float32 [n, ceil(d/32)], which may be negative: the element
    of the largest magnitude (the first of them) gets code 0, that is -8 steps."""
    scaled, e, live = normalise(in_blocks(x))
    first = np.argmax(np.abs(scaled), axis=-1, keepdims=True)
    extreme = np.where(live, np.take_along_axis(scaled, first, axis=-1), np.float32(-8))
    step = extreme / np.float32(-8)
    inv = np.float32(1) / step
    codes = np.minimum(np.trunc(scaled * inv + np.float32(8.5)), np.float32(15)).astype(np.uint8)
    scale = np.where(live, np.ldexp(step, e), np.float32(0))
    return from_blocks(codes, x.shape[1]), scale[..., 0]


def blocks_dequantize(codes: Codes, scales: F64, *, zero: int) -> F64:
    """scale * (code - zero): codes [n, d], scales [n, ceil(d/32)] -> float64 [n, d]."""
    steps = in_blocks(codes.astype(np.float64)) - zero
    return from_blocks(steps * scales[..., None], codes.shape[1])
