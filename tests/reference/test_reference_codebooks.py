"""The codebook tables are what they claim: int8 roundings of the Lloyd-Max quantizers of N(0, 1)."""

import numpy as np
import pytest

from kvpack.reference import CODEBOOKS, distortion, lloyd_max

OPTIMA = {
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
    book = CODEBOOKS[bits]
    best = distortion(lloyd_max(bits))
    assert 1 <= distortion(book.centroids.tolist()) / best < 1.0006


@pytest.mark.parametrize("bits", OPTIMA)
def test_unit_is_the_best_one_for_its_levels(bits: int) -> None:
    book = CODEBOOKS[bits]
    for factor in (0.999, 1.001):
        scaled = [level * book.unit * factor for level in book.positive]
        assert distortion(scaled) > distortion(book.centroids.tolist())


@pytest.mark.parametrize("bits", OPTIMA)
def test_levels_are_ascending_symmetric_int8(bits: int) -> None:
    levels = CODEBOOKS[bits].levels
    assert levels.dtype == np.int8
    assert len(levels) == 2**bits
    assert (np.diff(levels.astype(int)) > 0).all()
    assert (levels == -levels[::-1]).all()
    assert int((levels.astype(int) ** 2).max()) * 256 < 2**24  # <c, c> of a head is exact in float32


def test_thresholds_are_pinned() -> None:
    literal = {
        2: [65 * 0.015104],
        3: [20.5 * 0.024448, 43 * 0.024448, 71.5 * 0.024448],
        4: [half * 0.026219 for half in (10.0, 20.0, 30.5, 42.0, 55.0, 70.5, 91.5)],
    }
    for bits, expected in literal.items():
        assert CODEBOOKS[bits].thresholds.dtype == np.float32
        assert CODEBOOKS[bits].thresholds.tolist() == np.array(expected).astype(np.float32).tolist()
