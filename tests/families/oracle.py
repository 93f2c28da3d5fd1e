"""What a packed cache means, without one: a stock layer that keeps every token as it came, and gives attention

    [sinks as they came][whole tiles: codec.decode(codec.encode(...))][window, and the call's own tokens, as they came]

by the rule of tiles and window, from the public codecs. It shares no code with `kvpack.hf`, and knows no padding.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import kvpack

from .families import FAMILIES

TILE = 64


class OracleLayer(DynamicLayer):  # type: ignore[misc]
    """tiles: keys and values [B, H, 1..64, d] of each tile, decoded. A crop cuts them; what is left stays as it is."""

    def __init__(self, key: str, value: str, window: int, sinks: int) -> None:
        super().__init__()
        self.codecs = (key, value)
        self.window, self.sinks = window, sinks
        self.tiles: list[list[Tensor]] = []
        self.first: list[Tensor] | None = None  # the first tile as it came: its mean serves the row

    @property
    def coded(self) -> int:
        return sum(tile[0].shape[2] for tile in self.tiles)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        exact = super().update(key_states, value_states)
        begin = self.sinks + self.coded
        seen = tuple(
            torch.cat([x[:, :, : self.sinks], *(tile[side] for tile in self.tiles), x[:, :, begin:]], dim=2)
            for side, x in enumerate(exact)
        )
        while exact[0].shape[2] - self.sinks - self.coded >= self.window + TILE:
            begin = self.sinks + self.coded
            self.tiles.append(self.encode([x[:, :, begin : begin + TILE] for x in exact]))
        return seen

    def encode(self, tile: list[Tensor]) -> list[Tensor]:
        """Encoded behind the row's first tile, where there is one, and decoded again."""
        if not self.tiles:
            self.first = tile
        assert self.first is not None
        out = []
        for name, side, x, first in zip(self.codecs, ("key", "value"), tile, self.first, strict=True):
            codec = kvpack.codec(name, head_dim=x.shape[-1], side=side)
            both = torch.cat([first, x], dim=2).contiguous()
            out.append(torch.as_tensor(codec.decode(codec.encode(both)))[:, :, TILE:].to(x.dtype))
        return out

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        left = max(0, self.get_seq_length() - self.sinks)
        while self.coded > left:
            excess = self.coded - left
            self.tiles[-1] = [x[:, :, : x.shape[2] - excess] for x in self.tiles[-1]]
            if self.tiles[-1][0].shape[2] == 0:
                self.tiles.pop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.tiles = [[x.index_select(0, beam_idx) for x in tile] for tile in self.tiles]
        if self.first is not None:
            self.first = [x.index_select(0, beam_idx) for x in self.first]


class _EncoderDecoder(t.EncoderDecoderCache):  # type: ignore[misc]
    def check_dynamic_cache(self, method: str) -> None:
        """Stock, this would refuse."""


def oracle(family: str, config: Any, key: str, value: str, window: int, sinks: int) -> Any:
    """The cache of a family with an `OracleLayer` for every layer that is packed."""
    layers = [
        OracleLayer(key, value, window, sinks) if index in FAMILIES[family].packed else layer
        for index, layer in enumerate(t.DynamicCache(config=config).layers)
    ]
    own = t.Cache(layers=layers)
    return _EncoderDecoder(own, t.DynamicCache()) if config.is_encoder_decoder else own
