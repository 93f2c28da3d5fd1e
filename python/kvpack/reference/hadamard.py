"""Hadamard matrices and transforms of the sizes d = m * 2^a: H_d = H_m (x) H_2^a, m one of 1, 12, 20, 28, 36.

    index i = r * 2^a + c          row r of H_m, column c of the Walsh-Hadamard part

H_12 and H_20 are of Paley's first construction (q = 11 and 19), H_28 and H_36 are of his second (q = 13 and 17). With
Q[a, b] the Legendre symbol of (b - a) mod q, 1 a vector of ones and (x) the Kronecker product:

    first, q = 3 mod 4      H_(q+1)  = I + [[0, 1], [-1, Q]]
    second, q = 1 mod 4     H_2(q+1) = [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]

The order of the float operations decides the rounding, so it is part of the format. Source: R. Paley, On
orthogonal matrices, 1933.
"""

from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["ORDERS", "fwht", "hadamard_matrix", "hadamard_transform", "order_of"]

Float = TypeVar("Float", np.float32, np.float64)

ORDERS = {1: 1, 12: 11, 20: 19, 28: 13, 36: 17}
"""Orders m of the matrices that head sizes and their parts are made of, and the q of their construction."""


def order_of(d: int) -> int:
    """The m of d = m * 2^a. ValueError for sizes that are not of this form."""
    for m in ORDERS:
        if d >= m and d % m == 0 and (d // m) & (d // m - 1) == 0:
            return m
    raise ValueError(f"the Hadamard transform needs a power of two times 1, 12, 20, 28 or 36, not {d}")


@lru_cache(maxsize=len(ORDERS))
def hadamard_matrix(m: int) -> NDArray[np.float32]:
    """float32 [m, m], read-only: the matrix H_m of +-1, for an m of ORDERS; H_m H_m^T = m I."""
    if m == 1:
        return _frozen(np.ones((1, 1)))
    q = ORDERS[m]
    squares = {i * i % q for i in range(1, q)}
    symbol = np.array([0 if i == 0 else 1 if i in squares else -1 for i in range(q)])
    index = np.arange(q)
    core = np.ones((q + 1, q + 1), np.int64)
    core[0, 0] = 0
    core[1:, 1:] = symbol[(index[None, :] - index[:, None]) % q]
    eye = np.eye(q + 1, dtype=np.int64)
    if q % 4 == 3:
        core[1:, 0] = -1
        return _frozen(core + eye)
    return _frozen(np.kron(core, np.array([[1, 1], [1, -1]])) + np.kron(eye, np.array([[1, -1], [-1, -1]])))


def _frozen(matrix: NDArray[Any]) -> NDArray[np.float32]:
    out = matrix.astype(np.float32)
    out.flags.writeable = False
    return out


def fwht(x: NDArray[Float]) -> NDArray[Float]:
    """Unnormalised Walsh-Hadamard transform of the last axis (a power of two), in the dtype of x.

    Stages with stride h = d/2, d/4, ..., 1; each takes (a, b) at (i, i + h) to (a + b, a - b).
    x: float32 or float64 [..., d]. ValueError if d is not a power of two.
    """
    d = x.shape[-1]
    if d < 1 or d & (d - 1):
        raise ValueError(f"the Walsh-Hadamard transform needs a power of two, not {d}")
    # Work on [d, vectors]: the same operations, with long contiguous rows at every stride.
    y = np.array(x.reshape(-1, d).T, order="C")
    h = d // 2
    while h >= 1:
        pairs = y.reshape(d // (2 * h), 2, h, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        y = np.stack((a + b, a - b), axis=1).reshape(d, -1)
        h //= 2
    return np.ascontiguousarray(y.T).reshape(x.shape)


def hadamard_transform(x: NDArray[Float], inverse: bool = False) -> NDArray[Float]:
    """Unnormalised H_d x (H_d^T x if `inverse`) of the last axis, in the dtype of x.

    First `fwht` along c of every row r; then, where m is not 1, for every r and c the terms H_m[r, s] * x[s, c]
    (H_m[s, r] if `inverse`), added one after the other for ascending s.
    x: float32 or float64 [..., d]. ValueError unless d is a power of two times 1, 12, 20, 28 or 36.
    """
    d = x.shape[-1]
    m = order_of(d)
    if m == 1:
        return fwht(x)
    rows = fwht(x.reshape(-1, m, d // m))
    matrix = hadamard_matrix(m).astype(x.dtype)
    matrix = matrix.T if inverse else matrix
    y = matrix[:, 0, None] * rows[:, :1]
    for s in range(1, m):
        y = y + matrix[:, s, None] * rows[:, s : s + 1]
    return np.ascontiguousarray(y).reshape(x.shape)
