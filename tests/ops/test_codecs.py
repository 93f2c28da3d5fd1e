"""encode, decode and rotate against the reference: identical bytes, close values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpack import ops, reference

from .helpers import DTYPES, Implementation, code, expected, numpy

RULED = [
    ("q8_0", None),
    ("q4_0", None),
    *((name, rule) for name in ("tq2", "tq3", "tq4") for rule in reference.SCALE_RULES),
]
SIDES = ("key", "value")


def hard_vectors(d: int) -> Tensor:
    """Vectors at the edges of the encoder: float32 [tokens, d]."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn((100, d), generator=generator)
    x *= torch.logspace(-8, 4, 100)[:, None]
    x[0] = 0.0
    x[1] = -0.0
    x[2] = 1e-42 * torch.arange(d)  # subnormal
    x[3] = torch.finfo(torch.float32).tiny
    x[4] = 0.0
    x[4, d // 2] = -3.0  # a spike: the rotated values are all equal
    x[5] = 1.0  # ties everywhere
    x[6] = torch.where(torch.arange(d) % 2 == 0, 0.5, -0.5)
    x[7] = 1e-30
    x[7, 3] = 1000.0  # the rest vanishes against the maximum
    x[8] = 65000.0 * torch.linspace(-1, 1, d)
    x[9] = torch.arange(d) / 128.0  # exact halves, for ties in rounding
    x[10] = torch.round(x[20] * 8) / 8
    x[11, 1:] = 0.0
    x[11, 0] = 2.0**-149
    x[12] = torch.arange(d) % 32 - 16.0  # the largest magnitude occurs once per block, as a negative value
    x[13] = torch.tensor([4.0, -4.0]).repeat(d // 2)  # and here at both signs
    return x


@pytest.mark.parametrize("d", reference.HEAD_SIZES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "rule"), RULED)
def test_encode_gives_the_bytes_of_the_reference(
    impl: Implementation, name: str, rule: str | None, side: str, d: int
) -> None:
    x = hard_vectors(d)
    got = impl.encode(x, code(name, scale=rule), SIDES.index(side))
    want = reference.encode(x.numpy(), name, scale=rule, side=side)
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize(("name", "rule"), RULED)
def test_many_vectors(impl: Implementation, name: str, rule: str | None) -> None:
    """A last bit of float32 shows in one scale of some thousands only."""
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16).float()
    got = impl.encode(x, code(name, scale=rule), 0)
    np.testing.assert_array_equal(got.numpy(), reference.encode(x.numpy(), name, scale=rule, side="key"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", reference.names())
def test_dtypes_strides_and_leading_dims(impl: Implementation, name: str, side: str, dtype: str) -> None:
    x = torch.randn(2, 130, 3, 64, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype]).transpose(1, 2)
    number = SIDES.index(side)
    data = impl.encode(x, code(name, dtype), number)
    assert data.shape == (2, 3, 3, ops.side_bytes(code(name, dtype), 64, number))
    want = reference.encode(numpy(x if name == "exact" else x.float()), name, side=side)
    np.testing.assert_array_equal(data.numpy(), want)
    filled = torch.cat((x, x.new_zeros(2, 3, 62, 64)), dim=2)
    for tokens in (130, 192, 129):
        for target in DTYPES.values():
            y = impl.decode(data, code(name, dtype), number, tokens, 64, target)
            assert y.shape == (2, 3, tokens, 64)
            assert y.dtype == target
            assert y.is_contiguous()
            close = torch.from_numpy(expected(filled, name, side, dtype)[..., :tokens, :])
            torch.testing.assert_close(y.double(), close, rtol=2 * torch.finfo(target).eps, atol=2e-6)


def test_exact_keeps_every_bit(impl: Implementation) -> None:
    bits = torch.randint(-(2**31), 2**31, (70, 64), generator=torch.Generator().manual_seed(2))
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.where(torch.isfinite(x), x, -0.0)
    for side in (0, 1):
        y = impl.decode(impl.encode(x, code("exact"), side), code("exact"), side, 70, 64, torch.float32)
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_no_tokens(impl: Implementation) -> None:
    for name in reference.names():
        data = impl.encode(torch.empty(2, 0, 128), code(name), 0)
        assert data.shape == (2, 0, ops.side_bytes(code(name), 128, 0))
        assert impl.decode(data, code(name), 0, 0, 128, torch.float32).shape == (2, 0, 128)


def test_decode_of_bytes_that_lie_inside_others(impl: Implementation) -> None:
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))
    data = impl.encode(x, code("tq4"), 0)
    wide = torch.zeros(3, 2, data.shape[-1] + 1, dtype=torch.uint8)
    wide[:, 1:, 1:] = data
    strided = wide[:, 1:, 1:]  # not contiguous, and at an odd address
    plain = impl.decode(data, code("tq4"), 0, 64, 64, torch.float32)
    assert torch.equal(impl.decode(strided, code("tq4"), 0, 64, 64, torch.float32), plain)


@pytest.mark.parametrize("d", reference.HEAD_SIZES)
def test_rotate(impl: Implementation, d: int) -> None:
    x = torch.randn(3, d, 5, generator=torch.Generator().manual_seed(4)).transpose(1, 2)
    for inverse in (False, True):
        got = impl.rotate(x, inverse)
        assert got.is_contiguous()
        want = reference.rotate(x.numpy(), inverse=inverse)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=2e-6)
        for dtype in (torch.float16, torch.bfloat16):
            half = impl.rotate(x.to(dtype), inverse)
            assert half.dtype == dtype
            torch.testing.assert_close(half, impl.rotate(x.to(dtype).float(), inverse).to(dtype))
    torch.testing.assert_close(impl.rotate(impl.rotate(x, False), True), x.contiguous(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", reference.names()[1:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(impl: Implementation, name: str, bad: float) -> None:
    x = torch.ones(2, 70, 64)
    x[1, 66, 5] = bad
    with pytest.raises(ValueError, match=r"value.*66"):
        impl.encode(x, code(name), 1)


@pytest.mark.parametrize("name", reference.names()[1:])
def test_scales_beyond_float16(impl: Implementation, name: str) -> None:
    x = torch.ones(70, 64)
    x[65] = 3e38
    with pytest.raises(ValueError, match=r"key.*65"):
        impl.encode(x, code(name), 0)


def test_sizes_are_those_of_the_reference() -> None:
    for name in reference.names():
        for dtype in DTYPES:
            for d in reference.HEAD_SIZES:
                for side in SIDES:
                    got = ops.side_bytes(code(name, dtype), d, SIDES.index(side))
                    assert got == reference.side_bytes(name, d, side, dtype)
                    assert got % 64 == 0
    layout = ops.layout(code("tq4"), 128, code("q8_0"), 64, 3)
    key, value = reference.sections("tq4", 128), reference.sections("q8_0", 64)
    assert ops.record_bytes(layout) == reference.record_bytes(key, value)
    assert ops.page_bytes(layout) == reference.page_bytes(key, value, 3)


def test_public_functions_are_the_operators() -> None:
    x = torch.randn(64, 64)
    data = ops.encode(x, code("tq4"), 0)
    assert torch.equal(data, torch.ops.kvpack.encode(x, code("tq4"), 0))
    y = ops.decode(data, code("tq4"), 0, tokens=64, head_dim=64, dtype=torch.float16)
    assert torch.equal(y, torch.ops.kvpack.decode(data, code("tq4"), 0, 64, 64, torch.float16))
    assert torch.equal(ops.rotate(x), torch.ops.kvpack.rotate(x, False))
    assert torch.equal(ops.rotate(x, inverse=True), torch.ops.kvpack.rotate(x, True))
