"""With `exact` and `fused=False` the cache is DynamicCache, bit for bit, in every way models are run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from . import helpers as h


def same(model: Any, ids: torch.Tensor, **options: Any) -> None:
    ours = h.packed(model, fused=False)
    a, logits_a = h.generate(model, ours, ids, **options)
    b, logits_b = h.generate(model, h.stock(model), ids, **options)
    assert torch.equal(a, b)
    assert len(logits_a) == len(logits_b)
    assert all(torch.equal(x, y) for x, y in zip(logits_a, logits_b, strict=True))
    assert all(layer.tokens_packed > 0 for layer in ours.stats())


MODELS = {"llama": h.llama, "mha": lambda: h.llama(4), "eager": lambda: h.llama(2, "eager"), "qwen3": h.qwen}


@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str) -> None:
    same(MODELS[name](), h.tokens(1, 100))


def test_batch() -> None:
    same(h.llama(), h.tokens(3, 100))


def test_sampling() -> None:
    same(h.llama(), h.tokens(1, 100), do_sample=True, num_return_sequences=3)


@pytest.mark.parametrize("sample", [False, True])
def test_beam(sample: bool) -> None:
    same(h.llama(), h.tokens(2, 80), new=70, num_beams=3, do_sample=sample)


def test_prompt_lookup() -> None:
    same(h.llama(), h.tokens(1, 40).repeat(1, 3), prompt_lookup_num_tokens=6)


def test_assisted() -> None:
    model = h.llama()
    same(model, h.tokens(1, 100), assistant_model=h.llama())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
@pytest.mark.parametrize("name", ["llama", "eager"])
def test_left_padded(name: str, options: dict[str, Any]) -> None:
    ids, mask = h.padded([120, 31, 77])
    same(MODELS[name](), ids, attention_mask=mask, **options)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunked_prefill(chunk: int) -> None:
    same(h.llama(), h.tokens(1, 230), new=10, prefill_chunk_size=chunk)


def test_chunked_prefill_padded() -> None:
    ids, mask = h.padded([230, 40])
    same(h.llama(), ids, new=40, prefill_chunk_size=50, attention_mask=mask)


def test_turns() -> None:
    model = h.llama()
    ours, theirs = h.packed(model, fused=False), h.stock(model)
    ids_a = ids_b = h.tokens(1, 70)
    for turn in range(3):
        ids_a, logits_a = h.generate(model, ours, ids_a, new=60)
        ids_b, logits_b = h.generate(model, theirs, ids_b, new=60)
        assert torch.equal(ids_a, ids_b)
        assert all(torch.equal(x, y) for x, y in zip(logits_a, logits_b, strict=True))
        question = h.tokens(1, 30, seed=turn)
        ids_a, ids_b = torch.cat((ids_a, question), 1), torch.cat((ids_b, question), 1)


def test_deepcopy_of_a_prefix() -> None:
    model = h.llama()
    prefix = h.tokens(1, 200)
    ours, theirs = h.packed(model, fused=False), h.stock(model)
    h.run(model, ours, prefix, [200])
    h.run(model, theirs, prefix, [200])
    for seed in range(2):
        ids = torch.cat((prefix, h.tokens(1, 100, seed)), dim=1)
        a = h.run(model, copy.deepcopy(ours), ids, [20])
        b = h.run(model, copy.deepcopy(theirs), ids, [20])
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunks", [[260], [65, 3, 128, 1, 64], [3, 1, 1, 200]])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (0, 4), (64, 0), (64, 4), (100, 70)])
def test_teacher_forced(chunks: list[int], rows: int, window: int, sinks: int) -> None:
    model = h.llama()
    ids = h.tokens(rows, 300)
    ours = h.packed(model, fused=False, window=window, sinks=sinks)
    assert torch.equal(h.run(model, ours, ids, chunks), h.run(model, h.stock(model), ids, chunks))


def test_handles_decode_for_eager_attention() -> None:
    """Fused, with attention that is not sdpa: handles decode, and the result is DynamicCache's."""
    model = h.llama(2, "eager")
    ids = h.tokens(1, 200)
    ours = h.packed(model)
    assert torch.equal(h.run(model, ours, ids, [100]), h.run(model, h.stock(model), ids, [100]))
    assert ours.stats()[0].fused_calls == 0
    assert sum(ours.stats()[0].fallback_calls.values()) == 100


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # flex compiles, and torch warns on the way
def test_handles_decode_for_flex_attention() -> None:
    """Transformers compiles flex attention: handles decode inside its graph, which sums in another order."""
    model = h.llama(2, "flex_attention")
    ids = h.tokens(1, 140)
    ours = h.packed(model)
    assert h.error(h.run(model, ours, ids, [100]), h.run(model, h.stock(model), ids, [100])) <= 1e-5
    dense = h.packed(model, fused=False)
    assert torch.equal(h.run(model, dense, ids, [100]), h.run(model, h.stock(model), ids, [100]))


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
