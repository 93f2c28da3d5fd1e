"""What tells one model from another, as far as keys and values go: fields of its config, and a hash of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

# Fields of a config that have no part in keys and values: names, versions, how it is run, trained or sampled from.
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id dtype embd_pdrop
    embedding_dropout eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label
    initializer_factor initializer_range keys_to_ignore_at_inference label2id num_labels output_attentions
    output_hidden_states output_router_logits pad_token_id prefix pretraining_tp problem_type resid_pdrop return_dict
    router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens task_specific_params tie_word_embeddings
    tokenizer_class torch_dtype transformers_version use_cache
    """.split()
)
_SAMPLES = 256  # values of each parameter that enter the hash
_SHOWN = 4


def of_config(config: Any) -> str:
    """JSON of the fields that decide about keys and values, of the text model. config: a transformers config."""
    fields = config.get_text_config(decoder=True).to_dict()
    kept = {name: x for name, x in fields.items() if name not in _WITHOUT_EFFECT and not name.startswith("_attn")}
    return json.dumps(kept, sort_keys=True, default=str)


def differences(ours: str, theirs: str) -> str | None:
    """What differs between two results of `of_config`, `theirs` being that of the file; None if nothing does.

    A field that one side lacks counts as None there, and None, False, 0 and nothing count as one: versions of
    transformers differ in which fields they write out.
    """
    a, b = json.loads(ours), json.loads(theirs)
    found = [name for name in sorted(a | b) if (a.get(name) or None) != (b.get(name) or None)]
    shown = [f"{name} is {_short(b.get(name))} there, {_short(a.get(name))} here" for name in found[:_SHOWN]]
    return ", ".join(shown) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "") if found else None


def _short(x: Any) -> str:
    text = json.dumps(x)
    return text if len(text) <= 60 else text[:57] + "..."


def of_weights(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and up to 256 values of every parameter of a model: milliseconds, and another
    training, adapter, precision or quantization gives another.

    Raises:
        TypeError: not a torch module.
        ValueError: it has no parameters, or some that are not in memory.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a transformers model, or None")
    digest, count = hashlib.sha256(), 0
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        x = getattr(parameter, "to_local", parameter.detach)().detach()  # of a parameter in parts, those of this rank
        if x.device.type == "meta":
            raise ValueError(f"parameter {name} of the model is on the meta device, its values are not known")
        digest.update(f"{name} {list(x.shape)} {x.dtype}\n".encode())
        digest.update(_sample(x))
        count += 1
    if count == 0:
        raise ValueError("the model has no parameters to take a fingerprint of")
    return digest.hexdigest()


def _sample(x: Tensor) -> bytes:
    flat = x.reshape(-1)
    if flat.numel() == 0:
        return b""
    picked = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
    return picked.view(torch.uint8).numpy().tobytes()
