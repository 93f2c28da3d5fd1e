"""With `exact` and `fused=False` the cache is DynamicCache, bit for bit, however tokens are divided into calls.

tests/families has the modes of generation, over model families.
"""

from __future__ import annotations

import copy

import pytest
import torch

from . import helpers as h


@pytest.mark.parametrize("chunks", [[260], [65, 3, 128, 1, 64], [3, 1, 1, 200]])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (0, 4), (64, 0), (64, 4), (100, 70)])
def test_teacher_forced(chunks: list[int], rows: int, window: int, sinks: int) -> None:
    model = h.llama()
    ids = h.tokens(rows, 300)
    ours = h.packed(model, fused=False, window=window, sinks=sinks)
    assert torch.equal(h.run(model, ours, ids, chunks), h.run(model, h.stock(model), ids, chunks))


@pytest.mark.filterwarnings(h.DECODED)
def test_handles_decode_for_eager_attention() -> None:
    """Fused, with attention that is not sdpa: handles decode, and the result is DynamicCache's."""
    model = h.llama(2, "eager")
    ids = h.tokens(1, 200)
    ours = h.packed(model)
    assert torch.equal(h.run(model, ours, ids, [100]), h.run(model, h.stock(model), ids, [100]))
    assert ours.stats()[0].fused_calls == 0
    assert sum(ours.stats()[0].fallback_calls.values()) == 100


def test_corrupted_pages_change_the_logits() -> None:
    """The packed bits are really read."""
    model = h.llama()
    ids = h.tokens(1, 300)
    ours = h.packed(model, fused=False)
    h.run(model, ours, ids[:, :299], [299])
    broken = copy.deepcopy(ours)
    for layer in broken.packed_layers:
        for page in layer.table.rows[0]:
            page.data[:] = 0
    good = h.run(model, h.stock(model), ids, [299])[:, -1]
    assert not torch.equal(h.run(model, broken, ids, [])[:, -1], good)
