"""The rotation: pinned signs, orthonormality, the inverse, and the stage order of the transform."""

import numpy as np
import pytest

from kvpack.reference import (
    HEAD_SIZES,
    fwht,
    hadamard_matrix,
    hadamard_transform,
    order_of,
    rotate,
    sign_words,
    signs,
)


def hadamard(d: int) -> np.ndarray:
    """H_d by Kronecker products: H_m, then a Sylvester matrix."""
    matrix = hadamard_matrix(order_of(d)).astype(np.float64)
    while len(matrix) < d:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]]))
    return matrix


@pytest.mark.parametrize("m", [1, 12, 20, 28, 36])
def test_hadamard_matrices(m: int) -> None:
    matrix = hadamard_matrix(m)
    assert matrix.dtype == np.float32
    assert set(matrix.ravel().tolist()) <= {1.0, -1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, m * np.eye(m))
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 0


def test_hadamard_matrices_are_pinned() -> None:
    def row(m: int, r: int) -> str:
        return "".join("+" if entry > 0 else "-" for entry in hadamard_matrix(m)[r].tolist())

    assert [row(12, r) for r in (0, 1, 2)] == ["+" * 12, "-++-+++---+-", "--++-+++---+"]
    assert [row(20, r) for r in (0, 1)] == ["+" * 20, "-++--++++-+-+----++-"]
    assert [row(28, r) for r in (0, 1, 2)] == [
        "+-++++++++++++++++++++++++++",
        "--+-+-+-+-+-+-+-+-+-+-+-+-+-",
        "+++-++--++++--------++++--++",
    ]


def test_orders() -> None:
    assert [order_of(d) for d in HEAD_SIZES] == [1, 20, 12, 28, 1, 20, 12, 1]
    assert [order_of(d) for d in (1, 2, 12, 20, 28, 48, 144, 224)] == [1, 1, 12, 20, 28, 12, 36, 28]
    for d in (0, 3, 6, 10, 14, 18, 44, 100):
        with pytest.raises(ValueError, match=f"1, 12, 20, 28 or 36, not {d}"):
            order_of(d)


def test_sign_words_are_pinned() -> None:
    assert sign_words(64) == [0xA08C781B06FD82CF]
    assert sign_words(128) == [0x8B5B21F70EF2CBC5, 0x5818ADDD785640DE]
    assert sign_words(256) == [0x322F35EA48F94DBB, 0xD61E44F4FC73CDC1, 0xDA2CBB6A314F56A8, 0xD6E508A30C2774B0]


def test_signs_are_the_bits_of_the_words() -> None:
    assert signs(64)[:8].tolist() == [-1, -1, -1, -1, 1, 1, -1, -1]  # 0xCF, lowest bit first
    assert signs(128)[64:72].tolist() == [1, -1, -1, -1, -1, 1, -1, -1]  # 0xDE
    for d in HEAD_SIZES:
        assert signs(d).dtype == np.float32
        assert signs(d).shape == (d,)
        assert set(signs(d).tolist()) == {-1.0, 1.0}
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


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("d", [80, 96, 112])
def test_transform_is_fwht_along_c_and_then_terms_one_by_one(d: int, inverse: bool) -> None:
    x = np.random.default_rng(0).standard_normal((4, d)).astype(np.float32)
    m = order_of(d)
    width = d // m
    matrix = hadamard_matrix(m).T if inverse else hadamard_matrix(m)
    expected = np.zeros_like(x)
    for row, out in zip(fwht(x.reshape(4, m, width)), expected, strict=True):
        for r in range(m):
            for c in range(width):
                terms = [row[s, c] if matrix[r, s] > 0 else -row[s, c] for s in range(m)]
                total = terms[0]
                for term in terms[1:]:
                    total = total + term
                out[r * width + c] = total
    got = hadamard_transform(x, inverse)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("d", [1, 12, 64, *HEAD_SIZES])
def test_transform_is_the_hadamard_matrix(d: int) -> None:
    x = np.random.default_rng(d).integers(-1000, 1000, (5, 3, d)).astype(np.float64)
    np.testing.assert_array_equal(hadamard_transform(x), x @ hadamard(d).T)
    np.testing.assert_array_equal(hadamard_transform(x, inverse=True), x @ hadamard(d))
    np.testing.assert_array_equal(hadamard_transform(x.astype(np.float32)), x @ hadamard(d).T)


def test_fwht_leaves_its_input_alone_and_takes_no_vectors() -> None:
    x = np.ones((2, 64), np.float32)
    fwht(x)
    assert (x == 1).all()
    assert fwht(np.zeros((0, 64), np.float32)).shape == (0, 64)


@pytest.mark.parametrize("d", HEAD_SIZES)
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
