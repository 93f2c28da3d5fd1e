"""What kvpack makes of a model, told by its config alone: which layers are packed, and whether attention is fused."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from .compat import cache_layers

PACKED = "full_attention"
_FUSED = ("sdpa", "kvpack")
# Models on sdpa that need dense keys or values before they call it, by model type.
OWN_WAYS = {
    "diffllama": "splits values in two",
    "doge": "makes its mask from the values",
    "jetmoe": "repeats keys and values itself",
}
# Config attributes that say: `head_dim` is not the size of the cached vectors of every layer.
_OTHER_HEAD_SIZES = ("global_head_dim", "attention_head_dim", "qk_nope_head_dim")
_MODELS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)


@dataclass(frozen=True)
class Attention:
    """How a model attends.

    name: attention implementation, where it is known: the one that the config asks for, or the model's default.
    fused: whether it reads packed bits.
    why: the model class and what decides.
    """

    name: str | None
    fused: bool
    why: str


def why_stock(kind: str, config: Any) -> str | None:
    """Why a layer of this type keeps the stock class, or None if it is packed. config: that of the layer."""
    if kind != PACKED:
        return kind
    if getattr(config, "kv_lora_rank", None) is not None:
        return "MLA latents (kv_lora_rank)"
    return None


def decoder_config(config: Any) -> Any:
    """The config of the decoder of a model: itself, if it is text only."""
    text = config.get_text_config(decoder=True)
    layers = getattr(config, "num_decoder_layers", None)
    if layers is not None and text.is_encoder_decoder and "num_hidden_layers" in text.attribute_map:
        text.num_hidden_layers = layers  # T5: transformers, which made a copy, takes the encoder's number
    return text


class Layer(NamedTuple):
    """A layer of a model: its type, why it keeps the stock class (None: it is packed), the arguments of that class, and
    its own config.
    """

    type: str
    why: str | None
    options: dict[str, Any]
    config: Any


def layers(config: Any) -> list[Layer]:
    """The layers of a model that have a cache."""
    found = cache_layers(decoder_config(config))
    return [Layer(kind, why_stock(kind, own), options, own) for kind, options, own in found]


def head_sizes(config: Any) -> tuple[int, int] | None:
    """Head sizes of the keys and values that a layer with this config caches, where it tells them.

    The first keys and values have the last word, see `checks.layout`.
    """
    if any(getattr(config, name, None) is not None for name in _OTHER_HEAD_SIZES):
        return None
    size = getattr(config, "head_dim", None)
    if size is None:
        heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        if not heads or not hidden or hidden % heads:
            return None
        size = hidden // heads
    return int(size), int(getattr(config, "v_head_dim", None) or size)


def attention(config: Any) -> Attention:
    """How a model with this config attends. Imports its class; makes no model."""
    text = decoder_config(config)
    classes = (models.get(type(one), None) for one in (config, text) for models in _MODELS)
    model = next((found for found in classes if found is not None), None)
    asked = text._attn_implementation
    if model is None:
        name = getattr(text, "model_type", "") or type(text).__name__
        return Attention(asked, asked in _FUSED, f"transformers has no class for {name}: its code decides")
    name = asked or ("sdpa" if model._supports_sdpa else "eager")
    origin = f"{name} (asked for)" if asked else f"{name} (the default of {model.__name__})"
    own = OWN_WAYS.get(text.model_type)
    if own is not None:
        return Attention(name, False, f"{origin}, but the model {own}: decodes on every call")
    if name in _FUSED:
        return Attention(name, True, origin)
    remedy = "kvpack.enable(model) fuses it" if takes_kvpack(model) else "kvpack.enable(model) cannot change that"
    return Attention(name, False, f"{origin}: decodes on every call; {remedy}")


def takes_kvpack(model: type[Any]) -> bool:
    """Whether a model class can attend through "kvpack": it looks its attention up, and that is what `sdpa` computes,
    or differs from it by softcap or sink logits only. Others are eager for reasons of their own.
    """
    if not model._can_set_attn_implementation():
        return False
    if model._supports_sdpa:
        return True
    source = inspect.getsource(sys.modules[model.__module__])
    return "softcap=" in source or "s_aux=" in source
