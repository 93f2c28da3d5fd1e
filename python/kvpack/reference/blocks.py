"""The codecs of ggml: blocks of 32 values, each with its scale; rq8_0 and rq4_0 are the same after the rotation.

Of a head size that is no multiple of 32, the last block has fewer values, and its own scale.

Float32, and the order of operations is the specification (see `quantize`). They have no scale rules. Source: ggml,
quantize_row_q8_0_ref, quantize_row_q4_0_ref and quantize_row_q5_0_ref (q8_0 rounds ties away from zero there, to
even here).
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .normalise import normalise
from .rotated import Mean, to_rotated

__all__ = ["block_levels", "blocks_quantize", "rotated_blocks_quantize"]

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]
Array = TypeVar("Array", F32, Codes)


def in_blocks(x: Array) -> Array:
    """[..., d] -> [..., ceil(d/32), 32]; a short last block is filled up with zeros, which change no maximum."""
    filled = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)])
    return filled.reshape(*x.shape[:-1], filled.shape[-1] // 32, 32)


def from_blocks(blocks: Array, d: int) -> Array:
    """The inverse: [..., ceil(d/32), 32] -> [..., d]."""
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * 32)[..., :d]


def _steps(x: F32, bits: int) -> tuple[Codes, F32, NDArray[np.int32], NDArray[np.bool_]]:
    """Codes [..., d], and steps, exponents and liveness of the blocks [..., blocks, 1].

    8 bits: a step is max|x| / 127, code 128 is zero. Fewer: the element of the largest magnitude (the first of
    them) gets code 0, that is -2^(bits-1) steps; steps may be negative.
    """
    scaled, e, live = normalise(in_blocks(x))
    if bits == 8:
        peak = np.where(live, np.max(np.abs(scaled), axis=-1, keepdims=True), np.float32(127))
        step = peak / np.float32(127)
        inv = np.float32(1) / step
        codes = np.rint(scaled * inv) + np.float32(128)  # rint: ties to even
    else:
        middle = np.float32(1 << (bits - 1))
        first = np.argmax(np.abs(scaled), axis=-1, keepdims=True)
        extreme = np.where(live, np.take_along_axis(scaled, first, axis=-1), np.float32(-middle))
        step = extreme / np.float32(-middle)
        inv = np.float32(1) / step
        codes = np.minimum(np.trunc(scaled * inv + np.float32(middle + 0.5)), np.float32(2 * middle - 1))
    return from_blocks(codes.astype(np.uint8), x.shape[-1]), step.astype(np.float32, copy=False), e, live


def blocks_quantize(x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, bits: int) -> tuple[Codes, F32]:
    """x float32 [n, 64, d] -> codes [n, 64, d], scales float32 [n, 64, ceil(d/32)]."""
    codes, step, e, live = _steps(x, bits)
    return codes, np.where(live, np.ldexp(step, e), np.float32(0))[..., 0]


def rotated_blocks_quantize(
    x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, bits: int
) -> tuple[Codes, F32]:
    """As `blocks_quantize`, of the rotated vectors."""
    rotated = to_rotated(x, mean)
    codes, step, e, live = _steps(rotated.y, bits)
    with np.errstate(over="ignore", under="ignore"):
        scale = np.ldexp(step * np.float32(1 / np.sqrt(x.shape[-1])), e + rotated.e[..., None])
    return codes, np.where(live, scale, np.float32(0))[..., 0]


def block_levels(codes: Codes, side: str, *, bits: int) -> NDArray[np.int8]:
    """code - 2^(bits-1), of codes [n, 64, d]."""
    return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
