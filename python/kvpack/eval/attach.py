"""Puts an `Emulator` in the place of a model's attention for a while.

Models that look their attention up (`AttentionInterface`) get a registered function, which knows the layer,
softcap and sink logits. The few that call `scaled_dot_product_attention` themselves (Falcon) are intercepted
there, the layer being the attention module whose forward is running.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .emulation import Emulator, stock_scale
from .errors import EmulationError

_NAME = "kvpack_eval"
_SDPA = torch.nn.functional.scaled_dot_product_attention


class _Active:
    """What the registered functions, which are global, serve at the moment."""

    emulator: Emulator | None = None
    stock: str = "sdpa"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    emulator = _Active.emulator
    layer = getattr(module, "layer_idx", None)
    if emulator is not None and layer in emulator.layers:
        causal = options.get("is_causal")
        out = emulator.attend(
            int(layer),
            query,
            key,
            value,
            attention_mask,
            stock_scale(query, scaling),
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux"),
            bias=options.get("position_bias"),
        )
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    stock: Any = _stock_function(module)
    result: tuple[Tensor, Tensor | None] = stock(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return result


def _stock_function(module: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _Active.stock == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[_Active.stock]


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[_Active.stock](*args, **kwargs)


class _Interception(TorchFunctionMode):
    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.emulator = emulator
        self.layer: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA and self.layer in self.emulator.layers:
            out = self._sdpa(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        layer = self.layer
        assert layer is not None
        scaling = stock_scale(query, scale)
        return self.emulator.attend(layer, query, key, value, attn_mask, scaling, causal=is_causal)


@contextmanager
def _intercepted(model: Any, emulator: Emulator) -> Iterator[None]:
    mode = _Interception(emulator)

    def enter(module: Any, *_: Any) -> None:
        mode.layer = module.layer_idx

    def leave(*_: Any) -> None:
        mode.layer = None

    hooks = []
    for module in model.modules():
        if "Attention" in type(module).__name__ and isinstance(getattr(module, "layer_idx", None), int):
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave))
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _registered(model: Any, emulator: Emulator, stock: str) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    before = (_Active.emulator, _Active.stock)
    model.set_attn_implementation(_NAME)
    _Active.emulator, _Active.stock = emulator, stock
    try:
        yield
    finally:
        _Active.emulator, _Active.stock = before
        model.set_attn_implementation(stock)


def check_model(model: Any) -> str:
    """The model's attention: "sdpa", "eager" or "kvpack"; EmulationError where it can be neither replaced nor
    intercepted.
    """
    stock = str(model.config._attn_implementation)
    if stock in ("sdpa", "kvpack") or (stock == "eager" and model._can_set_attn_implementation()):
        return stock
    raise EmulationError(
        f"{type(model).__name__} with attention {stock!r} cannot be emulated; allowed: sdpa, eager, kvpack "
        "(model.set_attn_implementation), or mode chunked or stepwise"
    )


@contextmanager
def emulating(model: Any, emulator: Emulator) -> Iterator[None]:
    """Within the block, attention of the emulator's layers goes through it.

    Raises EmulationError for attention that can be neither replaced nor intercepted, and if a forward pass
    was made and never came by.
    """
    stock = check_model(model)
    if model._can_set_attn_implementation():
        with _registered(model, emulator, stock):
            yield
    else:
        with _intercepted(model, emulator):
            yield
    if emulator.calls == 0:
        raise EmulationError(f"{type(model).__name__} ran without its attention coming by: it cannot be emulated")
