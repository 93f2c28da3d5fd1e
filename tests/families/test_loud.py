"""What is not packed, not fused or not right is said: before the first token, in warnings, and in `stats()`."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
import transformers as t
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

import kvpack
from kvpack.hf import PackedLayer, support

from ..hf import helpers as h
from .families import FAMILIES, GROUPED, REFUSED, WHOLE, model, packed, stats, stock
from .modes import Run

HYBRIDS = {
    "gemma2": "sliding_attention (layer 0)",
    "gemma3": "sliding_attention (layer 0)",
    "gemma3n": "sliding_attention (layer 0); dummy (layers 2, 3)",
    "gpt_oss": "sliding_attention (layer 0)",
    "mimo": "sliding_attention (layer 1)",
    "qwen3_next": "linear_attention (layer 0)",
    "lfm2": "conv (layer 0)",
}


def test_hybrids_are_known() -> None:
    assert set(HYBRIDS) == {name for name, family in FAMILIES.items() if len(family.packed) < 2}


@pytest.mark.parametrize("name", HYBRIDS)
def test_stock_layers_are_named(name: str) -> None:
    """By a warning, and by `stats()`."""
    if "dummy" in HYBRIDS[name] and "dummy" not in DYNAMIC_LAYER_TYPE_MAPPING:
        pytest.skip("this transformers makes no layers that share the keys of others")
    config = FAMILIES[name].config()
    with pytest.warns(UserWarning, match="kvpack") as told:
        cache = kvpack.Cache(config)
    (warning,) = told
    assert str(warning.message) == (
        f"kvpack: not packed in a {config.model_type} model: {HYBRIDS[name]}; only full attention over keys and values "
        "is packed"
    )
    assert [layer.index for layer in cache.packed_layers] == list(FAMILIES[name].packed)
    every = cache.stats()
    assert [layer.layer for layer in every] == list(range(config.num_hidden_layers))
    for layer in every:
        mine = layer.layer in FAMILIES[name].packed
        kind = "dummy" if layer.layer > 1 else HYBRIDS[name].split()[0]
        assert layer.packed is mine
        assert layer.type == ("full_attention" if mine else kind)
        assert layer.why == ("" if mine else f"{kind}: the stock class serves it")
        assert (layer.key, layer.tokens_packed, layer.fused_calls) == ("tq4:center=tile" if mine else "", 0, 0)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(HYBRIDS) - {"bart", "t5"}))
def test_whole_models_are_quiet(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = kvpack.Cache(FAMILIES[name].config())
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)


@pytest.mark.parametrize("title", REFUSED)
def test_nothing_to_pack_is_refused_by_name(title: str) -> None:
    config, reason = REFUSED[title]
    with pytest.raises(ValueError, match=re.escape(f"nothing to pack in a {config.model_type} model: {reason}; only")):
        kvpack.Cache(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (t.LlamaConfig(**{**GROUPED, "head_dim": 72}), r"layer 0 cannot be packed with key codec tq4.*72"),
        (t.BartConfig(), r"is an encoder-decoder.*for_encoder_decoder.*DynamicCache\(\)"),
        (t.T5Config(), r"is an encoder-decoder.*for_encoder_decoder"),
    ],
    ids=["head size", "bart", "t5"],
)
def test_what_cannot_be_packed_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kvpack.Cache(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_tells_beforehand(name: str) -> None:
    """What `kvpack doctor --model` shows is what the other tests here meet."""
    family = FAMILIES[name]
    told = support.attention(family.config())
    assert told.fused is family.fused
    assert told.name == ("sdpa" if family.fused else "eager")
    packed_layers = [i for i, layer in enumerate(support.layers(family.config())) if layer.why is None]
    assert packed_layers == list(family.packed)
    assert support.takes_kvpack(type(model(name))) is family.enables


@pytest.mark.filterwarnings(h.DECODED)
@pytest.mark.parametrize("kind", support.OWN_WAYS)
def test_models_that_need_dense_tensors_before_sdpa(kind: str) -> None:
    experts = {"num_experts_per_tok": 2, "num_local_experts": 2} if kind == "jetmoe" else {}
    config = t.AutoConfig.for_model(kind, **WHOLE, **experts, kv_channels=64)
    one = h.build(t.AutoModelForCausalLM.from_config, config)
    told = support.attention(config)
    assert (told.name, told.fused) == ("sdpa", False)
    assert support.OWN_WAYS[kind] in told.why
    cache = packed(config)
    ids = h.tokens(1, 90)
    assert h.error(h.run(one, cache, ids, [85]), h.run(one, stock(config), ids, [85])) <= 1e-4
    assert all(sum(layer.fallback_calls.values()) == 5 for layer in stats(cache))


def test_decoding_is_warned_of_once() -> None:
    """Once for a reason, over all layers and calls, and copies; counted every time."""
    one = model("llama", "eager")
    cache = packed(one.config)
    ids = h.tokens(1, 100)
    with pytest.warns(UserWarning, match="kvpack") as told:
        h.run(one, cache, ids, [90])
    (warning,) = told
    assert str(warning.message) == (
        "kvpack: keys and values of layer 0 were decoded for attention, which is slow (transpose): packed bits are "
        'read by attention "sdpa", and after kvpack.enable(model); see kvpack doctor --model. cache.stats() counts all '
        "such calls"
    )
    assert [layer.fallback_calls for layer in cache.stats()] == [{"transpose": 10}] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h.run(one, copy.deepcopy(cache), h.tokens(1, 110), [])
        h.run(one, packed(one.config, fused=False), ids, [90])  # asked for
    another = packed(one.config)
    with pytest.warns(UserWarning, match="were decoded"):
        h.run(one, another, ids, [90])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 90])
def test_generating_without_use_cache_is_refused(name: str, prompt: int) -> None:
    """The cache would take in the whole prompt on every step, which stock caches do, silently."""
    for rows, fused in ((1, True), (2, False)):
        run = Run(name, lambda config, fused=fused: packed(config, fused=fused))
        with pytest.raises(RuntimeError, match="whole prompt arrived a second time.*use_cache=False.*use_cache=True"):
            run.generate(h.tokens(rows, prompt), new=3, use_cache=False)


def test_one_token_more_than_there_are_is_no_error() -> None:
    one = model("llama")
    ids = h.tokens(1, 201)
    found = [h.run(one, cache, ids, [100, 101]) for cache in (packed(one.config), stock(one.config))]
    assert h.error(*found) <= 1e-4


def test_a_decoder_of_more_layers_than_the_encoder() -> None:
    config = FAMILIES["t5"].config()
    config.num_layers = 1
    one = h.build(t.AutoModelForSeq2SeqLM.from_config, config)
    found = []
    for cache in (packed(config), t.EncoderDecoderCache(t.DynamicCache(), t.DynamicCache())):
        with torch.no_grad():
            for part in h.tokens(1, 90).split([85, 5], dim=1):
                out = one(h.tokens(1, 20), decoder_input_ids=part, past_key_values=cache).logits
            found.append(out)
    assert h.error(*found) <= 1e-4
    assert len(config.get_text_config(decoder=True).per_layer_config) == 1  # what transformers takes it for


def test_both_halves_of_an_encoder_decoder() -> None:
    """They crop and select rows, which transformers' own class refuses for caches that are not its own."""
    one = model("bart")
    cache, plain = packed(one.config, fused=False), stock(one.config)
    ids = h.tokens(2, 80)
    out = []
    for each in (cache, plain):
        with torch.no_grad():
            one(h.tokens(2, 20), decoder_input_ids=ids, past_key_values=each)
            each.crop(-3)
            each.batch_select_indices(torch.tensor([1]))
            each.batch_repeat_interleave(2)
            assert each.get_seq_length() == 77
            encoded = one.get_encoder()(h.tokens(2, 20)[[1, 1]])
            steps = one(encoder_outputs=encoded, decoder_input_ids=ids[[1, 1], 77:], past_key_values=each)
            out.append(steps.logits)
    assert torch.equal(*out)
    assert kvpack.nbytes(cache) > cache.self_attention_cache.nbytes > 0
    assert all(layer.tokens_packed == 64 for layer in stats(cache))
