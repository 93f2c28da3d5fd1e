"""The codecs of split channels: their maps, their parts, their distortion, and the bits they take."""

import math

import numpy as np
import pytest

import kvpack
from kvpack.reference import (
    CODEBOOKS,
    CODECS,
    HEAD_SIZES,
    SIDES,
    decode,
    dequantize,
    encode,
    encode_means,
    maps,
    quantize,
    rotate,
    side_bytes,
)
from kvpack.reference.tq import lloyd_max_quantize

F = np.float32
SPLIT = {"tq2.5": ("tq3", "tq2"), "tq3.5": ("tq4", "tq3")}
OUTLIERS = {64: 16, 80: 16, 96: 32, 112: 32, 128: 32, 160: 32, 192: 48, 256: 64}


def chosen(x: np.ndarray) -> np.ndarray:
    """The channels of a tile [64, d], outliers first, by energies in float64."""
    energy = np.sum(x.astype(np.float64) ** 2, axis=0)
    n = OUTLIERS[x.shape[-1]]
    first = np.sort(np.argsort(-energy, kind="stable")[:n])
    return np.concatenate((first, np.setdiff1d(np.arange(x.shape[-1]), first)))


def bitmap(order: np.ndarray) -> list[int]:
    bits = np.zeros(len(order), np.uint8)
    bits[order[: OUTLIERS[len(order)]]] = 1
    return [sum(int(bit) << i for i, bit in enumerate(byte)) for byte in bits.reshape(-1, 8)]


def rows(d: int, tokens: int, seed: int = 0) -> np.ndarray:
    """[2, tokens, d], a few channels larger than the others, more and more of another set."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, tokens, d), np.float32) * np.exp(rng.standard_normal((2, 1, d))).astype(F)
    x[:, tokens // 2 :] *= np.exp(rng.standard_normal((2, 1, d))).astype(F)
    return x


@pytest.mark.parametrize("d", HEAD_SIZES)
@pytest.mark.parametrize("name", SPLIT)
def test_parts_are_codecs_of_their_own(name: str, d: int) -> None:
    x = rows(d, 3 * 64)
    x[:, 100] *= F(1e-30)
    x[:, 101] = 0
    codes, scales = quantize(x, name, "mse", search=True)
    assert codes.shape == x.shape
    assert scales.shape == (2, 192, 2)
    for row in range(2):
        order = chosen(x[row, :64])
        assert maps(x, name, "none")[row].tolist() == [bitmap(order)]
        for part, book in enumerate(SPLIT[name]):
            at = slice(None, OUTLIERS[d]) if part == 0 else slice(OUTLIERS[d], None)
            own = np.ascontiguousarray(x[row][:, order[at]]).reshape(3, 64, -1)
            want = lloyd_max_quantize(own, "key", "mse", True, None, book=CODEBOOKS[book])
            assert (codes[row][:, at].reshape(want[0].shape) == want[0]).all()
            assert (scales[row, :, part] == want[1].reshape(-1).astype(np.float16)).all()
    back = dequantize(codes, scales, name, known=maps(x, name, "none"))
    assert np.sum((back - x) ** 2) < 0.1 * np.sum(x.astype(np.float64) ** 2)


@pytest.mark.parametrize("center", ["none", "mean", "tile"])
@pytest.mark.parametrize("side", SIDES)
def test_maps_are_frozen_at_the_first_tile_with_a_token(side: str, center: str) -> None:
    d, x = 96, rows(96, 9 * 64 + 5)
    x[1, : 5 * 64 + 9] = 0
    got = maps(x, "tq2.5", center, side)
    first = [chosen(x[0, :64]), chosen(x[1, 5 * 64 : 6 * 64])]
    per_tile = [[bitmap(order) if t >= at else [0] * 12 for t in range(10)] for order, at in zip(first, (0, 5))]  # noqa: B905
    groups = [[tiles[3], tiles[7], tiles[9]] for tiles in per_tile]
    assert got.tolist() == (per_tile if center == "tile" else groups)
    # The bytes beside the tiles end with them.
    beside = encode_means(x, "tq2.5", center, side)
    assert beside.shape[-1] == (12 if center == "none" else d + 2 + 12)
    assert (beside[..., -12:] == got).all()
    back = decode(encode(x, "tq2.5", None, side, center), "tq2.5", side, d, x.shape[1], mean=beside)
    assert np.sum((back - x) ** 2) < 0.12 * np.sum(x.astype(np.float64) ** 2)
    if center != "mean":  # zeros beside a mean of the row are coded like any vector
        assert not back[1, : 5 * 64].any()


def test_equal_channels_are_taken_from_below() -> None:
    x = np.ones((1, 64, 64), F)
    x[..., [9, 50]] = -2
    assert maps(x, "tq3.5", "none")[0, 0].tolist() == [0xFF, 0x7F, 0, 0, 0, 0, 0x04, 0]
    assert not maps(np.full_like(x, -0.0), "tq3.5", "none").any()
    assert maps(x, "tq4", "none").shape == (1, 1, 0)


@pytest.mark.parametrize("exponent", [-140, -100, -60, 60, 120])
def test_energies_neither_overflow_nor_vanish(exponent: int) -> None:
    x = rows(128, 64)[:1]
    assert (maps(np.ldexp(x, exponent), "tq2.5", "none") == maps(x, "tq2.5", "none")).all()


def test_both_parts_share_the_scale_of_a_mean() -> None:
    d, x = 128, rows(128, 64) + np.linspace(-9, 9, 128, dtype=F)
    beside = encode_means(x, "tq2.5", "tile")
    levels, scale = beside[:, 0, :d].view(np.int8), np.ascontiguousarray(beside[:, 0, d : d + 2]).view("<f2")
    for row in range(2):
        order = chosen(x[row])
        mean = x[row].astype(np.float64).mean(0)[order]
        turned = np.concatenate([rotate(part) for part in np.split(mean, [32])])
        assert np.abs(levels[row]).max() == 127
        np.testing.assert_allclose(levels[row] * float(scale[row, 0]), turned, atol=0.57 * float(scale[row, 0]))


def distortion(name: str, n: int) -> float:
    """Squared error of a Lloyd-Max code of vectors of n dims, of any direction, beside |x|^2, with the rule `stored`.

    A coordinate of a direction, times sqrt(n), has the density (1 - z^2 / n)^((n - 3) / 2) on -sqrt(n) .. sqrt(n).
    """
    book = CODEBOOKS[name]
    z = (np.arange(200_000) + 0.5) / 200_000 * math.sqrt(n)
    density = (1 - z**2 / n) ** ((n - 3) / 2)
    level = np.array(book.positive)[np.searchsorted(book.thresholds, z)] * book.unit
    return float(np.sum(density * (z - level) ** 2) / np.sum(density))


NORM = {  # measured once, 2^17 vectors
    ("tq2.5", 64): 0.09308,
    ("tq3.5", 64): 0.02604,
    ("tq2.5", 128): 0.09617,
    ("tq3.5", 128): 0.02717,
}


@pytest.mark.parametrize(("name", "d"), NORM)
def test_distortion(name: str, d: int) -> None:
    """Of vectors for which the map is nobody's choice, by what their parts have; the compiled encoder has the bytes."""
    rng = np.random.default_rng(d)
    parts = zip(SPLIT[name], (OUTLIERS[d], d - OUTLIERS[d]), strict=True)
    stored = sum(n * distortion(part, n) for part, n in parts) / d
    x = rng.standard_normal((1 << 16, d), np.float32)
    wide = x.astype(np.float64)
    for rule, want in (("stored", stored), ("norm", NORM[name, d])):
        codec = kvpack.codec(f"{name}:scale={rule}", d, "key")
        error = codec.decode(codec.encode(x)).astype(np.float64) - wide
        found = np.mean(np.sum(error**2, axis=1) / np.sum(wide**2, axis=1))
        assert found == pytest.approx(want, rel=0.01), rule


@pytest.mark.parametrize("d", HEAD_SIZES)
@pytest.mark.parametrize("name", SPLIT)
def test_bits(name: str, d: int) -> None:
    books = [CODEBOOKS[part].bits for part in SPLIT[name]]
    codes = books[0] * OUTLIERS[d] + books[1] * (d - OUTLIERS[d])
    x = np.zeros((8 * 64, d), F)
    for side in SIDES:
        assert side_bytes(name, d, side) == 8 * (codes + 32)
        codec = kvpack.codec(name, d, side)  # type: ignore[arg-type]
        packed = codec.encode(x)
        assert packed.nbytes * 8 == codec.bits * x.size
        assert codec.bits == pytest.approx((codes + 32) / d + 1 / 256)  # the map: d bits of 256 tokens
    assert CODECS[name].bits == (books[0] + 3 * books[1]) / 4
    if d == 128:
        assert (codes + 32) / d == float(name[2:])
