"""What differs between the versions of transformers that are supported, 5.16 and newer: nothing else asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import cache_utils

from kvpack._extras import MissingExtraError, too_old

_trouble = too_old(transformers.__version__)
if _trouble is not None:
    raise MissingExtraError(_trouble, name="transformers")


def cache_layers(config: Any) -> list[tuple[str, dict[str, Any], Any]]:
    """Of every layer that a stock cache would have: its type, the arguments of its stock class, its own config.

    config: of the text model, `config.get_text_config(decoder=True)`.
    """
    types, arguments = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(arguments, Mapping):  # before 5.20: one for all layers
        arguments = [arguments] * len(types)
    # The types may be fewer than the layers: older versions leave out last ones that share the keys of earlier ones.
    return [
        (kind, dict(of_class), config.per_layer_config[i])
        for i, (kind, of_class) in enumerate(zip(types, arguments, strict=True))
    ]


def stock_layer(kind: str, arguments: dict[str, Any]) -> Any:
    """A new layer of the class that transformers has for this type."""
    return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
