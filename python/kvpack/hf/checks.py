"""What can be wrong with keys and values, and the errors that say so."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpack import ops
from kvpack.spec import CodecSpec, Dtype

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
SIDES = ("key", "value")


def codes(specs: tuple[CodecSpec, CodecSpec]) -> dict[torch.dtype, tuple[int, int]]:
    """Codec codes (key, value) by the dtype of keys and values. Float64 is packed as float32."""
    out = {dtype: (specs[0].code(name), specs[1].code(name)) for dtype, name in DTYPES.items()}
    if "exact" not in (specs[0].name, specs[1].name):
        out[torch.float64] = out[torch.float32]
    return out


def layout(index: int, known: dict[torch.dtype, tuple[int, int]], keys: Tensor, values: Tensor) -> list[int]:
    """The layout list for a layer's first keys and values; ValueError for what cannot be packed."""
    where = f"layer {index}"
    for name, x in zip(SIDES, (keys, values), strict=True):
        if x.dim() != 4:
            raise ValueError(f"{where}: {name}s have {x.dim()} dims; allowed: 4, [batch, KV heads, tokens, head size]")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{where}: {name}s of shape {list(x.shape)} are empty; allowed: 1 or more rows and heads")
        if x.dtype not in known:
            allowed = ", ".join(map(str, known))
            raise ValueError(f"{where}: {name}s are {x.dtype}; allowed with these codecs: {allowed}")
        if x.device.type != "cpu":
            raise ValueError(f"{where}: {name}s are on {x.device}; allowed: the CPU in this release")
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise mismatch(index, keys, values)
    key_code, value_code = known[keys.dtype]
    out = [key_code, keys.shape[3], value_code, values.shape[3], keys.shape[1]]
    try:
        return out if torch.compiler.is_compiling() else ops.layout(*out)  # operators check it again
    except ValueError as error:
        sizes = f"head sizes {keys.shape[3]} of keys, {values.shape[3]} of values"
        raise ValueError(f"{where} cannot be packed ({sizes}): {error}") from error


def mismatch(index: int, keys: Tensor, values: Tensor) -> ValueError:
    return ValueError(
        f"layer {index}: keys {list(keys.shape)} {keys.dtype} and values {list(values.shape)} {values.dtype} "
        "differ in more than their head size; allowed: the same rows, KV heads, tokens and dtype"
    )


def change(index: int, keys: Tensor, values: Tensor, expected: tuple[object, ...]) -> ValueError:
    """The error for keys and values that do not continue what the layer holds."""
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        return mismatch(index, keys, values)
    batch, heads, key_dim, value_dim, dtype = expected
    return ValueError(
        f"layer {index}: keys {list(keys.shape)} and values {list(values.shape)} of {keys.dtype} do not "
        f"continue this cache, which holds {batch} rows, {heads} KV heads, head sizes {key_dim} (key) and "
        f"{value_dim} (value), {dtype}; reset() it or make a new one"
    )


def same_rows(told: int, batch: int) -> None:
    """ValueError unless a padding mask has the rows of the cache."""
    if told != batch:
        raise ValueError(f"the padding mask has {told} rows, the cache has {batch}")


def replace_nonfinite() -> bool:
    """Whether KVPACK_NONFINITE=zero asks to replace non-finite values; ValueError for another word."""
    word = os.environ.get("KVPACK_NONFINITE", "error")
    if word not in ("error", "zero"):
        raise ValueError(f"KVPACK_NONFINITE={word!r} is not allowed: error (default) or zero")
    return word == "zero"


def first_nonfinite(tokens: Tensor) -> tuple[int, int, int, float] | None:
    """(row, head, token, value) of the first value of [B, H, n, d] that is NaN or Inf."""
    found = (~torch.isfinite(tokens)).nonzero()
    if found.shape[0] == 0:
        return None
    b, h, t, d = found[0].tolist()
    return b, h, t, float(tokens[b, h, t, d])


ASKED_FOR = ("fused=False", "dense")  # what decodes because it was told to
_REMEDIES = {
    "gradients": "use torch.no_grad() (or torch.inference_mode())",
    "dropout": "call model.eval()",
}


def warn_decoded(index: int, reason: str) -> None:
    """Say that attention is not fused, and what can be done."""
    remedy = _REMEDIES.get(
        reason, 'packed bits are read by attention "sdpa", and after kvpack.enable(model); see kvpack doctor --model'
    )
    warnings.warn(
        f"kvpack: keys and values of layer {index} were decoded for attention, which is slow ({reason}): {remedy}. "
        "cache.stats() counts all such calls",
        stacklevel=2,
    )


CROP = "crop({}): allowed is a negative number, how many tokens to remove from the end"


def repeated_prompt(index: int) -> None:
    """RuntimeError where a model runs with `use_cache=False`; asked when as many tokens arrive as are there, and one.

    Such a model takes in all that it has seen on every step, and appends it. Neither keys nor masks tell: after a
    first layer that is not packed, or with learned positions, the same prompt has other keys. So the models that are
    running are asked.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals
        options = (names.get("kwargs"), names.get("model_kwargs"))  # of wrappers of forward, and of generate
        without = any(isinstance(x, dict) and x.get("use_cache") is False for x in options)
        if (without or names.get("use_cache") is False) and isinstance(names.get("self"), PreTrainedModel):
            raise RuntimeError(
                f"layer {index}: the whole prompt arrived a second time: a model that is called with a cache and "
                "use_cache=False appends everything it has seen on every step, and its output is wrong. Pass "
                "use_cache=True, or no cache; and call cache.reset() first"
            )
        frame = frame.f_back
