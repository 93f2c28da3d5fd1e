"""Tiny random models, and ways to run them with two caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpack

VOCABULARY = 97
DECODED = "ignore:kvpack. keys and values of layer .* were decoded"  # for tests that do that on purpose

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,  # attention that is not flat
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(model_class: Any, config: Any) -> Any:
    torch.manual_seed(1)
    model = model_class(config).eval()
    model.requires_grad_(False)
    return model


@lru_cache
def llama(kv_heads: int = 2, attention: str = "sdpa") -> LlamaForCausalLM:
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": kv_heads})
    config._attn_implementation = attention
    return build(LlamaForCausalLM, config)


@lru_cache
def small() -> LlamaForCausalLM:
    """One layer, for what is slow."""
    return build(LlamaForCausalLM, LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}))


def packed(model: Any, **options: Any) -> kvpack.Cache:
    return kvpack.Cache(model.config, **{"key": "exact", "window": 64, **options})


def stock(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, count), generator=generator)


def padded(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    longest = max(lengths)
    ids = tokens(len(lengths), longest, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def run(model: Any, cache: Any, ids: Tensor, chunks: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Teacher-forced logits [B, L, V]: calls of `chunks` tokens, then one token a call."""
    out = []
    at = cache.get_seq_length()
    ends = list(chunks)
    while at < ids.shape[1]:
        step = min(ends.pop(0) if ends else 1, ids.shape[1] - at)
        options: dict[str, Any] = {}
        if mask is not None:
            options["attention_mask"] = mask[:, : at + step]
            options["position_ids"] = positions(mask)[:, at : at + step]
        out.append(model(ids[:, at : at + step], past_key_values=cache, **options).logits)
        at += step
    return torch.cat(out, dim=1)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference over largest value of b."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def generate(model: Any, cache: Any, ids: Tensor, new: int = 90, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Sequences and the raw logits of every step."""
    torch.manual_seed(3)
    options.setdefault("do_sample", False)
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences, list(out.logits)
