"""The randomized Hadamard rotation R: random signs, then a Hadamard transform (`hadamard`).

    R x   = H (s * x) / sqrt(d)          R^T y = s * (H^T y) / sqrt(d)          s in {-1, +1}^d

R is orthonormal: norms and inner products survive, and a vector with outlier channels comes out looking like
Gaussian noise, which is what the codebooks are made for (TurboQuant, arXiv 2504.19874, section 3, with a
Hadamard transform in the place of its dense rotation). The encoder uses H in float32, and no division.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .hadamard import hadamard_transform

__all__ = ["rotate", "sign_words", "signs", "splitmix64"]

SEED = 0x6B76_7061_636B_0000  # "kvpack" in ASCII, shifted left by 16 bits; the size is added


def splitmix64(seed: int, count: int) -> NDArray[np.uint64]:
    """The first words of splitmix64 (Steele, Lea, Flood 2014) from the state `seed`."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58_476D_1CE4_E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D0_49BB_1331_11EB)
        return z ^ z >> np.uint64(31)


def sign_words(d: int) -> list[int]:
    """The ceil(d / 64) words of splitmix64 that hold the signs for head size d.

    The signs of dims 64 w ... 64 w + 63 are the bits 0 ... 63 of word w; a set bit means -1.
    """
    words: list[int] = splitmix64(SEED + d, (d + 63) // 64).tolist()
    return words


@lru_cache(maxsize=32)
def signs(d: int) -> NDArray[np.float32]:
    """float32 [d], read-only: the signs s of the rotation for head size d."""
    words = sign_words(d)
    s = np.array([-1.0 if words[i // 64] >> i % 64 & 1 else 1.0 for i in range(d)], np.float32)
    s.flags.writeable = False
    return s


def rotate(x: NDArray[Any], inverse: bool = False) -> NDArray[np.float64]:
    """R x, or R^T x if `inverse`, in float64.

    x: any real dtype [..., d], d a power of two times 1, 12, 20, 28 or 36. Returns float64 [..., d]. ValueError for
    another d.
    """
    wide = np.asarray(x, np.float64)
    d = wide.shape[-1]
    s = signs(d).astype(np.float64)
    y: NDArray[np.float64] = s * hadamard_transform(wide, inverse=True) if inverse else hadamard_transform(s * wide)
    return y / math.sqrt(d)
