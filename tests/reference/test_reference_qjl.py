"""The codecs with a projected residual: their matrix; inner products without bias, with the error that theory says."""

import math

import numpy as np
import pytest

import kvpack
from kvpack.reference import HEAD_SIZES, rotate
from kvpack.reference.qjl import projection

VECTORS, CHUNK = 1 << 17, 1 << 14
MSE = {  # of the first part, rule `stored`: test_reference_distortion.py
    ("tqp2", 64): 0.3584,
    ("tqp2", 128): 0.3609,
    ("tqp3", 64): 0.1147,
    ("tqp3", 128): 0.1160,
    ("tqp4", 64): 0.0335,
    ("tqp4", 128): 0.0340,
}


def unit_vectors(rng: np.random.Generator, d: int) -> np.ndarray:
    x = rng.standard_normal((CHUNK, d), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("name", "d"), MSE)
def test_inner_products(name: str, d: int) -> None:
    """Their squared error is pi/2 times that of the first part over d, for y that knows nothing of x; the slope is 1.

    The slope over all vectors is known to sqrt(error / signal / vectors), 0.2 % at two bits and less with more; what a
    fixed matrix adds to it is below 0.5 % of the residual. The compiled encoder has the reference's bytes.
    """
    rng = np.random.default_rng(d)
    codec = kvpack.codec(f"{name}:scale=stored", d, "key")
    error = product = square = 0.0
    for _ in range(VECTORS // CHUNK):
        x, y = unit_vectors(rng, d), unit_vectors(rng, d).astype(np.float64)
        exact = np.einsum("nd,nd->n", y, x)
        coded = np.einsum("nd,nd->n", y, codec.decode(codec.encode(x)))
        error += np.sum((coded - exact) ** 2)
        product, square = product + coded @ exact, square + exact @ exact
    assert error / VECTORS == pytest.approx(math.pi / 2 * MSE[name, d] / d, rel=0.03)
    assert product / square == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("d", HEAD_SIZES)
def test_the_matrix_is_gaussian_and_independent_of_the_rotation(d: int) -> None:
    s = projection(d).astype(np.float64) / 32
    deviation = 1 / d  # of the mean over its entries
    assert abs(s.mean()) < 4 * deviation
    assert abs((s**2).mean() - 1) < 4 * math.sqrt(2) * deviation
    assert abs((s**4).mean() - 3) < 4 * math.sqrt(96) * deviation  # 1 for signs
    turned = s @ rotate(np.eye(d))  # as Gaussian as before, were they independent
    assert abs((turned**4).mean() - 3) < 4 * math.sqrt(96) * deviation
    assert abs(np.trace(turned)) < 4 * math.sqrt(d)


def test_the_matrices_are_pinned() -> None:
    """FNV-1a 64 of the rows of all matrices: test_codecs.cpp has the same number."""
    value = 0xCBF29CE484222325
    for byte in b"".join(projection(d).tobytes() for d in HEAD_SIZES):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    assert value == 0xEBF141C221069B98
