"""The trellis codecs: rotation, a trellis code (see `trellis`), one scale for the vector.

A sequence of the trellis runs along the depth of the tile: keys, one sequence for each token, along its d dims;
values, one for each dim, along the 64 tokens. Step n of a sequence is depth `order(steps)[n]`, so that each byte
column of a packed line (depth modulo 4) is a run of the sequence. A tile is therefore quantized as a whole; the
scale is still that of each vector.

Float32, and the order of operations is the specification (see `quantize`).
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from . import trellis
from .rotated import GAINS, SCALE_RULES, Match, Mean, match, squared_error, to_rotated

__all__ = ["order", "tcq_levels", "tcq_quantize"]

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)


def order(steps: int) -> NDArray[np.intp]:
    """The depths that a sequence visits: 0, 4, 8, ..., then 1, 5, ..., then 2, 6, ..., then 3, 7, ..."""
    return np.arange(steps).reshape(-1, 4).T.reshape(-1)


def sequences(x: NDArray[Scalar], side: str) -> NDArray[Scalar]:
    """[n, 64 tokens, d] -> [n * lanes, steps]."""
    lanes = x if side == "key" else np.swapaxes(x, 1, 2)
    return lanes[..., order(lanes.shape[-1])].reshape(-1, lanes.shape[-1])


def from_sequences(rows: NDArray[Scalar], side: str, d: int) -> NDArray[Scalar]:
    """The inverse: [n * lanes, steps] -> [n, 64 tokens, d]."""
    steps = rows.shape[-1]
    lanes = np.empty_like(rows)
    lanes[:, order(steps)] = rows
    return lanes.reshape(-1, 64, d) if side == "key" else np.swapaxes(lanes.reshape(-1, d, 64), 1, 2)


def tcq_levels(codes: Codes, side: str, *, k: float) -> NDArray[np.int8]:
    """The levels of codes [n, 64, d]."""
    return from_sequences(trellis.levels(sequences(codes, side), k), side, codes.shape[-1])


def tcq_quantize(x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, k: float) -> tuple[Codes, F32]:
    """x float32 [n, 64, d] -> codes [n, 64, d], scales float32 [n, 64, 1].

    With `search`, as for the Lloyd-Max codecs; but sequences of values run through all tokens, so for them one gain
    is chosen for the tile, by the sum of the relative errors.
    """
    d = x.shape[-1]
    rotated = to_rotated(x, mean)
    code = trellis.TRELLIS_CODES[k]
    unit = code.unit / trellis.FIXED

    def coded(gain: np.float32) -> tuple[Codes, F32, F32]:
        fixed = trellis.to_fixed(sequences(rotated.z(gain), side))
        codes = from_sequences(trellis.search(fixed, k), side, d)
        m = match(rotated, tcq_levels(codes, side, k=k), unit)
        scale = SCALE_RULES[rule](m)
        return codes, scale, _relative_error(scale, m, rotated.live, side)

    codes, scale, error = coded(np.float32(1))
    for gain in GAINS if search else ():
        other_codes, other_scale, other_error = coded(gain)
        better = other_error < error
        codes, scale = np.where(better, other_codes, codes), np.where(better, other_scale, scale)
        error = np.where(better, other_error, error)
    return codes, rotated.stored(scale)


def _relative_error(scale: F32, m: Match, live: NDArray[np.bool_], side: str) -> F32:
    """By token; for values their sum in the order of the tokens, [n, 1, 1]."""
    each = np.where(live, squared_error(scale, m) / m.n2, np.float32(0))
    if side == "key":
        return each
    total = np.zeros_like(each[:, :1])
    for t in range(each.shape[1]):
        total = total + each[:, t : t + 1]
    return total
