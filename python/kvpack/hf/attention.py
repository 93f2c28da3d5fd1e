"""The attention implementation "kvpack": what `sdpa` does, and softcap and sink logits over packed bits too.

    kvpack.enable(model)     model looks its attention up under "kvpack"
    kvpack.disable(model)    as it was before

Unmodified models on `sdpa` need none of this, because handles intercept `scaled_dot_product_attention`. That
function knows neither softcap (Gemma 2) nor sink logits (gpt-oss), so such models run eager attention, which
decodes the whole history on every call. Under "kvpack":

* layers without either go through `sdpa`, packed or not;
* packed layers with either go to `attend`, which takes both;
* what is dense (stock layers, the first call of one row, `fused=False`) goes to the model's own eager attention.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import support
from .call import KEY, VALUE
from .handle import pair

NAME = "kvpack"
_BEFORE = "_kvpack_attention_before"


def enable(model: Any) -> None:
    """Let a transformers model attend through kvpack: like `sdpa`, with softcap and sink logits fused too.

    Sets the attention implementation of the (text) decoder to "kvpack", which is also a name for
    `attn_implementation=` once `kvpack.Cache` was imported. Stock caches work as before. A model that is
    enabled already stays as it is.

    Raises:
        TypeError: for something that is no transformers model.
        ValueError: for a model that does not look its attention up, such as Falcon or GPT-J, or whose attention is
            neither that of `sdpa` nor that with softcap or sink logits, such as NLLB-MoE.
    """
    decoder = _decoder(model)
    before = decoder.config._attn_implementation
    if before == NAME:
        return
    if not decoder._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not look its attention up in transformers' AttentionInterface, and cannot be "
            f"given another; it keeps {before!r}, of which kvpack.Cache reads packed bits where it is 'sdpa'"
        )
    if not support.takes_kvpack(type(decoder)):
        raise ValueError(
            f"{type(model).__name__} has eager attention only, for other reasons than softcap or sink logits; it keeps "
            f"{before!r}, and kvpack.Cache decodes for it on every call"
        )
    decoder.set_attn_implementation(NAME)
    setattr(model, _BEFORE, before)


def disable(model: Any) -> None:
    """Undo `enable`: the model attends as before. One that is not enabled stays as it is.

    A model that was built with `attn_implementation="kvpack"` gets transformers' default.
    """
    decoder = _decoder(model)
    if decoder.config._attn_implementation != NAME:
        return
    default = "sdpa" if decoder._supports_sdpa else "eager"
    decoder.set_attn_implementation(getattr(model, _BEFORE, None) or default)
    vars(model).pop(_BEFORE, None)


def _decoder(model: Any) -> Any:
    """The outermost part of a model that has the config of its decoder: the model itself, if it is text only."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise TypeError(f"{type(model).__name__} is not a transformers model (PreTrainedModel)")
    text = model.config.get_text_config(decoder=True)
    parts = (part for part in model.modules() if getattr(part, "config", None) is text)
    return next((part for part in parts if hasattr(part, "set_attn_implementation")), model)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of query [B, Hq, q, dk] in the signature of transformers; result [B, q, Hq, dv], and weights or None.

    key, value: handles, or tensors [B, Hkv, S, d]. attention_mask: of `sdpa_mask`, or additive.
    softcap: caps the scaled scores at softcap * tanh(score / softcap). s_aux: [Hq], a logit per head without a value.
    """
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, options)
    mask, call, reason = attention_mask, pair(key, value), None
    if call is not None:
        call.check(causal, query.shape[2])
        if not call.whole:
            call.layer.check_mask(mask)
            wanted = "output_attentions" if options.get("output_attentions") else None
            reason = call.obstacle(query, mask, dropout, causal, s_aux) or wanted
            if reason is None:
                logits = None if s_aux is None else s_aux.detach().to(torch.float32).reshape(-1).contiguous()
                fused = call.attend(query, mask, scaling, softcap or 0.0, logits)
                return fused.transpose(1, 2).contiguous(), None
            mask = call.padding_mask() if mask is None else mask
        key, value = call.dense(KEY, reason or ""), call.dense(VALUE, reason or "")
    options.update({name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None})
    added = _additive(mask, query, key.shape[2], causal)
    out: tuple[Tensor, Tensor | None] = _eager(module)(
        module, query, key, value, added, dropout=dropout, scaling=scaling, **options
    )
    if call is not None and call.whole:  # the mask tells the padding
        call.layer.saw_mask(attention_mask)
    return out


def _eager(module: torch.nn.Module) -> Any:
    """The eager attention of the file that the attention module comes from: only it knows softcap and sink logits."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise ValueError(
            f"{type(module).__name__} asks for softcap or sink logits, and its file has no eager_attention_forward to "
            "compute them over dense keys and values; allowed: models of transformers, or kvpack.disable(model)"
        )
    return found


def _is_causal(module: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Whether no mask means a causal one, by the rule of transformers' `sdpa`."""
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _additive(mask: Tensor | None, query: Tensor, keys: int, causal: bool) -> Tensor | None:
    """The mask that eager attention adds, in place of one for `sdpa`: boolean, or None, which may mean a causal one."""
    count = query.shape[2]
    if mask is None and causal:
        mask = torch.ones(count, keys, dtype=torch.bool, device=query.device).tril(keys - count)[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
