"""Which models and layers are packed, and what happens to the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV3Config,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3NextConfig,
    T5Config,
)

import kvpack
from kvpack.hf import PackedLayer

from . import helpers as h


def gemma() -> Any:
    config = Gemma3TextConfig(**{**h.SHAPE, "num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 64})
    return h.build(Gemma3ForCausalLM, config)


def test_hybrid_layers_stay_stock_and_are_named() -> None:
    model = gemma()
    with pytest.warns(
        UserWarning, match=r"not packed in a gemma3_text model: sliding_attention \(layers 0, 1, 2, 3, 4\)"
    ):
        cache = kvpack.Cache(model.config, key="exact", window=64)
    assert [layer.index for layer in cache.packed_layers] == [5]
    assert cache.is_sliding == [True] * 5 + [False]
    ids = h.tokens(1, 200)
    assert h.error(h.run(model, cache, ids, [150]), h.run(model, h.stock(model), ids, [150])) <= 1e-4
    assert cache.stats()[0].fused_calls == 50
    assert cache.memory()["other"] > 0


def test_hybrid_identity() -> None:
    model = gemma()
    with pytest.warns(UserWarning, match="not packed"):
        cache = kvpack.Cache(model.config, key="exact", window=16, fused=False)
    ids = h.tokens(2, 200)
    assert torch.equal(h.run(model, cache, ids, [90]), h.run(model, h.stock(model), ids, [90]))


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


def test_linear_layers() -> None:
    config = Qwen3NextConfig(
        **{**h.SHAPE, "num_hidden_layers": 4},
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    model = h.build(AutoModelForCausalLM.from_config, config)
    with pytest.warns(UserWarning, match=r"linear_attention \(layers 0, 1, 2\)"):
        cache = kvpack.Cache(config, key="exact", window=16)
    ids = h.tokens(1, 120)
    assert h.error(h.run(model, cache, ids, [90]), h.run(model, h.stock(model), ids, [90])) <= 1e-4
    assert cache.stats()[0].tokens_packed > 0


def test_mla_is_refused_by_name() -> None:
    config = DeepseekV3Config(num_hidden_layers=3, hidden_size=128, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"nothing to pack in a deepseek_v3 model: MLA latents.*layers 0, 1, 2"):
        kvpack.Cache(config)


def test_nothing_to_pack_is_refused_by_name() -> None:
    config = MistralConfig(**h.SHAPE, sliding_window=128)
    with pytest.raises(ValueError, match=r"nothing to pack in a mistral model: sliding_attention"):
        kvpack.Cache(config)


def test_full_attention_mistral_is_packed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = kvpack.Cache(MistralConfig(**h.SHAPE, sliding_window=None))
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)


@pytest.mark.parametrize("config", [T5Config(), BartConfig()], ids=["t5", "bart"])
def test_a_bare_cache_for_an_encoder_decoder_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=r"is an encoder-decoder.*for_encoder_decoder.*DynamicCache\(\)"):
        kvpack.Cache(config)


def test_encoder_decoder() -> None:
    config = BartConfig(
        vocab_size=h.VOCABULARY,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        forced_eos_token_id=None,
        decoder_start_token_id=1,
    )
    model = h.build(BartForConditionalGeneration, config)
    model.generation_config.forced_eos_token_id = None
    ours = kvpack.Cache.for_encoder_decoder(config, key="exact", window=0, fused=False)
    assert isinstance(ours, EncoderDecoderCache)
    ids = h.tokens(2, 30)
    a, logits_a = h.generate(model, ours, ids, new=150, num_beams=2)
    b, logits_b = h.generate(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), ids, new=150, num_beams=2)
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(logits_a, logits_b, strict=True))
    assert ours.self_attention_cache.stats()[0].tokens_packed == 128
    assert kvpack.nbytes(ours) > ours.self_attention_cache.nbytes
    fused = kvpack.Cache.for_encoder_decoder(config, key="exact", window=0)
    got, _ = h.generate(model, fused, ids, new=150)
    want, _ = h.generate(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), ids, new=150)
    assert torch.equal(got, want)
    assert fused.self_attention_cache.stats()[0].fused_calls > 0


def test_gpt2() -> None:
    """No grouped heads, learned positions, keys that are views of one projection."""
    config = GPT2Config(
        vocab_size=h.VOCABULARY, n_embd=128, n_head=2, n_layer=2, n_positions=512, eos_token_id=None, bos_token_id=None
    )
    model = h.build(AutoModelForCausalLM.from_config, config)
    ids, mask = h.padded([200, 90])
    ours = kvpack.Cache(config, key="exact", window=16)
    got, _ = h.generate(model, ours, ids, new=100, attention_mask=mask)
    want, _ = h.generate(model, DynamicCache(config=config), ids, new=100, attention_mask=mask)
    assert torch.equal(got, want)
    assert ours.stats()[0].fallback_calls == {}


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
