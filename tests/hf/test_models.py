"""Head sizes, and what a cache says of itself. tests/families has the model families."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import kvpack

from . import helpers as h


@pytest.mark.parametrize("head_dim", [80, 96, 112, 160, 192])
def test_head_sizes_that_are_no_powers_of_two(head_dim: int) -> None:
    model = h.build(LlamaForCausalLM, LlamaConfig(**{**h.SHAPE, "head_dim": head_dim}))
    ids = h.tokens(2, 200)
    want = h.run(model, h.stock(model), ids, [150])
    assert torch.equal(h.run(model, h.packed(model, fused=False), ids, [150]), want)
    assert h.error(h.run(model, h.packed(model), ids, [150]), want) <= 1e-4
    for codec in ("q8_0", "q4_0", "tq3"):
        cache = h.packed(model, key=codec, precision="high")
        fused = h.run(model, cache, ids, [150])
        assert all(layer["fused_calls"] > 0 for layer in map(vars, cache.stats()))
        dense = h.run(model, h.packed(model, key=codec, fused=False), ids, [150])
        assert h.error(fused, dense) <= 1e-3


def test_the_cache_says_what_it_is() -> None:
    model = h.llama()
    cache = kvpack.Cache(model.config, key="tq4", value="tq3:scale=mse")
    assert repr(cache).startswith(
        "kvpack.Cache(a llama model, tq4:center=tile/tq3:scale=mse,center=mean, 2 of 2 layers packed, 0 tokens, "
    )
    assert "PackedLayer(1, tq4:center=tile/tq3:scale=mse,center=mean, 0 tokens, 0 packed)" in repr(cache.layers[1])
    assert len(cache) == 2
    assert all(layer.is_croppable for layer in cache.layers)
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert cache.get_seq_length() == 0
    stats = cache.stats()[1]
    assert (stats.layer, stats.key, stats.value) == (1, "tq4:center=tile", "tq3:scale=mse,center=mean")


def test_value_defaults_to_key() -> None:
    layer = kvpack.Cache(h.llama().config, key="q8_0").packed_layers[0]
    assert str(layer.specs[1]) == "q8_0"


def test_early_initialization() -> None:
    model = h.llama()
    cache = h.packed(model)
    cache.early_initialization(1, 2, 64, torch.float32, torch.device("cpu"))
    ids = h.tokens(1, 150)
    assert h.error(h.run(model, cache, ids, [100]), h.run(model, h.stock(model), ids, [100])) <= 1e-4
