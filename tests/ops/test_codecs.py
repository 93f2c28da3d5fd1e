"""encode, decode and rotate against the reference: identical bytes, close values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpack import ops, reference

from .helpers import DEFAULT, DTYPES, Implementation, code, expected, numpy, reference_bytes

RULED = [
    f"{name}:scale={rule}" if rule else name
    for name, codec in reference.CODECS.items()
    for rule in (reference.SCALE_RULES if codec.scale_rules else ("",))
]
TRELLIS = [name for name, codec in reference.CODECS.items() if codec.stream]
TRELLIS_QUICK = ("norm", 64), ("mse", 80)  # of trellis codes, whose reference takes its time
SIDES = ("key", "value")


def quick(text: str, d: int) -> bool:
    """Whether the suite that is not full runs this codec and head size."""
    name, _, options = text.partition(":scale=")
    return name not in TRELLIS or (options, d) in TRELLIS_QUICK


def options_of(name: str) -> list[str]:
    """The codec with every combination of centre and search that is not the default."""
    searches = ("", ",search") if reference.CODECS[name].scale_rules else ("",)
    return [f"{name}:center={center}{search}" for center in ("none", "mean", "tile") for search in searches][1:]


OPTIONS = [text for name, codec in reference.CODECS.items() if codec.rotated for text in options_of(name)]
TRELLIS_OPTIONS_QUICK = ("tcq2:center=none,search", "tcq3:center=tile", "tcq1:center=mean")


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


def check_encode(impl: Implementation, x: Tensor, text: str, side: str) -> None:
    data, means = impl.encode(x, code(text), SIDES.index(side))
    want, wanted_means = reference_bytes(x, text, side)
    np.testing.assert_array_equal(means.numpy(), wanted_means)
    np.testing.assert_array_equal(data.numpy(), want)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("text", "d"),
    [
        pytest.param(text, d, marks=[] if quick(text, d) else pytest.mark.full)
        for text in RULED
        for d in reference.HEAD_SIZES
    ],
)
def test_encode_gives_the_bytes_of_the_reference(impl: Implementation, text: str, side: str, d: int) -> None:
    check_encode(impl, hard_vectors(d), text, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("text", "d"),
    [
        pytest.param(
            text,
            d,
            marks=[] if text in TRELLIS_OPTIONS_QUICK or (text[:3] != "tcq" and d in (64, 112)) else pytest.mark.full,
        )
        for text in OPTIONS
        for d in ((64,) if text in TRELLIS_OPTIONS_QUICK else (64, 96, 112, 128, 256))
    ],
)
def test_options_give_the_bytes_of_the_reference(impl: Implementation, text: str, side: str, d: int) -> None:
    """Two tiles of hard vectors, shifted by more than their size in one row, and zeros first in another."""
    x = hard_vectors(d)[: 66 if text[:3] == "tcq" else 100].repeat(3, 1, 1)
    x[1, 14:] += 3.0 * torch.linspace(-4, 4, d)
    x[2, :64] = 0.0
    check_encode(impl, x, text, side)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(name, marks=pytest.mark.full if name in TRELLIS[1:] else [])
        for name, codec in reference.CODECS.items()
        if codec.rotated
    ],
)
@pytest.mark.parametrize("center", ["mean", "tile"])
def test_means_of_many_tiles(impl: Implementation, text: str, center: str) -> None:
    """Nine tiles: three means of pages, of which a row that begins with five tiles of zeros has none in the first."""
    x = torch.randn(2, 530, 64, generator=torch.Generator().manual_seed(8)) + torch.linspace(-3, 3, 64)
    x[1, : 5 * 64] = 0.0
    full = f"{text}:center={center}"
    data, means = impl.encode(x, code(full), 0)
    maps = reference.map_bytes(text, 64)
    assert means.shape == (2, 9 if center == "tile" else 3, 66 + maps)
    np.testing.assert_array_equal(means.numpy(), reference.encode_means(x.numpy(), text, center))
    assert (means[1, 0] == 0).all()
    assert means[:, -1].any(dim=-1).all()
    back = impl.decode(data, means, code(full), 0, 530, 64, torch.float32)
    if center == "mean":
        assert torch.equal(means[0, 0], means[0, 2])
        assert torch.equal(means[1, 1], means[1, 2])
    plain, none = impl.encode(x, code(text), 0)
    assert none.shape == ((2, 3, maps) if maps else (2, 0, 66))
    worse = impl.decode(plain, none, code(text), 0, 530, 64, torch.float32)
    # The channels of large means are among those with more bits anyway, where there are such.
    assert (back - x).norm() < (0.65 if maps else 0.6) * (worse - x).norm()


@pytest.mark.parametrize("text", [text for text in RULED if text[:3] != "tcq"])
def test_many_vectors(impl: Implementation, text: str) -> None:
    """A last bit of float32 shows in one scale of some thousands only."""
    if impl is DEFAULT:
        pytest.skip("the default is the reference")
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16).float()
    check_encode(impl, x, text, "key")


@pytest.mark.full
@pytest.mark.parametrize("text", OPTIONS)
def test_many_vectors_with_options(impl: Implementation, text: str) -> None:
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).float() + 0.5
    for side in SIDES:
        check_encode(impl, x, text, side)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", reference.names())
def test_dtypes_strides_and_leading_dims(impl: Implementation, name: str, side: str, dtype: str) -> None:
    x = torch.randn(2, 130, 3, 64, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype]).transpose(1, 2)
    number = SIDES.index(side)
    data, means = impl.encode(x, code(name, dtype), number)
    maps = reference.map_bytes(name, 64)
    assert means.shape == ((2, 3, 1, maps) if maps else (2, 3, 0, 66))
    assert data.shape == (2, 3, 3, ops.side_bytes(code(name, dtype), 64, number))
    want = reference.encode(numpy(x if name == "exact" else x.float()), name, side=side)
    np.testing.assert_array_equal(data.numpy(), want)
    filled = torch.cat((x, x.new_zeros(2, 3, 62, 64)), dim=2)
    decoded = torch.from_numpy(expected(filled, name, side, dtype))
    for tokens in (130, 192, 129):
        for target in DTYPES.values():
            y = impl.decode(data, means, code(name, dtype), number, tokens, 64, target)
            assert y.shape == (2, 3, tokens, 64)
            assert y.dtype == target
            assert y.is_contiguous()
            close = decoded[..., :tokens, :]
            torch.testing.assert_close(y.double(), close, rtol=2 * torch.finfo(target).eps, atol=2e-6)


def test_exact_keeps_every_bit(impl: Implementation) -> None:
    bits = torch.randint(-(2**31), 2**31, (70, 64), generator=torch.Generator().manual_seed(2))
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.where(torch.isfinite(x), x, -0.0)
    for side in (0, 1):
        y = impl.decode(*impl.encode(x, code("exact"), side), code("exact"), side, 70, 64, torch.float32)
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_no_tokens(impl: Implementation) -> None:
    for name in [*reference.names(), "tq4:center=tile", "tq4:center=mean"]:
        data, means = impl.encode(torch.empty(2, 0, 128), code(name), 0)
        assert data.shape == (2, 0, ops.side_bytes(code(name), 128, 0))
        assert means.shape == (2, 0, reference.map_bytes(name.partition(":")[0], 128) or 130)
        assert impl.decode(data, means, code(name), 0, 0, 128, torch.float32).shape == (2, 0, 128)


@pytest.mark.parametrize("text", ["tq4", "tcq3", "tq2:center=tile"])
def test_decode_of_bytes_that_lie_inside_others(impl: Implementation, text: str) -> None:
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))
    data, means = impl.encode(x, code(text), 0)
    of_means = torch.zeros(3, 2, 67, dtype=torch.uint8)
    of_means[:, : means.shape[1], 1:] = means
    apart = of_means[:, : means.shape[1], 1:]
    wide = torch.zeros(3, 2, data.shape[-1] + 1, dtype=torch.uint8)
    wide[:, 1:, 1:] = data
    strided = wide[:, 1:, 1:]  # not contiguous, and at an odd address
    plain = impl.decode(data, means, code(text), 0, 64, 64, torch.float32)
    assert torch.equal(impl.decode(strided, apart, code(text), 0, 64, 64, torch.float32), plain)


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
    layout = ops.layout(code("tq4:center=tile"), 128, code("tcq3:center=mean"), 80, 3)
    key, value = reference.sections("tq4", 128), reference.sections("tcq3", 80)
    means = [("tile", 128), ("mean", 80)]
    assert reference.means_bytes(means) == 640  # 4 * 130 + 82, and what fills them up
    assert ops.page_bytes(layout) == reference.page_bytes(key, value, 3, means)
    assert ops.head_bytes(layout) == 4 * ops.record_bytes(layout) + 640


def test_public_functions_are_the_operators() -> None:
    x = torch.randn(64, 64)
    number = code("tq4:center=tile")
    data, means = ops.encode(x, number, 0)
    for got, want in zip((data, means), torch.ops.kvpack.encode(x, number, 0), strict=True):
        assert torch.equal(got, want)
    y = ops.decode(data, means, number, 0, tokens=64, head_dim=64, dtype=torch.float16)
    assert torch.equal(y, torch.ops.kvpack.decode(data, means, number, 0, 64, 64, torch.float16))
    assert torch.equal(ops.rotate(x), torch.ops.kvpack.rotate(x, False))
    assert torch.equal(ops.rotate(x, inverse=True), torch.ops.kvpack.rotate(x, True))
