"""The trellis codes of tcq1 to tcq4, tcq2.5 and tcq3.5: levels of code sequences, and the search that finds codes.

Every step of a sequence adds k bits to a stream; the step's *window* is the last 9 bits of it, the newest on
top, and the window names its level. A sequence bites its tail: before its first bit comes its last.

    w_i = w_{i-1} >> k | c_i << (9 - k)        indices modulo the number of steps
    level of w = T[w >> 1 & 127], negated where bits 8 and 0 of w differ

Half-bit codes alternate: k = 2, 3, 2, 3, ... (tcq2.5), with a table of levels for each of the two.

The search is a Viterbi search in integers, part of the format down to its ties. Of a window, only the bits
that the next step keeps matter from then on: `w >> k_next` is the *state* after the step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .trellis_tables import TRELLIS_TABLES

__all__ = ["TRELLIS_CODES", "TrellisCode", "levels", "search", "to_fixed", "windows"]

I32 = NDArray[np.int32]

WINDOW = 9
FIXED = 8192
"""A coordinate of 1.0 in the fixed point of the search."""


@dataclass(frozen=True)
class TrellisCode:
    """A trellis code.

    bits: of even and of odd steps. doublings: the search's costs are (2^doublings (x - level))^2. seam: steps
    before and after the seam that decide with which state a sequence begins and ends. unit: FIXED times the
    size of level 1 in standard deviations. tables: int8 levels [2, 128], of even and of odd steps.
    """

    bits: tuple[int, int]
    doublings: int
    seam: int
    unit: int
    tables: NDArray[np.int8]

    @property
    def tag_bits(self) -> int:
        """Metrics have 16 bits, of which so many tell windows apart: 16 - tag_bits are left for the costs."""
        return max(self.bits)

    def window_levels(self, phase: int) -> I32:
        """int32 [512]: the level of each window, in even (phase 0) or odd steps."""
        w = np.arange(1 << WINDOW)
        level = self.tables[phase].astype(np.int32)[w >> 1 & 127]
        signed: I32 = np.where((w >> 8 ^ w) & 1, -level, level)
        return signed


def _code(k: float, bits: tuple[int, int], doublings: int, seam: int) -> TrellisCode:
    unit, tables = TRELLIS_TABLES[k]
    return TrellisCode(bits, doublings, seam, unit, np.array([tables[0], tables[-1]], np.int8))


TRELLIS_CODES: dict[float, TrellisCode] = {
    1: _code(1, (1, 1), 0, 64),
    2: _code(2, (2, 2), 0, 32),
    2.5: _code(2.5, (2, 3), 0, 32),
    3: _code(3, (3, 3), 0, 24),
    3.5: _code(3.5, (3, 4), 1, 24),
    4: _code(4, (4, 4), 1, 24),
}
"""The code for each number of bits per value."""


def windows(codes: NDArray[np.uint8], k: float) -> I32:
    """int32 [sequences, steps]: the window of each step of codes [sequences, steps]."""
    bits = TRELLIS_CODES[k].bits
    steps = codes.shape[1]
    w = np.zeros(codes.shape[0], np.int32)
    out = np.empty(codes.shape, np.int32)
    for i in range(-10, steps):  # from ten steps before the seam: by then nothing is left of w = 0
        w = w >> bits[i % 2] | codes[:, i % steps].astype(np.int32) << (WINDOW - bits[i % 2])
        out[:, i % steps] = w
    return out


def levels(codes: NDArray[np.uint8], k: float) -> NDArray[np.int8]:
    """int8 [sequences, steps]: what codes [sequences, steps] stand for. level * unit / FIXED approximates z."""
    w = windows(codes, k)
    of_window = np.stack([TRELLIS_CODES[k].window_levels(phase) for phase in (0, 1)])
    return of_window[np.arange(codes.shape[1]) % 2, w].astype(np.int8)


def to_fixed(z: NDArray[np.float32]) -> NDArray[np.int16]:
    """z (in standard deviations) as integers, 1.0 being FIXED: rounded half to even, cut off at int16."""
    fixed: NDArray[np.float32] = np.clip(np.rint(z * np.float32(FIXED)), -32768, 32767)
    return fixed.astype(np.int16)


def search(x: NDArray[np.int16], k: float) -> NDArray[np.uint8]:
    """Codes for sequences in fixed point: int16 [sequences, steps] -> uint8 [sequences, steps]; steps is even.

    1. The state at the seam: from the last `seam` steps through the first `seam` ones, beginning in any state,
       the best path; its state at the seam.
    2. The best path through all steps that begins and ends in that state. (Where every such path is cut off at
       the top of the metric's range, whatever the survivors lead to.)
    """
    return np.concatenate([_search(part.astype(np.int32).T, k) for part in np.array_split(x, max(1, len(x) // 128))])


def _search(x: I32, k: float) -> NDArray[np.uint8]:
    """x [steps, sequences] -> codes [sequences, steps]."""
    code = TRELLIS_CODES[k]
    steps, sequences = x.shape
    states = (1 << WINDOW) >> code.bits[0]
    seam = min(code.seam, steps)
    every = np.arange(sequences)

    metrics, survivors = _forward(x, code, range(-seam, seam), np.zeros((states, sequences), np.int32))
    state: I32 = np.argmin(metrics, axis=0).astype(np.int32)  # the first one of the smallest
    for i in reversed(range(seam)):
        window = survivors[seam + i][state, every]
        state = window & ((1 << (WINDOW - code.bits[i % 2])) - 1)

    start = np.where(np.arange(states)[:, None] == state, 0, 65535 >> code.tag_bits)
    _, survivors = _forward(x, code, range(steps), start.astype(np.int32))
    codes = np.empty((sequences, steps), np.uint8)
    for i in reversed(range(steps)):
        window = survivors[i][state, every]
        codes[:, i] = window >> (WINDOW - code.bits[i % 2])
        state = window & ((1 << (WINDOW - code.bits[i % 2])) - 1)
    return codes


def _forward(x: I32, code: TrellisCode, positions: Iterable[int], metrics: I32) -> tuple[I32, list[I32]]:
    """Metrics [states, sequences] through the steps at `positions` (modulo the length, the first one even).

    Also, for each of these steps, the window [states, sequences] by which each state is entered best.
    """
    steps, sequences = x.shape
    w = np.arange(1 << WINDOW)
    survivors = []
    for i in positions:
        coming, going = code.bits[i % 2], code.bits[(i + 1) % 2]
        value = code.window_levels(i % 2)[:, None] * code.unit
        distance = np.clip((x[i % steps] - value) << code.doublings, -32768, 32767)
        cost = (distance * distance + (1 << 14)) >> 15 >> code.tag_bits
        total = metrics[w & ((1 << (WINDOW - coming)) - 1)] + cost
        # In 16 bits, below the metric, h: the number of the window among those that enter the same state. The
        # smaller h wins a tie; what is cut off at the top of the range has the largest h.
        h = w & ((1 << going) - 1)
        tagged = np.minimum(total << code.tag_bits | h[:, None], 65535)
        best = tagged.reshape(-1, 1 << going, sequences).min(axis=1)
        survivors.append(np.arange(len(best), dtype=np.int32)[:, None] << going | best & ((1 << going) - 1))
        metrics = best >> code.tag_bits
        metrics = metrics - metrics.min(axis=0)
    return metrics, survivors
