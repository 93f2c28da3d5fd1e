"""The float32 encoder and the decoder of the defaults: vectors to codes and scales, and back.

The order of operations of the encoder is the format's specification, so every step below is one PyTorch
operation with one float32 rounding: products and sums are never fused, divisors are tensors (a CUDA division
by a Python number multiplies by a rounded reciprocal), and powers of two are built from their bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import SIDES, hadamard_matrix, order_of, signs
from ._tables import Codec


def hadamard(y: Tensor, inverse: bool = False) -> Tensor:
    """Unnormalised H_d of the last axis, d = m * 2^a (H_d^T if ``inverse``): stages with stride 2^a/2, ..., 1, then
    the terms of H_m, added one after the other."""
    shape, d = y.shape, y.shape[-1]
    m = order_of(d)
    stride = d // m // 2
    while stride >= 1:
        pairs = y.reshape(-1, 2, stride)
        a, b = pairs[:, 0], pairs[:, 1]
        y = torch.stack((a + b, a - b), dim=1)
        stride //= 2
    if m > 1:
        signs_of_m = torch.tensor(hadamard_matrix(m).tolist(), dtype=torch.float32, device=y.device)
        columns = (signs_of_m if inverse else signs_of_m.T)[:, :, None]
        rows = y.reshape(-1, m, 1, d // m)
        y = columns[0] * rows[:, 0]
        for s in range(1, m):
            y = y + columns[s] * rows[:, s]
    return y.reshape(shape)


def sign_vector(d: int, like: Tensor) -> Tensor:
    """The signs of the rotation [d], in float32."""
    return torch.tensor(signs(d).tolist(), dtype=torch.float32, device=like.device)


def rotate(x: Tensor, inverse: bool) -> Tensor:
    """R x = H_d (s * x) / sqrt(d), or its inverse R^T, of float32 vectors x [..., d]."""
    d = x.shape[-1]
    s = sign_vector(d, x)
    unit = 1.0 / math.sqrt(d)
    if inverse:
        return s * (hadamard(x, inverse=True) * unit)
    return hadamard(s * x) * unit


def _power(e: Tensor) -> Tensor:
    """2^e as float32, exactly, for int32 e in -149..127 (ldexp may compute a power and round)."""
    normal = (e + 127) << 23
    subnormal = torch.ones_like(e) << (e + 149).clamp(0, 22)
    return torch.where(e >= -126, normal, subnormal).view(torch.float32)


def _exponent(m: Tensor) -> Tensor:
    """The int32 e with 2^e <= m < 2^(e+1), of positive finite float32 m, subnormal ones included."""
    small = m < 2.0**-126
    bits = torch.where(small, m * 2.0**32, m).view(torch.int32)
    return (bits >> 23) - 127 - torch.where(small, 32, 0).to(torch.int32)


def _normalise(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """x * 2^-e and 2^e, for e the exponent of m [...]; a zero m counts as 1."""
    e = _exponent(torch.where(m == 0, torch.ones_like(m), m))
    first = torch.clamp(-e, max=127)  # 2^128 and above are no float32, so a second, exact step
    return x * _power(first)[..., None] * _power(-e - first)[..., None], _power(e)


def _lanes16(t: Tensor) -> Tensor:
    """The sum of the last axis in the format's order: 16 lanes, then a tree."""
    rows = t.reshape(*t.shape[:-1], t.shape[-1] // 16, 16)
    acc = rows[..., 0, :]
    for j in range(1, rows.shape[-2]):
        acc = acc + rows[..., j, :]
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half : 2 * half]
    return acc[..., 0]


def _sqrt(t: Tensor) -> Tensor:
    """The correctly rounded square root. PyTorch's own, in float32 on CPU, may be off in the last bit; no
    square root of a float32 lies so near to a tie that an error in the last bits of float64 could matter."""
    return torch.sqrt(t.to(torch.float64)).to(torch.float32)


def _constant(value: float, like: Tensor) -> Tensor:
    """A float64 number rounded once to float32, as a tensor."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).to(like.device)


def _encode_rotated(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    family, d = codec.family, x.shape[-1]
    half = len(family.levels) // 2
    m = x.abs().amax(dim=-1)
    zero = m == 0
    xs, power = _normalise(x, m)
    n2 = _lanes16(xs * xs)
    n2 = torch.where(zero, torch.ones_like(n2), n2)
    r = _sqrt(n2)
    y = hadamard(sign_vector(d, x) * xs)
    z = y * (torch.ones_like(r) / r)[..., None]
    size = z.abs()
    magnitude = torch.zeros_like(z, dtype=torch.int32)
    for threshold in family.thresholds:
        magnitude += size > threshold
    codes = torch.where(torch.signbit(z), half - 1 - magnitude, half + magnitude)
    codes = torch.where(zero[..., None], half, codes)
    q = torch.tensor(family.levels, dtype=torch.float32, device=x.device)[codes]
    cc = (q.to(torch.int32) ** 2).sum(dim=-1, dtype=torch.int64).to(torch.float32)
    if codec.rule == "stored":
        scale = r * _constant(family.unit / math.sqrt(d), x)
    elif codec.rule == "norm":
        scale = r / _sqrt(cc)
    else:
        xc = _lanes16(y * q) * _constant(1.0 / math.sqrt(d), x)
        scale = xc / cc if codec.rule == "mse" else n2 / xc
    scale = torch.where(zero, torch.zeros_like(scale), scale * power)
    return codes.to(torch.uint8), scale[..., None]


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """[..., d] to [..., blocks, size]; a short last block is filled up with zeros."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.reshape(*x.shape[:-1], -1, size)


def _from_blocks(blocks: Tensor, d: int) -> Tensor:
    """The inverse of ``_in_blocks``."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :d].contiguous()


def _encode_q8_0(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _in_blocks(x, 32)
    m = blocks.abs().amax(dim=-1)
    zero = m == 0
    xs, power = _normalise(blocks, m)
    m1 = torch.where(zero, torch.ones_like(m), xs.abs().amax(dim=-1))
    step = m1 / torch.full_like(m1, 127.0)
    codes = torch.round(xs * (torch.ones_like(step) / step)[..., None]) + 128.0
    scale = torch.where(zero, torch.zeros_like(step), step * power)
    return _from_blocks(codes.to(torch.uint8), x.shape[-1]), scale


def _encode_q4_0(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _in_blocks(x, 32)
    size = blocks.abs()
    first = size.argmax(dim=-1, keepdim=True)  # the first of equals
    m = size.amax(dim=-1)
    zero = m == 0
    xs, power = _normalise(blocks, m)
    peak = xs.gather(-1, first)[..., 0]
    peak = torch.where(zero, torch.ones_like(peak), peak)
    step = peak / torch.full_like(peak, -8.0)
    codes = torch.trunc(xs * (torch.ones_like(step) / step)[..., None] + 8.5).clamp(max=15.0)
    scale = torch.where(zero, torch.zeros_like(step), step * power)
    return _from_blocks(codes.to(torch.uint8), x.shape[-1]), scale


def check_finite(x: Tensor, side: int) -> None:
    """ValueError, naming the token, if x [..., tokens, d] has NaN or infinities."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"NaN or Inf in the {SIDES[side]} of token {at[-2]}: dim {at[-1]} is {float(x[tuple(at)])} "
            "(KVPACK_NONFINITE=zero replaces and counts)"
        )


def quantize(x: Tensor, codec: Codec, side: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., tokens, d] and scales float16 [..., tokens, nsb] of float32 x [..., tokens, d].

    Not for `exact`, and not for an empty x. ValueError, naming the token, if x is not finite, or a scale
    is not finite in float16.
    """
    check_finite(x, side)
    if codec.family.rotated:
        codes, scale = _encode_rotated(x, codec)
    else:
        codes, scale = _encode_q8_0(x) if codec.family.name == "q8_0" else _encode_q4_0(x)
    half = scale.to(torch.float16)
    finite = torch.isfinite(half)
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{SIDES[side]} of token {at[-2]} has the scale {float(scale[tuple(at)])}, "
            "which is not finite in float16; allowed: at most 65504"
        )
    return codes, half


def dequantize(codes: Tensor, scales: Tensor, codec: Codec) -> Tensor:
    """Float32 vectors [..., tokens, d] of codes and scales as ``quantize`` gives them. Not for `exact`."""
    family = codec.family
    if family.rotated:
        levels = torch.tensor(family.levels, dtype=torch.float32, device=codes.device)
        return rotate(scales.to(torch.float32) * levels[codes.to(torch.int64)], inverse=True)
    middle = float(1 << (family.bits - 1))
    blocks = _in_blocks(codes.to(torch.float32), family.scale_block) - middle
    return _from_blocks(blocks * scales.to(torch.float32)[..., None], codes.shape[-1])
