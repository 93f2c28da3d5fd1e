"""What the rotated codecs cost on Gaussian vectors, and the exact identities between the scale rules."""

import numpy as np
import pytest

from kvpack.reference import CODEBOOKS, CODECS, dequantize, quantize, rotate

VECTORS, CHUNK = 1 << 17, 1 << 13
EXPECTED = {  # relative squared error with the rule `stored`
    ("tq2", 128): 0.1160,
    ("tq3", 128): 0.0340,
    ("tq4", 128): 0.0093,
    ("tq2", 64): 0.1147,
    ("tq3", 64): 0.0335,
    ("tq4", 64): 0.0092,
    ("tq2", 80): 0.1151,
    ("tq3", 80): 0.0336,
    ("tq4", 80): 0.0092,
    ("tq2", 96): 0.1155,
    ("tq3", 96): 0.0338,
    ("tq4", 96): 0.00925,
}


def relative_errors(x: np.ndarray, name: str, rule: str) -> np.ndarray:
    codes, scales = quantize(x, name, rule)
    wide = x.astype(np.float64)
    error = dequantize(codes, scales, name) - wide
    relative: np.ndarray = np.sum(error**2, axis=1) / np.sum(wide**2, axis=1)
    return relative


@pytest.mark.parametrize(("name", "d"), EXPECTED)
def test_stored_scale_distortion(name: str, d: int) -> None:
    rng = np.random.default_rng(d)
    total = 0.0
    for _ in range(VECTORS // CHUNK):
        total += relative_errors(rng.standard_normal((CHUNK, d), np.float32), name, "stored").sum()
    assert total / VECTORS == pytest.approx(EXPECTED[name, d], rel=0.01)


@pytest.mark.parametrize(("name", "d"), EXPECTED)
def test_scale_rules_obey_their_identities(name: str, d: int) -> None:
    """With rho the cosine of a vector and its code word, the error of three rules depends on rho alone."""
    x = np.random.default_rng(d + 1).standard_normal((1 << 12, d), np.float32)
    codes, _ = quantize(x, name)
    code_words = CODEBOOKS[CODECS[name].bits].levels[codes].astype(np.float64)
    turned = rotate(x)
    rho = np.einsum("nd,nd->n", turned, code_words)
    rho /= np.linalg.norm(turned, axis=1) * np.linalg.norm(code_words, axis=1)
    identities = {"norm": 2 * (1 - rho), "mse": 1 - rho**2, "unbiased": rho**-2 - 1}
    means = {rule: relative_errors(x, name, rule).mean() for rule in identities}
    for rule, errors in identities.items():
        assert means[rule] == pytest.approx(errors.mean(), rel=1e-3)
    stored = relative_errors(x, name, "stored").mean()
    assert means["mse"] < min(means["norm"], means["unbiased"], stored)
    assert means["norm"] < means["unbiased"]


@pytest.mark.parametrize("name", ["tq2", "tq3", "tq4"])
def test_scale_rules_keep_what_they_promise(name: str) -> None:
    x = np.random.default_rng(9).standard_normal((1 << 10, 128), np.float32)
    wide = x.astype(np.float64)
    energy = np.einsum("nd,nd->n", wide, wide)

    def decoded(rule: str) -> np.ndarray:
        return dequantize(*quantize(x, name, rule), name)

    norm, mse, unbiased = decoded("norm"), decoded("mse"), decoded("unbiased")
    half_ulp = 2.0**-10  # of the fp16 scale, and twice that for squares
    np.testing.assert_allclose(np.einsum("nd,nd->n", norm, norm), energy, rtol=2 * half_ulp)
    np.testing.assert_allclose(np.einsum("nd,nd->n", unbiased, wide), energy, rtol=half_ulp)
    orthogonal = np.einsum("nd,nd->n", mse, wide - mse) / energy
    np.testing.assert_allclose(orthogonal, 0, atol=2 * half_ulp)


@pytest.mark.parametrize(("name", "expected"), [("q8_0", 2.87e-5), ("q4_0", 7.38e-3)])
def test_plain_codecs(name: str, expected: float) -> None:
    x = np.random.default_rng(3).standard_normal((1 << 13, 128), np.float32)
    codes, scales = quantize(x, name)
    error = dequantize(codes, scales, name) - x
    assert np.sum(error**2) / np.sum(x.astype(np.float64) ** 2) == pytest.approx(expected, rel=0.02)


def test_rotation_saves_vectors_with_outlier_channels() -> None:
    x = np.random.default_rng(4).standard_normal((256, 128), np.float32)
    x[:, 11] *= 50
    assert relative_errors(x, "tq4", "norm").mean() < 0.012
