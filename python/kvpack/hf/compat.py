"""What differs between the versions of transformers that are supported, 5.14 and newer: nothing else asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs


def cache_layers(config: Any) -> list[tuple[str, dict[str, Any], Any]]:
    """Of every layer that a stock cache would have: its type, the arguments of its stock class, its own config.

    config: of the text model, `config.get_text_config(decoder=True)`.
    """
    types, arguments = get_layer_types_and_kwargs(config)
    if isinstance(arguments, Mapping):  # before 5.20: one for all layers
        arguments = [arguments] * len(types)
    own = config.per_layer_config
    if own is None:  # 5.14, where layers do not differ
        own = [config] * len(types)
    # The types may be fewer than the layers: older versions leave out last ones that share the keys of earlier ones.
    return [(kind, dict(of_class), own[i]) for i, (kind, of_class) in enumerate(zip(types, arguments, strict=True))]
