"""The rotation: pinned signs, orthonormality, the inverse, and the stage order of the transform."""

import numpy as np
import pytest

from kvpack.reference import fwht, rotate, sign_words, signs


def hadamard(d: int) -> np.ndarray:
    """The Sylvester matrix, by Kronecker products."""
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix


def test_sign_words_are_pinned() -> None:
    assert sign_words(64) == [0xA08C781B06FD82CF]
    assert sign_words(128) == [0x8B5B21F70EF2CBC5, 0x5818ADDD785640DE]
    assert sign_words(256) == [0x322F35EA48F94DBB, 0xD61E44F4FC73CDC1, 0xDA2CBB6A314F56A8, 0xD6E508A30C2774B0]


def test_signs_are_the_bits_of_the_words() -> None:
    assert signs(64)[:8].tolist() == [-1, -1, -1, -1, 1, 1, -1, -1]  # 0xCF, lowest bit first
    assert signs(128)[64:72].tolist() == [1, -1, -1, -1, -1, 1, -1, -1]  # 0xDE
    for d in (64, 128, 256):
        assert signs(d).dtype == np.float32
        assert signs(d).shape == (d,)
        assert set(signs(d).tolist()) == {-1.0, 1.0}
    assert signs(96).shape == (96,)
    with pytest.raises(ValueError, match="read-only"):
        signs(64)[0] = 1


@pytest.mark.parametrize("d", [1, 2, 16, 64, 128, 256])
def test_fwht_is_the_hadamard_matrix(d: int) -> None:
    x = np.random.default_rng(d).integers(-1000, 1000, (5, 3, d)).astype(np.float64)
    np.testing.assert_array_equal(fwht(x), x @ hadamard(d).T)  # integers: exact
    np.testing.assert_array_equal(fwht(x.astype(np.float32)), x @ hadamard(d).T)


def test_fwht_rounds_stage_by_stage_from_the_widest_stride() -> None:
    x = np.random.default_rng(0).standard_normal((20, 128)).astype(np.float32)
    expected = x.copy()
    for row in expected:
        for h in (64, 32, 16, 8, 4, 2, 1):
            for start in range(0, 128, 2 * h):
                for i in range(start, start + h):
                    row[i], row[i + h] = row[i] + row[i + h], row[i] - row[i + h]
    assert fwht(x).dtype == np.float32
    np.testing.assert_array_equal(fwht(x), expected)


def test_fwht_leaves_its_input_alone_and_takes_no_vectors() -> None:
    x = np.ones((2, 64), np.float32)
    fwht(x)
    assert (x == 1).all()
    assert fwht(np.zeros((0, 64), np.float32)).shape == (0, 64)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_rotation_is_orthonormal_and_inverted_by_its_transpose(d: int) -> None:
    matrix = rotate(np.eye(d)).T  # columns are R e_i
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-14)
    np.testing.assert_allclose(matrix, hadamard(d) * signs(d) / np.sqrt(d), atol=1e-15)
    x = np.random.default_rng(d).standard_normal((3, 7, d))
    np.testing.assert_allclose(rotate(x), x @ matrix.T, atol=1e-13)
    np.testing.assert_allclose(rotate(x, inverse=True), x @ matrix, atol=1e-13)
    np.testing.assert_allclose(rotate(rotate(x), inverse=True), x, atol=1e-14)


@pytest.mark.parametrize("d", [0, 80, 96])
def test_other_sizes_are_refused(d: int) -> None:
    with pytest.raises(ValueError, match=f"power of two, not {d}"):
        fwht(np.zeros((2, d), np.float32))
