"""`allocate`: the knapsack is exact, the budget is kept, predictions order what is measured."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import kvpack
from kvpack.eval import metrics
from kvpack.eval.allocate import allocate, choose, distortion, sensitivities, verify
from kvpack.eval.models import LoadedModel

SMALL: dict[str, Any] = {"window": 20, "skip": 120}


def test_choose_is_exact() -> None:
    draw = np.random.default_rng(3)
    for _ in range(20):
        cost = draw.random((5, 3)).tolist()
        size = (64 * draw.integers(1, 9, (5, 3))).tolist()
        budget = int(draw.integers(sum(map(min, size)), sum(map(max, size)) + 64))
        picked = choose(cost, size, budget)
        combinations = list(itertools.product(range(3), repeat=5))

        def total(table: list[list[float]], choice: Any) -> float:
            return sum(row[i] for row, i in zip(table, choice, strict=True))

        best = min(total(cost, c) for c in combinations if total(size, c) <= budget)
        assert total(size, picked) <= budget
        assert total(cost, picked) == pytest.approx(best)
    with pytest.raises(ValueError, match="budget of 100 bytes is below 128"):
        choose([[1.0], [1.0]], [[64], [64]], 100)


def test_distortion_is_that_of_the_quantizer() -> None:
    """Lloyd-Max of a Gaussian: 0.1175, 0.03454, 0.009497 (Max 1960), a little more with the norm kept (scale rule)."""
    for codec, known in (("tq2", 0.1175), ("tq3", 0.03454), ("tq4", 0.009497)):
        assert known * 0.95 < distortion(codec, 128) < known * 1.1
    assert distortion("exact", 64) == 0


def test_ratio_interval() -> None:
    draw = np.random.default_rng(0)
    y = draw.random(4000) + 0.5
    x = 0.7 * y + draw.normal(0, 0.1, 4000)
    groups = metrics.clusters(np.arange(4000) // 100, np.arange(4000) // 100)
    found = metrics.ratio_interval(x, y, groups)
    assert found.value == pytest.approx(x.mean() / y.mean())
    assert found.low < 0.7 < found.high
    assert found.half < 0.01


def test_allocate_and_verify(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    found = allocate(tiny, ids, 3.25, path=path, name="mine", **SMALL)
    assert len(path.read_text().splitlines()) == 4
    assert [(layer, side) for layer, side, _ in found.sensitivity] == [
        (0, "key"), (0, "value"), (1, "key"), (1, "value"),
    ]  # fmt: skip
    assert all(value > 0 for _, _, value in found.sensitivity)
    assert found.bits <= 3.25
    assert found.uniform_bits <= 3.25
    assert found.predicted <= found.uniform_predicted
    assert found.policy.name == "mine"
    assert (found.policy.window, found.policy.sinks) == (20, 4)
    again = allocate(tiny, ids, 3.25, path=path, name="mine", **SMALL)
    assert again == found
    assert len(path.read_text().splitlines()) == 4
    measured = verify(tiny, ids, found, skip=120)
    assert measured.ratio.value == pytest.approx(measured.policy.value / measured.uniform.value)
    # The sum of single sensitivities is the right order of magnitude.
    assert 0.3 < found.uniform_predicted / measured.uniform.value < 3
    assert kvpack.Policy.from_json(found.to_json()["policy"]) == found.policy


def test_all_bits_and_few_bits(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"path": tmp_path / "s.jsonl", **SMALL}
    ladder = ["tq2", "q8_0", "tq3:scale=mse"]
    assert allocate(tiny, ids, 8.5, ladder=ladder, **options).policy.codecs(1) == ("q8_0", "q8_0")
    least = allocate(tiny, ids, 2.332, ladder=ladder, **options)
    assert least.policy.is_uniform
    assert least.predicted == least.uniform_predicted
    with pytest.raises(ValueError, match=r"bits=2 is below the smallest codec of the ladder, which takes 2.331"):
        allocate(tiny, ids, 2, ladder=ladder, **options)
    with pytest.raises(ValueError, match="nothing to choose"):
        allocate(tiny, ids, 3, ladder=["tq2", "tq2"], **options)
    with pytest.raises(ValueError, match="loses nothing"):
        allocate(tiny, ids, 3, probe="exact", **options)
    with pytest.raises(ValueError, match="unknown codec 'tq9'"):
        allocate(tiny, ids, 3, ladder=["tq9", "tq2"], **options)


def test_sensitivities_are_those_of_one_side_alone(tiny: LoadedModel, ids: Tensor) -> None:
    coarse = sensitivities(tiny, ids, "tq2", **SMALL)
    fine = sensitivities(tiny, ids, "tq4", **SMALL)
    assert coarse.keys() == fine.keys()
    assert all(coarse[item] > 3 * fine[item] for item in coarse)
