"""Tiny models for the tests of measuring: random weights, two layers, nothing is fetched."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor

from kvpack.eval.models import LoadedModel, random_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    return random_model(layers=2)


@pytest.fixture(scope="session")
def tiny64() -> LoadedModel:
    return random_model("float64", layers=2, num_key_value_heads=1)


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 260), generator=torch.Generator().manual_seed(1))
