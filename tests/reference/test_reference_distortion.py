"""What the rotated codecs cost on Gaussian vectors, and the exact identities between the scale rules.

Trellis codes: test_reference_trellis_distortion.py, inputs that are not Gaussian: test_reference_structured.py.
"""

import numpy as np
import pytest

from kvpack.reference import CODEBOOKS, dequantize, quantize, rotate

VECTORS, CHUNK = 1 << 17, 1 << 13
EXPECTED = {  # relative squared error with the rule `stored`
    ("tq1", 128): 0.3609,
    ("tq1", 64): 0.3584,
    # Gaussian limit: D(2 bits) - E|z - c(z)|^2 = 0.1175 - 0.2753^2 = 0.0417 (test_reference_codebooks.py), and less
    # at a finite d, as for all codecs, since the norm is known; measured once, float64, 2^17 vectors.
    ("tqr3", 128): 0.04061,
    ("tqr3", 64): 0.03943,
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
    code_words = CODEBOOKS[name].levels[codes].astype(np.float64)
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


@pytest.mark.parametrize("name", list(CODEBOOKS))
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


# Measured once, float64, 2^17 vectors. Of blocks of 32 with a step of extreme / 2^(bits-1), the error is step^2 / 12
# and a little for the other end, which has one level less: E extreme^2 = 5.06, so 5.06 / 256 / 12 = 1.65e-3 of q5_0's
# 1.82e-3, and 5.06 / 64 / 12 = 6.6e-3 of q4_0's; 5.06 / 127^2 / 12 = 2.61e-5 of q8_0's 2.87e-5, with the rounding of
# its fp16 scale. Gaussian vectors stay so when rotated: rq8_0 and rq4_0 have the errors of q8_0 and q4_0.
BLOCKS = {"q8_0": 2.864e-5, "q4_0": 7.38e-3, "q5_0": 1.822e-3, "rq8_0": 2.863e-5, "rq4_0": 7.377e-3}


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", BLOCKS)
def test_codecs_of_blocks(name: str, d: int) -> None:
    x = np.random.default_rng(3).standard_normal((1 << 14, d), np.float32)
    codes, scales = quantize(x, name)
    error = dequantize(codes, scales, name) - x
    assert np.sum(error**2) / np.sum(x.astype(np.float64) ** 2) == pytest.approx(BLOCKS[name], rel=0.01)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_search_lowers_the_error(name: str) -> None:
    """By less the more levels there are; with one bit there is nothing to find."""
    x = np.random.default_rng(5).standard_normal((1 << 11, 128), np.float32)
    wide = x.astype(np.float64)

    def errors(search: bool) -> np.ndarray:
        decoded = dequantize(*quantize(x, name, "mse", search=search), name)
        relative: np.ndarray = np.sum((decoded - wide) ** 2, axis=1) / np.sum(wide**2, axis=1)
        return relative

    plain, found = errors(False), errors(True)
    assert (found <= plain * (1 + 2.0**-9)).all()  # the rounding of scales to fp16 comes after the choice
    if name == "tq1":
        assert (found == plain).all()
    else:
        assert 0.85 * plain.mean() < found.mean() < 0.995 * plain.mean()


def test_rotation_saves_vectors_with_outlier_channels() -> None:
    x = np.random.default_rng(4).standard_normal((256, 128), np.float32)
    x[:, 11] *= 50
    assert relative_errors(x, "tq4", "norm").mean() < 0.012
