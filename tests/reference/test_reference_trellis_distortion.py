"""What the trellis codecs cost on Gaussian vectors, through the compiled encoder, whose bytes are the reference's."""

import numpy as np
import pytest

import kvpack
from kvpack.reference import CODECS

# Squared error per unit of energy under `mse`.
BOUNDS = {"tcq1": 0.282, "tcq2": 0.0760, "tcq2.5": 0.042, "tcq3": 0.0206, "tcq3.5": 0.0122, "tcq4": 0.0056}


def relative_error(text: str, d: int, side: str, vectors: int, seed: int) -> float:
    codec = kvpack.codec(text, d, side)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    chunk = 1 << 12
    total = 0.0
    for _ in range(vectors // chunk):
        x = rng.standard_normal((chunk, d), np.float32)
        wide = x.astype(np.float64)
        error = codec.decode(codec.encode(x)).astype(np.float64) - wide
        total += float(np.sum(np.sum(error**2, axis=1) / np.sum(wide**2, axis=1)))
    return total / vectors


def test_every_trellis_codec_has_its_bound() -> None:
    assert set(BOUNDS) == {name for name, codec in CODECS.items() if codec.stream}


@pytest.mark.parametrize("vectors", [1 << 13, pytest.param(1 << 17, marks=pytest.mark.full)])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", BOUNDS)
def test_distortion(name: str, d: int, side: str, vectors: int) -> None:
    found = relative_error(f"{name}:scale=mse", d, side, vectors, d)
    assert 4 ** -CODECS[name].bits < found <= BOUNDS[name]  # below, no code comes


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("name", BOUNDS)
def test_search_lowers_the_error(name: str, side: str) -> None:
    plain, found = (relative_error(f"{name}:scale=mse{more}", 64, side, 1 << 12, 1) for more in ("", ",search"))
    assert 0.85 * plain < found < plain
