"""Attention implementations: `kvpack`, which `kvpack.enable` sets, and others, over packed bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import kvpack
from kvpack.hf.attention import attention
from kvpack.reference import attend

from ..hf import helpers as h
from ..hf.test_handle import large
from .families import FAMILIES, GROUPED, HYBRID, model, packed, stats, stock

ENABLED = [name for name, family in FAMILIES.items() if family.enables]


def logits(one: Any, cache: Any, count: int = 100) -> Tensor:
    return h.run(one, cache, h.tokens(1, count), [count - 6])


def test_enable_and_disable() -> None:
    one = copy.deepcopy(model("gemma2"))
    before = logits(one, stock(one.config))
    kvpack.disable(one)  # not enabled: nothing to do
    assert one.config._attn_implementation == "eager"
    for _ in range(2):
        kvpack.enable(one)
        assert one.config._attn_implementation == "kvpack"
    assert h.error(logits(one, packed(one.config)), before) <= 1e-5
    kvpack.disable(copy.deepcopy(one))
    assert one.config._attn_implementation == "kvpack"
    kvpack.disable(one)
    assert one.config._attn_implementation == "eager"
    assert torch.equal(logits(one, stock(one.config)), before)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_that_is_built_with_it(name: str) -> None:
    one = t.AutoModelForCausalLM.from_config(FAMILIES[name].config(), attn_implementation="kvpack")
    assert one.config._attn_implementation == "kvpack"
    kvpack.disable(one)
    assert one.config._attn_implementation == ("sdpa" if one._supports_sdpa else "eager")


def test_what_the_user_had_comes_back() -> None:
    one = copy.deepcopy(model("llama", "eager"))
    kvpack.enable(one)
    kvpack.disable(one)
    assert one.config._attn_implementation == "eager"


def test_only_the_decoder_of_a_model_of_many_parts() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.Gemma3Config(
        text_config={**GROUPED, **HYBRID}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    one = t.Gemma3ForConditionalGeneration(config)
    parts = (config, config.text_config, config.vision_config)
    kvpack.enable(one)
    assert [part._attn_implementation for part in parts] == ["sdpa", "kvpack", "sdpa"]
    kvpack.disable(one)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "sdpa"]


def test_what_cannot_be_enabled_says_so() -> None:
    one = model("falcon")
    with pytest.raises(ValueError, match="FalconForCausalLM does not look its attention up.*it keeps 'sdpa'"):
        kvpack.enable(one)
    assert one.config._attn_implementation == "sdpa"
    config = t.NllbMoeConfig(
        vocab_size=h.VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_experts=2,
    )
    one = t.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="NllbMoeForConditionalGeneration has eager attention only.*it keeps 'eager'"):
        kvpack.enable(one)
    assert config._attn_implementation == "eager"
    for change in (kvpack.enable, kvpack.disable):
        with pytest.raises(TypeError, match="LlamaConfig is not a transformers model"):
            change(t.LlamaConfig())


@pytest.mark.parametrize("name", ENABLED)
def test_stock_caches_work_as_before(name: str) -> None:
    """Left-padded rows, a prompt and steps, under the family's own attention and under `kvpack`; but for what comes out
    at padded positions, which see nothing.
    """
    ids, mask = h.padded([40, 23])
    found = []
    for implementation in ("default", "kvpack"):
        one = model(name, implementation)
        if FAMILIES[name].is_encoder_decoder:
            more = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
            with torch.no_grad():
                out = one(h.tokens(2, 20), past_key_values=stock(one.config), **more).logits
        else:
            out = h.run(one, stock(one.config), ids, [36], mask)
        found.append(out[mask.bool()])
    assert h.error(found[1], found[0]) <= 1e-5


def handles(queries: int, dims: tuple[int, int] = (64, 64)) -> tuple[Any, Any]:
    """Of two rows, the second of which has 30 padded positions, 200 tokens and then `queries` of their own."""
    config = t.LlamaConfig(**GROUPED)
    mask = torch.ones(2, 200)
    mask[1, :30] = 0
    layer = packed(config, precision="high", attention_mask=mask).packed_layers[0]
    torch.manual_seed(4)
    for count in (200, queries):
        pair = layer.update(*(torch.randn(2, 2, count, dim) for dim in dims))
    return pair


class Module(torch.nn.Module):
    """An attention module of four query heads and two KV heads."""

    is_causal = True
    num_key_value_groups = 2


def causal(queries: int, length: int, window: int | None = None) -> Tensor:
    """bool [1, 1, q, S]: what queries at the end see, at most `window` positions back."""
    at = torch.arange(length - queries, length)[:, None] - torch.arange(length)
    seen = at >= 0 if window is None else (at >= 0) & (at < window)
    return seen[None, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [None, 20, 100], ids=["all", "window 20", "window 100"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("softcap", "sinks"), [(3.0, False), (None, True), (3.0, True), (None, False)])
def test_against_the_reference(
    softcap: float | None, sinks: bool, queries: int, window: int | None, additive: bool
) -> None:
    """Softcap, sink logits and per-layer windows, which come as masks, over packed bits and padded rows."""
    key, value = handles(queries, (96, 64))
    query = 2 * torch.randn(2, 4, queries, 96)
    logits = torch.tensor([-1.0, 0.5, 2.0, 4.0]) if sinks else None
    mask = causal(queries, 200 + queries, window).expand(2, 1, -1, -1) & (torch.arange(200 + queries) >= 30)
    given = mask
    if additive:
        given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got, _ = attention(Module(), query, key, value, given, scaling=0.2, softcap=softcap, s_aux=logits)
    want = attend(
        query.numpy(),
        scale=0.2,
        exact=(key.dense().numpy(), value.dense().numpy()),
        mask=mask.numpy(),
        softcap=softcap or 0.0,
        sink_logits=None if logits is None else logits.numpy(),
    )
    layer = key.call.layer.stats()
    assert layer.fused_calls == 1
    assert h.error(got.transpose(1, 2), torch.as_tensor(want)) <= 1e-4


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_half_precision(name: str) -> None:
    one = copy.deepcopy(model(name, "kvpack")).to(torch.bfloat16)
    ids = h.tokens(1, 100)
    ours = packed(one.config)
    got = h.run(one, ours, ids, [94])
    assert got.dtype == torch.bfloat16
    assert h.error(got, h.run(one, stock(one.config), ids, [94])) <= 3e-2
    assert stats(ours)[0].fused_calls == 6


def test_a_missing_mask_is_refused() -> None:
    """Several queries with a history and no mask: it would hide most of the cache."""
    key, value = handles(3)
    with pytest.raises(RuntimeError, match="layer 0: is_causal=True with 3 queries and 203 keys"):
        attention(Module(), torch.randn(2, 4, 3, 64), key, value, None, softcap=3.0)


def test_softcap_without_eager_attention_is_refused() -> None:
    dense = torch.randn(2, 2, 3, 64)
    with pytest.raises(ValueError, match="Module asks for softcap or sink logits, and its file has no eager_attention"):
        attention(Module(), torch.randn(2, 4, 3, 64), dense, dense, None, softcap=3.0)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("reason", ["gradients", "dropout", "output_attentions"])
def test_what_is_not_fused_is_eager_and_counted(name: str, reason: str) -> None:
    one = model(name, "kvpack")
    (index,) = FAMILIES[name].packed
    module = next(part for part in one.modules() if getattr(part, "layer_idx", None) == index)
    key, value = handles(1)
    query = torch.randn(2, 4, 1, 64, requires_grad=reason == "gradients")
    options: dict[str, Any] = {"scaling": 0.2, "softcap": 3.0, "s_aux": getattr(module, "sinks", None)}
    if name == "gpt_oss":
        del options["softcap"]
    fused, weights = attention(module, query.detach(), key, value, None, **options)
    assert weights is None
    options |= {"dropout": {"dropout": 0.1}, "output_attentions": {"output_attentions": True}}.get(reason, {})
    with pytest.warns(UserWarning, match=rf"layer 0 were decoded .*\({reason}\)"):
        got, weights = attention(module, query, key, value, None, **options)
    assert weights is not None
    assert key.call.layer.stats().fallback_calls == {reason: 1}
    assert weights.shape == (2, 4, 1, 201)
    assert not weights[1, :, :, :30].any()  # padding stays hidden where nobody gives a mask
    assert h.error(got.detach(), fused) <= 1e-4  # modules in eval mode drop nothing


@pytest.mark.filterwarnings(h.DECODED)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_output_attentions_under_eager(name: str) -> None:
    one = model(name, "eager")
    found = []
    for cache in (packed(one.config), stock(one.config)):
        ids = h.tokens(2, 100)
        h.run(one, cache, ids[:, :90], [90])
        with torch.no_grad():
            found.append(one(ids[:, 90:], past_key_values=cache, output_attentions=True).attentions)
    assert len(found[0]) == 2
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_no_dense_copy_outlives_a_call() -> None:
    """Softcap: the prompt goes through eager attention, steps through packed bits."""
    config = FAMILIES["gemma2"].config()
    config.layer_types = ["full_attention"] * 2
    one = h.build(t.AutoModelForCausalLM.from_config, config)
    kvpack.enable(one)
    cache = packed(config, key="tq4")
    ids = h.tokens(2, 420)
    size = 2 * 2 * 400 * 64  # one side of the prompt
    mine = {id(x) for x in large(size)}
    for part in ids.split([400, 10, 10], dim=1):
        with torch.no_grad():
            one(part, past_key_values=cache)
        assert [x.shape for x in large(size) if id(x) not in mine] == []
    assert stats(cache)[0].fused_calls == 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("fused", [True, False])
def test_padding_is_learned_from_masks(name: str, fused: bool) -> None:
    """Sinks are real tokens, and padding is stored as zeros, whichever way the prompt goes."""
    one = model(name, "kvpack")
    ids, mask = h.padded([100, 40, 77])
    cache = packed(one.config, fused=fused)
    h.run(one, cache, ids, [98], mask)
    for layer in cache.packed_layers:
        assert layer.rows.tolist() == [[0, 0], [60, 60], [23, 23]]
        assert not layer.keys[1, :, :60].any()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # it compiles, and torch warns on the way
def test_flex_attention() -> None:
    """Transformers compiles it: handles decode inside its graph, which sums in another order, and are counted."""
    config = FAMILIES["llama"].config()
    config._attn_implementation = "flex_attention"
    one = h.build(t.AutoModelForCausalLM.from_config, config)
    ids = h.tokens(1, 100)
    want = h.run(one, stock(config), ids, [90])
    ours = packed(config)
    assert h.error(h.run(one, ours, ids, [90]), want) <= 1e-5
    for layer in stats(ours):
        assert (layer.fused_calls, sum(layer.fallback_calls.values())) == (0, 10)
    assert torch.equal(h.run(one, packed(config, fused=False), ids, [90]), want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_one_graph() -> None:
    """torch.compile traces softcap over packed bits."""
    torch._dynamo.reset()
    one = model("gemma2", "kvpack")
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    ids = h.tokens(1, 84)
    ours, twin = packed(one.config), packed(one.config)
    for cache in (ours, twin):
        h.run(one, cache, ids[:, :80], [80])
    assert h.error(h.run(compiled, ours, ids, []), h.run(one, twin, ids, [])) <= 1e-5
    assert stats(ours) == stats(twin)
    assert stats(ours)[0].fused_calls == 4
