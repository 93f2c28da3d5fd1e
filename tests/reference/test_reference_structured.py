"""Inputs that are not Gaussian: measured second moments of channels, and offsets that all tokens share."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import kvpack
from kvpack.reference import CODECS

DATA = Path(os.environ["KVPACK_DATA"])
MOMENTS = DATA / "kv_stats" / "llama-3.1-8b.second-moments.json"
ROTATED = [name for name, codec in CODECS.items() if codec.rotated]
D = 128


def error_of(text: str, side: str, x: np.ndarray) -> float:
    """Mean over the vectors of |decoded - x|^2 / |x|^2; the compiled encoder has the reference's bytes."""
    codec = kvpack.codec(text, x.shape[-1], side)  # type: ignore[arg-type]
    wide = x.astype(np.float64)
    error = codec.decode(codec.encode(x)).astype(np.float64) - wide
    return float(np.mean(np.sum(error**2, axis=-1) / np.sum(wide**2, axis=-1)))


@pytest.fixture(scope="module")
def moments() -> dict[str, np.ndarray]:
    """E[x^2] of channels, [heads, 128], keys and values of every fourth layer."""
    if not MOMENTS.exists():
        pytest.skip("no measured second moments: kv_stats is not below $KVPACK_DATA")
    stored = json.loads(MOMENTS.read_text())
    layers = [stored[name] for name in sorted(name for name in stored if name.startswith("layer_"))[::4]]
    return {
        side: np.array([head for layer in layers for head in layer[letter].values()], np.float64)
        for side, letter in (("key", "K"), ("value", "V"))
    }


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("name", ROTATED)
def test_measured_channels_cost_no_more_than_gaussian_vectors(
    moments: dict[str, np.ndarray], name: str, side: str
) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((len(moments[side]), 64, D), np.float32)
    x = z * np.sqrt(moments[side])[:, None].astype(np.float32)
    assert error_of(name, side, x) <= 1.03 * error_of(name, side, z)


@pytest.mark.parametrize("center", ["mean", "tile"])
@pytest.mark.parametrize("name", ROTATED)
def test_centring_repairs_a_common_offset(name: str, center: str) -> None:
    """Keys with an offset of 20 standard deviations: the error is that of keys without one, to 5 %."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 256, D), np.float32)
    offset = 20 * np.where(rng.random((4, 1, D)) < 0.5, np.float32(-1), np.float32(1))

    def squares(text: str, keys: np.ndarray) -> float:
        codec = kvpack.codec(text, D, "key")
        return float(np.sum((codec.decode(codec.encode(keys)).astype(np.float64) - keys) ** 2))

    centred = squares(f"{name}:center={center}", x)
    assert squares(f"{name}:center={center}", x + offset) <= 1.05 * centred
    assert squares(name, x + offset) > 50 * centred
