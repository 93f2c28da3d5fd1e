"""The codebook tables are what they claim: int8 roundings of the Lloyd-Max quantizers of N(0, 1)."""

import numpy as np
import pytest

from kvpack.reference import CODEBOOKS, CODECS, distortion, lloyd_max

BOOKS = {1: "tq1", 2: "tq2", 3: "tq3", 4: "tq4"}
OPTIMA = {
    1: ([0.7979], 0.3634),
    2: ([0.4528, 1.5104], 0.1175),
    3: ([0.2451, 0.7560, 1.3439, 2.1519], 0.03455),
    4: ([0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], 0.00950),
}


@pytest.mark.parametrize("bits", OPTIMA)
def test_lloyd_max_gives_the_published_centroids(bits: int) -> None:
    centroids, expected = OPTIMA[bits]
    assert lloyd_max(bits) == pytest.approx(centroids, abs=6e-5)
    assert distortion(lloyd_max(bits)) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("bits", OPTIMA)
def test_distortion_in_closed_form_is_that_of_samples(bits: int) -> None:
    centroids = np.array(lloyd_max(bits))
    z = np.abs(np.random.default_rng(bits).standard_normal(1 << 20))
    nearest = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, z)]
    assert np.mean((z - nearest) ** 2) == pytest.approx(distortion(lloyd_max(bits)), rel=5e-3)


@pytest.mark.parametrize("bits", OPTIMA)
def test_int8_levels_cost_less_than_six_hundredths_of_a_percent(bits: int) -> None:
    book = CODEBOOKS[BOOKS[bits]]
    best = distortion(lloyd_max(bits))
    assert 1 <= distortion(book.centroids.tolist()) / best < 1.0006


@pytest.mark.parametrize("bits", OPTIMA)
def test_unit_is_the_best_one_for_its_levels(bits: int) -> None:
    book = CODEBOOKS[BOOKS[bits]]
    for factor in (0.999, 1.001):
        scaled = [level * book.unit * factor for level in book.positive]
        assert distortion(scaled) > distortion(book.centroids.tolist())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_levels_are_ascending_symmetric_int8(name: str) -> None:
    levels = CODEBOOKS[name].levels
    assert levels.dtype == np.int8
    assert len(levels) == 2 ** CODEBOOKS[name].bits == 2 ** CODECS[name].bits
    assert (np.diff(levels.astype(int)) > 0).all()
    assert (levels == -levels[::-1]).all()
    assert int((levels.astype(int) ** 2).max()) * 256 < 2**24  # <c, c> of a head is exact in float32


def test_thresholds_are_pinned() -> None:
    literal = {
        "tq1": [],
        "tq2": [65 * 0.015104],
        "tq3": [20.5 * 0.024448, 43 * 0.024448, 71.5 * 0.024448],
        "tqr3": [18 * 0.025176, 39 * 0.025176, 60 * 0.025176],
        "tq4": [half * 0.026219 for half in (10.0, 20.0, 30.5, 42.0, 55.0, 70.5, 91.5)],
    }
    assert set(literal) == set(CODEBOOKS)
    for name, expected in literal.items():
        assert CODEBOOKS[name].thresholds.dtype == np.float32
        assert CODEBOOKS[name].thresholds.tolist() == np.array(expected).astype(np.float32).tolist()


def test_two_bits_and_the_sign_of_the_residual() -> None:
    """tqr3: the levels of two bits -+ the mean size of their residuals, which lowers D(2 bits) by its square."""
    best = lloyd_max(2)
    z = np.linspace(0, 12, 2_000_001)
    weight = np.exp(-z * z / 2)
    nearest = np.where(z < sum(best) / 2, *best)
    residual = float(np.sum(weight * np.abs(z - nearest)) / np.sum(weight))
    assert residual == pytest.approx(0.2753, abs=1e-4)
    ideal = sorted(level + sign * residual for level in best for sign in (-1, 1))
    assert CODEBOOKS["tqr3"].centroids == pytest.approx(ideal, abs=0.006)
    assert distortion(best) - residual**2 == pytest.approx(0.0417, abs=1e-4)
    assert distortion(CODEBOOKS["tqr3"].centroids.tolist()) == pytest.approx(0.0417, rel=0.01)
