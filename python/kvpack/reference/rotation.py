"""The randomized Hadamard rotation R: random signs, then a Walsh-Hadamard transform.

    R x   = FWHT(s * x) / sqrt(d)          R^T y = s * FWHT(y) / sqrt(d)          s in {-1, +1}^d

R is orthonormal: norms and inner products survive, and a vector with outlier channels comes out looking like
Gaussian noise, which is what the codebooks are made for (TurboQuant, arXiv 2504.19874, section 3, with a
Hadamard transform in the place of its dense rotation). The encoder uses `fwht` in float32, and no division.
"""

import math
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["fwht", "rotate", "sign_words", "signs"]

Float = TypeVar("Float", np.float32, np.float64)

MASK64 = 2**64 - 1
SEED = 0x6B76_7061_636B_0000  # "kvpack" in ASCII, shifted left by 16 bits; the head size is added


def sign_words(d: int) -> list[int]:
    """The ceil(d / 64) words of splitmix64 (Steele, Lea, Flood 2014) that hold the signs for head size d.

    The signs of dims 64 w ... 64 w + 63 are the bits 0 ... 63 of word w; a set bit means -1.
    """
    words, state = [], SEED + d
    for _ in range((d + 63) // 64):
        state = (state + 0x9E37_79B9_7F4A_7C15) & MASK64
        z = state
        z = ((z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9) & MASK64
        z = ((z ^ z >> 27) * 0x94D0_49BB_1331_11EB) & MASK64
        words.append(z ^ z >> 31)
    return words


@lru_cache(maxsize=32)
def signs(d: int) -> NDArray[np.float32]:
    """float32 [d], read-only: the signs s of the rotation for head size d."""
    words = sign_words(d)
    s = np.array([-1.0 if words[i // 64] >> i % 64 & 1 else 1.0 for i in range(d)], np.float32)
    s.flags.writeable = False
    return s


def fwht(x: NDArray[Float]) -> NDArray[Float]:
    """Unnormalised Walsh-Hadamard transform of the last axis (a power of two), in the dtype of x.

    Stages with stride h = d/2, d/4, ..., 1; each takes (a, b) at (i, i + h) to (a + b, a - b). The order of
    the stages decides the rounding, so it is part of the format.
    x: float32 or float64 [..., d]. ValueError if d is not a power of two.
    """
    d = x.shape[-1]
    if d < 1 or d & (d - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, not {d}")
    # Work on [d, vectors]: the same operations, with long contiguous rows at every stride.
    y = np.array(x.reshape(-1, d).T, order="C")
    h = d // 2
    while h >= 1:
        pairs = y.reshape(d // (2 * h), 2, h, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        y = np.stack((a + b, a - b), axis=1).reshape(d, -1)
        h //= 2
    return np.ascontiguousarray(y.T).reshape(x.shape)


def rotate(x: NDArray[Any], inverse: bool = False) -> NDArray[np.float64]:
    """R x, or R^T x if `inverse`, in float64.

    x: any real dtype [..., d], d a power of two. Returns float64 [..., d]. ValueError for another d.
    """
    wide = np.asarray(x, np.float64)
    d = wide.shape[-1]
    s = signs(d).astype(np.float64)
    y: NDArray[np.float64] = s * fwht(wide) if inverse else fwht(s * wide)
    return y / math.sqrt(d)
