"""The fused path: attention over packed bits, in every layout of query and mask that transformers uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kvpack import Cache, codecs

from . import helpers as h


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_exact_teacher_forced(kv_heads: int, rows: int) -> None:
    model = h.llama(kv_heads)
    ids = h.tokens(rows, 330)
    ours = h.packed(model)
    got = h.run(model, ours, ids, [120, 90, 40])
    assert h.error(got, h.run(model, h.stock(model), ids, [120, 90, 40])) <= 1e-4
    stats = ours.stats()[0]
    assert stats.fused_calls == 82
    assert stats.fallback_calls == {}
    assert stats.packed_tokens_read > 0


def test_exact_teacher_forced_bf16() -> None:
    model = h.build(type(h.llama()), h.llama().config).to(torch.bfloat16)
    ids = h.tokens(1, 330)
    ours = h.packed(model)
    got = h.run(model, ours, ids, [120, 90, 40])
    assert h.error(got, h.run(model, h.stock(model), ids, [120, 90, 40])) <= 2e-2
    assert ours.stats()[0].fused_calls > 0


@pytest.mark.parametrize("codec", [*codecs()[1:], "tq4:center=none", "tq3:center=mean"])
@pytest.mark.parametrize("precision", ["default", "high"])
def test_fused_is_what_dense_is(codec: str, precision: str) -> None:
    """Fused attention over packed bits against torch's over the decoded tensors."""
    model = h.llama()
    ids = h.tokens(2, 300)
    fused = h.packed(model, key=codec, precision=precision)
    dense = h.packed(model, key=codec, fused=False)
    h.run(model, fused, ids[:, :290], [290])
    h.run(model, dense, ids[:, :290], [290])
    for a, b in zip(fused.packed_layers, dense.packed_layers, strict=True):
        assert torch.equal(a.keys, b.keys)  # the prompt was packed alike
    got, want = h.run(model, fused, ids, []), h.run(model, dense, ids, [])
    assert h.error(got, want) <= (1e-3 if precision == "high" else 5e-2)


def test_values_of_negligible_tiles_stay_unread() -> None:
    """The share bounds what is missing; `stats` counts, where a share was asked for."""
    sharp = LlamaConfig(**{**h.SHAPE, "num_hidden_layers": 1, "initializer_range": 0.6})
    model = h.build(LlamaForCausalLM, sharp)
    ids = h.tokens(2, 700)
    every = h.packed(model, key="tq4", precision="high")
    some = h.packed(model, key="tq4", precision="high", sparse_values=1e-3)
    want, got = (h.run(model, cache, ids, [690, 4]) for cache in (every, some))
    assert 0 < h.error(got, want) <= 1e-3
    stats = some.stats()[0]
    # 2 rows, 2 KV heads, 9 tiles: 4 tokens of 2 query heads are 2 groups of query rows; then 6 times one token.
    assert stats.value_tiles_met == 2 * 2 * 9 * (2 + 6)
    assert 0 < stats.value_tiles_unread < stats.value_tiles_met
    assert (every.stats()[0].value_tiles_met, every.stats()[0].value_tiles_unread) == (0, 0)
    some.reset()
    assert (some.stats()[0].value_tiles_met, some.stats()[0].value_tiles_unread) == (0, 0)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_rank_packs_its_share_of_the_heads(kv_heads: int) -> None:
    """Under tensor parallelism a cache made from the model's config is given some of its KV heads only."""
    config = LlamaConfig(**{**h.SHAPE, "num_key_value_heads": kv_heads, "num_hidden_layers": 1})
    generator = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, 2, kv_heads, 300, 64, generator=generator)
    steps = torch.randn(2, 3, 2, kv_heads, 1, 64, generator=generator)
    queries = torch.randn(3, 2, 4, 1, 64, generator=generator)
    mask = torch.ones(2, 1, 1, 303, dtype=torch.bool)
    mask[1, ..., :40] = False  # left padding
    group = 4 // kv_heads

    def run(first: int, last: int) -> list[torch.Tensor]:
        """Query heads `first` to `last`, with the KV heads that they read: without a mask, and with it."""
        out = []
        mine = slice(first // group, last // group)
        cache = Cache(config, key="tq4", value="tq3", window=16)
        cache.set_padding(mask[:, 0, 0, :300])
        cache.update(keys[:, mine], values[:, mine], 0)
        for step in range(3):
            k, v = cache.update(steps[0, step][:, mine], steps[1, step][:, mine], 0)
            q = queries[step][:, first:last]
            out.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
            grouped = q.reshape(2, (last - first) // group, group, 64)  # as transformers packs one masked token
            masked = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[..., : 301 + step])
            out.append(masked.reshape(q.shape))
        assert cache.stats()[0].fused_calls == 6
        return out

    for whole, *ranks in zip(run(0, 4), run(0, 2), run(2, 4), strict=True):
        assert torch.equal(whole, torch.cat(ranks, dim=1))


def test_cheap_codecs_are_not_exact() -> None:
    model = h.llama()
    ids = h.tokens(1, 300)
    want = h.run(model, h.stock(model), ids, [200])
    assert h.error(h.run(model, h.packed(model, key="tq2"), ids, [200]), want) > 1e-3


def handles(cache: Cache, rows: int = 1, count: int = 1) -> tuple[Any, Any]:
    torch.manual_seed(5)
    kv_heads, layer = 2, cache.packed_layers[0]
    dim = 64
    layer.update(torch.randn(rows, kv_heads, 200, dim), torch.randn(rows, kv_heads, 200, dim))
    layer.nothing_to_learn()
    return layer.update(torch.randn(rows, kv_heads, count, dim), torch.randn(rows, kv_heads, count, dim))


def reference(query: torch.Tensor, key: Any, value: Any, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key.dense(), value.dense(), **options)


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = {
    "grouped": ((2, 4, 1, 64), None, {"enable_gqa": True}),
    "grouped, several": ((2, 4, 3, 64), (2, 1, 3, 203), {"enable_gqa": True}),
    "packed grouped": ((2, 2, 2, 64), (2, 1, 1, 203), {}),
    "packed grouped, mask of heads": ((2, 2, 2, 64), (2, 2, 2, 203), {}),
    "packed grouped, mask of kv heads": ((2, 2, 2, 64), (2, 2, 1, 203), {}),
    "packed grouped, mask of rows": ((2, 2, 2, 64), (1, 1, 2, 203), {}),
    "packed grouped, no mask": ((2, 2, 2, 64), None, {}),
    "plain": ((2, 2, 5, 64), (2, 1, 5, 203), {"scale": 0.3}),
    "two dims": ((2, 2, 5, 64), (5, 203), {}),
    "three dims": ((2, 2, 5, 64), (2, 5, 203), {}),
}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_query_and_mask_layouts(name: str, additive: bool) -> None:
    shape, mask_shape, options = CASES[name]
    key, value = handles(h.packed(h.llama()), rows=2, count=3)
    query = torch.randn(shape)
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) < 0.7
        if additive:
            mask = torch.randn(mask_shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    assert key.call.layer.stats().fused_calls == 1
    assert key.call.layer.stats().fallback_calls == {}
    assert h.error(got, reference(query, key, value, attn_mask=mask, **options)) <= 1e-5


def test_a_single_kv_head_serves_all_query_heads() -> None:
    """Without enable_gqa, as Falcon calls it: torch repeats a single head."""
    layer = h.packed(h.llama(1)).packed_layers[0]
    layer.update(torch.randn(2, 1, 200, 64), torch.randn(2, 1, 200, 64))
    layer.nothing_to_learn()
    key, value = layer.update(torch.randn(2, 1, 1, 64), torch.randn(2, 1, 1, 64))
    query = torch.randn(2, 4, 1, 64)
    got = F.scaled_dot_product_attention(query, key, value)
    assert layer.stats().fused_calls == 1
    assert h.error(got, reference(query, key, value)) <= 1e-5


def test_repeat_kv_stays_lazy() -> None:
    from transformers.models.llama.modeling_llama import repeat_kv

    key, value = handles(h.packed(h.llama()))
    query, mask = torch.randn(1, 4, 2, 64), torch.rand(1, 1, 2, 201) < 0.5
    repeated = repeat_kv(key, 2), repeat_kv(value, 2)
    assert repeated[0].shape == (1, 4, 201, 64)
    got = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    assert key.call.layer.stats().fallback_calls == {}
    want = F.scaled_dot_product_attention(query, key.dense(), value.dense(), attn_mask=mask, enable_gqa=True)
    assert h.error(got, want) <= 1e-5
    assert torch.equal(repeated[0].dense(), repeat_kv(key.dense(), 2))


@pytest.mark.parametrize(
    ("reason", "options"),
    [("dropout", {"dropout_p": 0.5}), ("gradients", {}), ("query heads", {"enable_gqa": False})],
)
def test_what_cannot_be_fused_decodes_and_is_counted(reason: str, options: dict[str, Any]) -> None:
    key, value = handles(h.packed(h.llama()))
    heads = 2 if reason != "query heads" else 1  # one query head, two KV heads: torch repeats the query
    query = torch.randn(1, heads, 1, 64, requires_grad=reason == "gradients")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=rf"layer 0 were decoded .*\({reason}\)"):
        got = F.scaled_dot_product_attention(query, key, value, **options)
    assert key.call.layer.stats().fallback_calls == {reason: 1}
    torch.manual_seed(0)
    assert torch.equal(got, reference(query, key, value, **options))
    if reason == "gradients":
        got.sum().backward()
        assert query.grad is not None


def test_gradients_flow_through_the_calls_own_tokens() -> None:
    layer = h.packed(h.llama()).packed_layers[0]
    layer.update(torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64))
    own = torch.randn(1, 2, 3, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="no_grad"):
        key, value = layer.update(own, own * 2)
    assert isinstance(key, torch.Tensor)
    (key.sum() + value.sum()).backward()
    assert torch.equal(own.grad, torch.full_like(own, 3.0))
    assert layer.stats().fallback_calls == {"gradients": 1}
    assert layer.window is not None
    assert not layer.window[0].requires_grad


def test_is_causal_with_a_history_is_refused() -> None:
    key, value = handles(h.packed(h.llama()), count=3)
    with pytest.raises(RuntimeError, match="layer 0: is_causal=True with 3 queries and 203 keys"):
        F.scaled_dot_product_attention(torch.randn(1, 4, 3, 64), key, value, is_causal=True, enable_gqa=True)


def test_mask_of_another_length_is_refused() -> None:
    key, value = handles(h.packed(h.llama()))
    with pytest.raises(ValueError, match="200 columns, but the cache holds 201"):
        F.scaled_dot_product_attention(
            torch.randn(1, 4, 1, 64), key, value, attn_mask=torch.ones(1, 1, 1, 200).bool(), enable_gqa=True
        )


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    key, value = handles(h.packed(h.llama()), rows=2)
    mask = torch.ones(2, 1, 1, 201, dtype=torch.bool)
    mask[1] = False
    out = F.scaled_dot_product_attention(torch.randn(2, 4, 1, 64), key, value, attn_mask=mask, enable_gqa=True)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert bool(out[0].any())


def test_inference_mode_and_back() -> None:
    model = h.llama()
    ids = h.tokens(1, 300)
    ours = h.packed(model)
    with torch.inference_mode():
        h.run(model, ours, ids[:, :150], [100])
    h.run(model, ours, ids[:, :220], [])
    with torch.inference_mode():
        ours.batch_repeat_interleave(2)
    got = h.run(model, ours, ids.repeat(2, 1), [])
    want = h.run(model, h.stock(model), ids, [100])
    assert h.error(got[:1], want[:, 220:]) <= 1e-4
    assert h.error(got[1:], want[:, 220:]) <= 1e-4


@pytest.mark.filterwarnings(h.DECODED)
def test_float64_needs_the_dense_path() -> None:
    model = h.build(type(h.llama()), h.llama().config).double()
    ids = h.tokens(1, 200)
    dense = h.packed(model, key="q8_0", fused=False)
    fused = h.packed(model, key="q8_0")
    assert torch.equal(h.run(model, dense, ids, [150]), h.run(model, fused, ids, [150]))
    assert fused.stats()[0].fallback_calls == {"query of torch.float64": 50}
