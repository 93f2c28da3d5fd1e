"""The model families that are tested: small models with random weights, built from config.

What the table of the README says of a family stands here, and `test_readme.py` holds the two together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import transformers as t

import kvpack
import kvpack.hf

from ..hf import helpers as h

# Heads of 64: the smallest that codecs take. Two layers, or as many as a hybrid needs to have each of its types.
GROUPED = {**h.SHAPE, "hidden_size": 64, "intermediate_size": 64, "tie_word_embeddings": False}
WHOLE = {**GROUPED, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
del WHOLE["head_dim"]  # these divide the hidden size
HYBRID: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """One model family.

    title, notes: as in the README. config: of the small model.
    packed: the layers that are packed. fused: whether they are read packed by the default attention.
    refused: modes that transformers itself refuses, with any cache. enables: whether `kvpack.enable` can take it.
    """

    title: str
    config: Callable[[], Any]
    packed: tuple[int, ...] = (0, 1)
    fused: bool = True
    notes: str = ""
    refused: frozenset[str] = frozenset()
    enables: bool = True

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config().is_encoder_decoder)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention implementations that it can be given."""
        return ATTENTIONS if self.enables else ("default", "eager")


def _bart() -> Any:
    return t.BartConfig(
        vocab_size=h.VOCABULARY,
        d_model=128,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        init_std=0.15,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        forced_eos_token_id=None,
        decoder_start_token_id=1,
    )


def _gemma2() -> Any:
    # Eager by default; older versions of transformers prefer sdpa, and leave the softcap out.
    softcap = {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"}
    return t.Gemma2Config(**GROUPED, **HYBRID, **softcap)


def _gpt2() -> Any:
    return t.GPT2Config(
        vocab_size=h.VOCABULARY,
        n_embd=128,
        n_head=2,
        n_layer=2,
        n_positions=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def _falcon() -> Any:
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "initializer_range",
        "tie_word_embeddings",
    )
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return t.FalconConfig(**{name: WHOLE[name] for name in names}, **tokens, multi_query=True, alibi=False)


def _qwen3_next() -> Any:
    return t.Qwen3NextConfig(
        **{**GROUPED, "num_hidden_layers": 2},
        **EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        shared_expert_intermediate_size=32,
    )


def _mimo() -> Any:
    sizes = {"head_dim": 96, "v_head_dim": 64, "sliding_window": 24}
    types = {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]}
    return t.MiMoV2FlashConfig(**{**GROUPED, **sizes}, **types, **EXPERTS, n_routed_experts=4)


def _gemma3n() -> Any:
    types = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "num_kv_shared_layers": 2,
    }
    own = {"vocab_size_per_layer_input": h.VOCABULARY, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
    return t.Gemma3nTextConfig(**{**GROUPED, "num_hidden_layers": 4}, **types, **own)


def _t5() -> Any:
    sizes = {"d_model": 64, "d_kv": 64, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "decoder_start_token_id": 1}
    return t.T5Config(vocab_size=h.VOCABULARY, **sizes, **tokens, initializer_factor=3.0, tie_word_embeddings=False)


def _gptj() -> Any:
    names = ("vocab_size", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return t.GPTJConfig(**{name: WHOLE[name] for name in names}, n_embd=128, n_head=2, n_layer=2, rotary_dim=32)


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", lambda: t.LlamaConfig(**GROUPED)),
    "qwen2": Family("Qwen2", lambda: t.Qwen2Config(**GROUPED), notes="QKV bias"),
    "qwen3": Family("Qwen3", lambda: t.Qwen3Config(**GROUPED), notes="norms of queries and keys"),
    "mistral": Family("Mistral", lambda: t.MistralConfig(**GROUPED, sliding_window=None), notes="without a window"),
    "gemma2": Family(
        "Gemma 2",
        _gemma2,
        packed=(1,),
        fused=False,
        notes="softcap; every other layer slides",
    ),
    "gemma3": Family(
        "Gemma 3",
        lambda: t.Gemma3TextConfig(**GROUPED, **HYBRID, query_pre_attn_scalar=64),
        packed=(1,),
        notes="most layers slide",
    ),
    "gemma3n": Family("Gemma 3n", _gemma3n, packed=(1,), notes="most layers slide; the last ones share"),
    "phi3": Family("Phi-3", lambda: t.Phi3Config(**WHOLE), notes="one projection"),
    "olmo2": Family("OLMo 2", lambda: t.Olmo2Config(**WHOLE), notes="norms after"),
    "gpt_neox": Family("GPT-NeoX", lambda: t.GPTNeoXConfig(**WHOLE, rotary_pct=0.25), notes="partial rotary"),
    "gpt2": Family("GPT-2", _gpt2, notes="learned positions"),
    "falcon": Family("Falcon", _falcon, notes="one KV head", enables=False),
    "mixtral": Family(
        "Mixtral",
        lambda: t.MixtralConfig(**GROUPED, sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
        notes="mixture of experts",
    ),
    "gpt_oss": Family(
        "gpt-oss",
        lambda: t.GptOssConfig(**GROUPED, **HYBRID, num_local_experts=4, num_experts_per_tok=2),
        packed=(1,),
        fused=False,
        notes="sink logits; every other layer slides",
    ),
    "mimo": Family(
        "MiMo-V2-Flash", _mimo, packed=(0,), fused=False, notes="values smaller than keys; most layers slide"
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        _qwen3_next,
        packed=(1,),
        notes="most layers linear",
        refused=frozenset({"assisted", "prompt look-up"}),
    ),
    "lfm2": Family(
        "LFM2",
        lambda: t.Lfm2Config(**WHOLE, layer_types=["conv", "full_attention"]),
        packed=(1,),
        notes="most layers convolve",
    ),
    "bart": Family("BART", _bart, notes="encoder-decoder"),
    "t5": Family("T5", _t5, notes="encoder-decoder; bias of positions"),
    "gptj": Family("GPT-J", _gptj, fused=False, enables=False, notes="attends by matrix products of its own"),
}


# What has no layer to pack: title, config, the reason and the layers that the error names.
REFUSED: dict[str, tuple[Any, str]] = {
    "Mistral, with a window": (
        t.MistralConfig(**GROUPED, sliding_window=128),
        "sliding_attention (layers 0, 1)",
    ),
    "DeepSeek V3": (
        t.DeepseekV3Config(hidden_size=128, num_hidden_layers=3, num_attention_heads=2),
        "MLA latents (kv_lora_rank) (layers 0, 1, 2)",
    ),
}

ATTENTIONS = ("default", "kvpack", "eager")


@lru_cache
def model(name: str, attention: str = "default") -> Any:
    """The small model of a family, with the same weights every time."""
    config = FAMILIES[name].config()
    auto = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
    if attention == "eager":
        config._attn_implementation = "eager"
    made = h.build(auto.from_config, config)
    if config.model_type == "t5":
        made.get_input_embeddings().weight.data /= 30  # else they are nearly all that there is
    if attention == "kvpack":
        kvpack.enable(made)
    return made


def stock(config: Any) -> Any:
    """The cache that transformers makes for a model."""
    if config.is_encoder_decoder:
        return t.EncoderDecoderCache(t.DynamicCache(), t.DynamicCache())
    return t.DynamicCache(config=config)


def packed(config: Any, **options: Any) -> Any:
    """Ours, without a window, so that short texts are packed; quiet about layers that are not."""
    make = kvpack.Cache.for_encoder_decoder if config.is_encoder_decoder else kvpack.Cache
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kvpack: not packed")
        return make(config, **{"key": "exact", "window": 0, **options})


def stats(cache: Any) -> list[kvpack.hf.LayerStats]:
    """Of the layers that are packed."""
    own = getattr(cache, "self_attention_cache", cache)
    return [layer for layer in own.stats() if layer.packed]
