"""A thousand tokens, one by one: pages stay where they are, and nothing else grows."""

from __future__ import annotations

import gc
import sys

import torch
import torch.nn.functional as F

from . import helpers as h


@torch.no_grad()
def test_a_thousand_steps() -> None:
    model = h.small()
    cache = h.packed(model, key="tq4", window=64)
    layer = cache.packed_layers[0]
    generator = torch.Generator().manual_seed(0)

    def step(tokens: int) -> None:
        keys, values = (torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(2))
        handles = cache.update(keys, values, 0)
        F.scaled_dot_product_attention(torch.randn(1, 4, 1, 64), *handles, enable_gqa=True)

    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    step(2000)
    for _ in range(100):
        step(1)
    before, pages, bytes_before = (
        blocks(),
        list(layer.table.rows[0]),
        [page.data.clone() for page in layer.table.rows[0]],
    )
    places = [page.data.data_ptr() for page in pages]
    full = layer.table.tiles // 4  # pages without room
    for _ in range(1000):
        step(1)
    grown = len(layer.table.rows[0]) - len(pages)
    assert layer.stats().fused_calls >= 1100
    assert 3 <= grown <= 5
    assert [page.data.data_ptr() for page in layer.table.rows[0][: len(pages)]] == places
    assert all(a is b for a, b in zip(layer.table.rows[0], pages, strict=False))
    for page, old in list(zip(pages, bytes_before, strict=True))[:full]:
        assert torch.equal(page.data, old)
    # Python objects: those of the new pages, and nothing that has an entry per step.
    assert blocks() - before < 500
