"""Speed and operator benchmarks: that they measure what they say, not how fast this machine is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvpack.eval import CacheSpec, decode_speed, prefill
from kvpack.eval import bench as benches
from kvpack.eval.cachespec import dense_bytes, fill
from kvpack.eval.models import LoadedModel
from kvpack.eval.showcase import QUICK, Sizes, long_prompt
from kvpack.eval.speed import STOCK, Spread, continue_text
from kvpack.eval.texts import Text


def test_prefill_holds_all_but_the_last_token(tiny: LoadedModel, ids: Tensor) -> None:
    cache = prefill(tiny.model, ids[0], chunk=100)
    assert cache.get_seq_length() == 259
    assert dense_bytes(cache) == 2 * 2 * 259 * 64 * 4


def test_a_filled_cache_is_what_a_prefill_leaves(tiny: LoadedModel, ids: Tensor) -> None:
    spec = CacheSpec("tq4", "tq3", window=20)
    filled = fill(spec, prefill(tiny.model, ids[0]), tiny.model.config)
    real = spec.build(tiny.model.config)
    with torch.no_grad():
        tiny.model(ids[:1, :-1], past_key_values=real)
        a = tiny.model(ids[:1, -1:], past_key_values=filled).logits
        b = tiny.model(ids[:1, -1:], past_key_values=real).logits
    assert filled.nbytes == real.nbytes
    assert torch.allclose(a, b, atol=1e-3)


def test_decode_speed_pairs_the_stock_cache(tiny: LoadedModel, ids: Tensor) -> None:
    context = prefill(tiny.model, ids[0])
    stock, packed = decode_speed(tiny.model, context, ["tq4"], int(ids[0, -1]), rounds=3, tokens_per_round=2)
    assert (stock.label, packed.label) == (STOCK, "tq4")
    assert stock.ratio == Spread(1.0, 1.0, 1.0)
    assert stock.compression == 1.0
    assert context.get_seq_length() == 259  # untouched
    assert packed.context == 259
    assert packed.compression == stock.cache_bytes / packed.cache_bytes
    assert packed.tokens_per_second.low <= packed.tokens_per_second.median <= packed.tokens_per_second.high


def test_continue_text_is_greedy_generation(tiny: LoadedModel, ids: Tensor) -> None:
    with torch.no_grad():
        want = tiny.model.generate(ids[:1], do_sample=False, max_new_tokens=5, pad_token_id=0)[0, 260:].tolist()
    assert continue_text(tiny.model, ids[0], prefill(tiny.model, ids[0]), 5) == want


def test_long_prompt_has_the_length_asked_for(tiny: LoadedModel) -> None:
    text = Text("t", ("first", "Compound statements\n*** " + "word " * 400))
    prompt, question = long_prompt(text, tiny.tokenizer, 300)
    assert 290 < len(prompt) <= 300
    assert "try statement" in question
    assert tiny.tokenizer.decode(prompt.tolist()).startswith("Compound statements")
    other, question = long_prompt(Text("t", ("abc " * 200,)), tiny.tokenizer, 200)
    assert 190 < len(other) <= 200
    assert question.startswith("Summarise")


def test_sizes_fit_the_model() -> None:
    small = Sizes().within(700)
    assert small.length == 700
    assert small.prompt + small.text < 700
    assert Sizes().within(8192) == Sizes()
    assert QUICK.window + QUICK.sinks + 64 < QUICK.first


@pytest.mark.parametrize("queries", [1, 5])
def test_bench_attend_is_right_before_it_is_timed(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    monkeypatch.setattr(benches, "COLD_BYTES", 1)
    shape = benches.BenchShape(context=200, kv_heads=2, group=2, head_dim=64, dtype="float32", queries=queries)
    assert shape.tokens == 256
    assert shape.copies(shape.dense_bytes) == 1
    keys, values = benches._random(shape, 0)
    query = torch.randn(1, 4, queries, 64)
    packed = benches._packed("exact", shape, query, keys, values, 1)
    if queries == 1:  # the packed side attends to one exact token more, the one that a step brings
        keys, values = (
            torch.cat(pair, dim=2) for pair in zip((keys, values), benches._random(shape, 1, 1), strict=True)
        )
    for name in (benches.TORCH, benches.GROUPED, benches.MATMUL):
        want = benches._stock(name, shape, query, keys, values).calls[0]()
        assert torch.allclose(packed.calls[0](), want.view(1, 4, queries, 64), atol=1e-3)
    assert packed.read == 2 * 2 * 256 * 64 * 4


def test_bench_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "COLD_BYTES", 1)
    shape = benches.BenchShape(context=256, kv_heads=1, group=2, head_dim=64)
    rows = benches.bench_attend(["exact@float32", "tq4", "tq4/tq3"], shape, rounds=2)
    rows += benches.bench_encode(["tq4"], shape, rounds=2)
    assert [(row.what, row.codec) for row in rows] == [
        ("attend", "torch"), ("attend", "torch, grouped"), ("attend", "torch, matmul"),
        ("attend", "exact@float32"), ("attend", "tq4"), ("attend", "tq4/tq3"), ("encode", "torch"), ("encode", "tq4"),
    ]  # fmt: skip
    assert all(row.ratio.median == 1.0 for row in rows if row.codec == "torch")
    read = rows[3].gigabytes_per_second * rows[3].microseconds.median * 1e3
    assert read == pytest.approx(2 * 256 * 64 * 4)  # as float32, in a run of bfloat16
    assert all(math.isfinite(row.microseconds.median) and row.gigabytes_per_second > 0 for row in rows)
    with pytest.raises(ValueError, match="unknown codec"):
        benches.bench_attend(["nope"], shape)
