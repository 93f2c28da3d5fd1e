"""Float32 steps that encoders share: the sum in a fixed order, and the power of two taken out of a vector."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["lanes16_sum", "normalise"]

F32 = NDArray[np.float32]


def lanes16_sum(products: F32) -> F32:
    """Sum over the last axis in the order of a 16-lane register: [..., d] -> [...], d a multiple of 16.

    acc[l] = products[l], then + products[16 j + l] for j ascending; then the tree l+8, l+4, l+2, l+1.
    """
    rows = products.reshape(*products.shape[:-1], products.shape[-1] // 16, 16)
    acc = rows[..., 0, :]
    for j in range(1, rows.shape[-2]):
        acc = acc + rows[..., j, :]
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]


def normalise(x: F32) -> tuple[F32, NDArray[np.int32], NDArray[np.bool_]]:
    """(x', e, live): x' = x * 2^-e, where 2^e <= max|x| < 2^(e+1) over the last axis; live: the maximum is
    not 0. e and live keep a last axis of length 1.

    A power of two changes no mantissa, so that huge and tiny vectors get the codes of their scaled copies,
    and no sum of squares can overflow. (An element more than 2^126 below the maximum may become denormal: it
    is rounded once, to nearest even.)
    """
    peak = np.max(np.abs(x), axis=-1, keepdims=True)
    e = np.frexp(peak)[1] - np.int32(1)  # frexp's mantissa is in [1/2, 1); it handles denormals
    return np.ldexp(x, -e), e, peak > 0
