"""The codecs of KIVI: asymmetric round-to-nearest, keys per channel, values per token (arXiv 2402.02750).

x ~ zero + step * code, zero the smallest value of a group and step its range / (2^bits - 1), both fp16. A group of
keys is 32 tokens of one channel, a group of values 32 dims of one token (fewer in the last block of a head size that
is no multiple of 32). Key vectors of zeros, which padding is, belong to no group; they take the nearest level.

Float32, and the order of operations is the specification (see `quantize`).
"""

import numpy as np
from numpy.typing import NDArray

from .blocks import from_blocks, in_blocks
from .normalise import normalise
from .rotated import Mean

__all__ = ["GROUP", "kivi_dequantize", "kivi_quantize", "kivi_rows", "kivi_token"]

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

GROUP = 32
"""Values that share a step and a zero."""


def kivi_rows(d: int, side: str) -> int:
    """Rows of 64 fp16: steps and zeros, of d channels in two groups of tokens, or of the blocks of 64 tokens."""
    return d // 16 if side == "key" else 2 * -(-d // GROUP)


def _groups(x: F32, members: Flags, axis: int, bits: int) -> tuple[Codes, F32, F32]:
    """Codes of x, whose groups run along `axis`; their steps and zeros, that axis being 1. Steps below 2^-100 are 0."""
    top = np.float32(2**bits - 1)
    low = np.min(x, axis=axis, keepdims=True, initial=np.inf, where=members)
    high = np.max(x, axis=axis, keepdims=True, initial=-np.inf, where=members)
    some = np.any(members, axis=axis, keepdims=True)
    low = np.where(some, low, np.float32(0)) + np.float32(0)  # -0 becomes 0
    step = (np.where(some, high, np.float32(0)) - low) / top
    level = step >= np.float32(2.0**-100)
    inv = np.where(level, np.float32(1) / np.where(level, step, np.float32(1)), np.float32(0))
    codes = np.clip(np.rint((x - low) * inv), np.float32(0), top)
    return codes.astype(np.uint8), np.where(level, step, np.float32(0)), low


def kivi_quantize(x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, bits: int) -> tuple[Codes, F32]:
    """x float32 [n, 64, d] -> codes [n, 64, d] and the rows of steps, then those of zeros, [n, 64, rows].

    The power of two is taken out of a block of values, and of the keys of 32 tokens together.
    """
    n, tokens, d = x.shape
    if side == "value":
        scaled, e, _ = normalise(in_blocks(x))
        members = in_blocks(np.ones(x.shape, np.uint8)) == 1
        codes, *found = _groups(scaled, members, -1, bits)
        return from_blocks(codes, d), np.concatenate([np.ldexp(each, e)[..., 0] for each in found], axis=-1)
    groups = x.reshape(n, tokens // GROUP, GROUP, d)
    scaled, e, _ = normalise(groups.reshape(n, tokens // GROUP, GROUP * d))
    members = np.any(groups != 0, axis=-1, keepdims=True)
    codes, *found = _groups(scaled.reshape(groups.shape), members, 2, bits)
    flat = np.stack([np.ldexp(each[:, :, 0], e) for each in found], axis=1)  # [n, steps or zeros, group, channel]
    return codes.reshape(x.shape), np.swapaxes(flat.reshape(n, kivi_rows(d, side), tokens), 1, 2)


def _parts(scales: NDArray[np.float64], side: str, d: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and zeros [n, 64, d] of the elements, of rows [n, 64, rows]."""
    n, tokens, rows = scales.shape
    if side == "value":
        both = np.repeat(scales.reshape(n, tokens, 2, rows // 2), GROUP, axis=-1)
        return both[:, :, 0, :d], both[:, :, 1, :d]
    flat = np.swapaxes(scales, 1, 2).reshape(n, 2, tokens // GROUP, d)
    both = np.repeat(flat, GROUP, axis=2)
    return both[:, 0], both[:, 1]


def kivi_dequantize(codes: Codes, scales: NDArray[np.float16], side: str) -> NDArray[np.float64]:
    """zero + step * code, of codes [n, 64, d] and rows [n, 64, rows]."""
    step, zero = _parts(scales.astype(np.float64), side, codes.shape[-1])
    return zero + step * codes


def kivi_token(x: F32, where: NDArray[np.intp]) -> NDArray[np.intp]:
    """The key [..., token] of x [..., tokens, d] to name where a row of scales [..., token, row] does not fit: the
    largest of its group and channel."""
    *lead, slot, row = where.tolist()
    d = x.shape[-1]
    group, channel = divmod((row * 64 + slot % 64) % (2 * d), d)
    first = slot // 64 * 64 + group * GROUP
    return np.array([*lead, first + int(np.argmax(np.abs(x[(*lead, slice(first, first + GROUP), channel)])))])
