"""The trellis codes: tables, windows that bite their tail, a search close to the exhaustive one, its distortion."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvpack.reference.trellis import FIXED, TRELLIS_CODES, levels, search, to_fixed, windows
from kvpack.reference.trellis_tables import TRELLIS_TABLES

ROOT = Path(__file__).resolve().parents[2]
CODECS = sorted(TRELLIS_CODES)


def gaussian(sequences: int, steps: int, seed: int) -> np.ndarray:
    """float32 [sequences, steps], each of norm sqrt(steps)."""
    z = np.random.default_rng(seed).standard_normal((sequences, steps))
    return (z * np.sqrt(steps / np.sum(z * z, axis=1, keepdims=True))).astype(np.float32)


def squared_errors(z: np.ndarray, codes: np.ndarray, k: float) -> np.ndarray:
    """Of each sequence, with levels at their nominal size."""
    errors: np.ndarray = np.sum((z - levels(codes, k) * (TRELLIS_CODES[k].unit / FIXED)) ** 2, axis=1)
    return errors


def exhaustive(z: np.ndarray, k: float) -> float:
    """The least squared error that any code of the sequence z reaches, in float64: all starts side by side."""
    code = TRELLIS_CODES[k]
    w = np.arange(512)
    states = 512 >> code.bits[0]
    metrics = np.where(np.eye(states, dtype=bool), 0, np.inf)  # [state, state at the start]
    for i in range(len(z)):
        coming, going = code.bits[i % 2], code.bits[(i + 1) % 2]
        cost = (z[i] - code.window_levels(i % 2) * (code.unit / FIXED)) ** 2
        total = metrics[w & ((512 >> coming) - 1)] + cost[:, None]
        metrics = total.reshape(-1, 1 << going, states).min(axis=1)
    return float(np.diag(metrics).min())


def test_cpp_has_the_same_tables() -> None:
    text = (ROOT / "csrc/codecs/trellis_tables.h").read_text(encoding="utf-8")
    found = {}
    for name, unit, body in re.findall(r"TrellisLevels kTcq(\d+)Levels\{(\d+), \{(.*?)\}\};", text, re.DOTALL):
        tables = tuple(
            tuple(map(int, re.findall(r"-?\d+", part))) for part in re.findall(r"\{(.*?)\}", body, re.DOTALL)
        )
        found[int(name) / (10 if len(name) == 2 else 1)] = (int(unit), tables)
    assert found == TRELLIS_TABLES


def test_cpp_has_the_same_parameters() -> None:
    text = (ROOT / "csrc/codecs/trellis.h").read_text(encoding="utf-8")
    found = {
        int(name) / (10 if len(name) == 2 else 1): tuple(map(int, numbers.split(",")))
        for name, numbers in re.findall(r"struct Tcq(\d+)Code : TrellisCode<([\d, ]+)>", text)
    }
    assert found == {k: (*code.bits, code.doublings, code.seam) for k, code in TRELLIS_CODES.items()}


@pytest.mark.parametrize("k", CODECS)
def test_tables_are_int8_and_fit_the_fixed_point(k: float) -> None:
    code = TRELLIS_CODES[k]
    assert code.tables.shape == (2, 128)
    assert int(np.abs(code.tables.astype(int)).max()) <= 127
    assert 127 * code.unit < 32768
    if code.bits[0] == code.bits[1]:
        assert (code.tables[0] == code.tables[1]).all()


@pytest.mark.parametrize("k", CODECS)
def test_windows_are_the_last_nine_bits_of_a_ring(k: float) -> None:
    code = TRELLIS_CODES[k]
    steps = 16
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 1 << code.bits[i % 2], 5, np.uint8) for i in range(steps)], axis=1)
    for row, found in zip(codes, windows(codes, k), strict=True):
        stream, ends = [], []
        for i, c in enumerate(row):
            stream += [int(c) >> bit & 1 for bit in range(code.bits[i % 2])]
            ends.append(len(stream))
        for end, w in zip(ends, found, strict=True):
            assert w == sum(stream[(end - 9 + bit) % len(stream)] << bit for bit in range(9))
    w = windows(codes, k)
    expected = [
        [(-1) ** ((v >> 8) ^ (v & 1)) * int(code.tables[i % 2][v >> 1 & 127]) for i, v in enumerate(row)] for row in w
    ]
    assert levels(codes, k).dtype == np.int8
    assert levels(codes, k).tolist() == expected


def test_to_fixed_rounds_half_to_even_and_cuts_off() -> None:
    z = np.array([0.5, 1.5, -0.5, -2.5, 8192, 40000, -40000, 32767.4], np.float32) / np.float32(FIXED)
    assert to_fixed(z).tolist() == [0, 2, 0, -2, 8192, 32767, -32768, 32767]
    assert to_fixed(z).dtype == np.int16


def test_exhaustive_search_is_exhaustive() -> None:
    z = gaussian(3, 6, 1)
    every = np.array(list(product(range(4), repeat=6)), np.uint8)
    for row in z:
        assert exhaustive(row, 2) == pytest.approx(squared_errors(row, every, 2).min(), abs=1e-9)


@pytest.mark.parametrize("k", CODECS)
def test_search_comes_close_to_the_exhaustive_one(k: float) -> None:
    z = gaussian(16, 64, 2)
    found = squared_errors(z, search(to_fixed(z), k), k)
    best = np.array([exhaustive(row.astype(np.float64), k) for row in z])
    assert (found >= best - 1e-9).all()
    assert found.mean() < best.mean() * 1.04


@pytest.mark.parametrize("k", CODECS)
def test_codes_have_the_bits_of_their_step(k: float) -> None:
    x = np.random.default_rng(3).integers(-32768, 32768, (40, 32), np.int16)
    codes = search(x, k)
    assert codes.dtype == np.uint8
    assert codes.shape == x.shape
    for i in range(32):
        assert int(codes[:, i].max()) < 1 << TRELLIS_CODES[k].bits[i % 2]


@pytest.mark.parametrize("k", CODECS)
def test_a_sequence_does_not_depend_on_its_neighbours(k: float) -> None:
    x = to_fixed(gaussian(300, 32, 4))
    assert (search(x, k)[200:203] == search(x[200:203], k)).all()


EXPECTED = {  # squared error per unit of energy, scale rule `mse`: (64 steps, 128 steps)
    1: (0.2774, 0.2756),
    2: (0.0727, 0.0730),
    2.5: (0.0372, 0.0376),
    3: (0.0192, 0.0194),
    3.5: (0.01004, 0.01022),
    4: (0.00514, 0.00523),
}


@pytest.mark.slow
@pytest.mark.parametrize("k", CODECS)
def test_distortion(k: float) -> None:
    for steps, expected in zip((64, 128), EXPECTED[k], strict=True):
        z = gaussian(1024 * 64 // steps, steps, steps)
        c = levels(search(to_fixed(z), k), k).astype(np.float64)
        xc, cc = np.sum(z * c, axis=1), np.sum(c * c, axis=1)
        assert np.mean(1 - xc * xc / (cc * steps)) == pytest.approx(expected, rel=0.01)


# What the C++ tests compare with: tests/cpp/trellis_golden.inc, of the inputs of tests/cpp/test_trellis.cpp.
def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n outputs of the C++ tests' generator."""
    with np.errstate(over="ignore"):
        gamma = np.uint64(0x9E3779B97F4A7C15)
        state = np.uint64(seed) * np.uint64(0x2545F4914F6CDD1D) + gamma * np.arange(1, n + 1, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def golden_input(steps: int) -> np.ndarray:
    """int16 [64, steps]: sequences() of the C++ test with 64 lanes and the seed `steps`."""
    words = splitmix64(steps, steps * 64).reshape(steps, 64)
    total = sum((words >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48)) - 131070
    x = np.clip(np.trunc(total / 4), -32768, 32767).astype(np.int64)
    i = np.arange(steps)
    x[:, 0], x[:, 8], x[:, 16] = -32768, 32767, 0
    x[:, 24] = np.where(i % 3 == 0, -32768, 32767)
    x[:, 32] = np.where(np.trunc(total[:, 32] / 4) < 0, -32768, 32767)
    x[:, 40] = np.where(i == steps // 2, 32767, 0)
    return x.astype(np.int16).T


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return value


@pytest.mark.parametrize("k", CODECS)
def test_cpp_golden_hashes(k: float) -> None:
    text = (ROOT / "tests/cpp/trellis_golden.inc").read_text(encoding="utf-8")
    found = re.findall(rf'{{"tcq{k:g}", (\d+), 0x(\w+)ULL}}', text)
    assert [int(steps) for steps, _ in found] == [16, 64, 128]
    for steps, value in found:
        assert fnv1a(search(golden_input(int(steps)), k).T.tobytes()) == int(value, 16), f"{steps} steps"
