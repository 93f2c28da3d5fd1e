"""Operator ``kvpack::decode``: the canonical bytes of whole tiles back to vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _tables, _tiles

SCHEMA = (
    "decode(Tensor packed, Tensor means, int codec, int side, int tokens, int head_dim, ScalarType dtype) -> Tensor"
)


def _shape(
    packed: Tensor, means: Tensor, codec: int, side: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> list[int]:
    if packed.dtype != torch.uint8 or packed.dim() < 2:
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; allowed: uint8 [..., tiles, bytes]")
    _tables.check_dtype(dtype, "the result")
    size = _tables.sections(codec, _tables.check_head_dim(head_dim), side).total
    if packed.shape[-1] != size:
        raise ValueError(f"packed has {packed.shape[-1]} bytes per tile; allowed for this codec: {size}")
    tiles = packed.shape[-2]
    if tokens < 0 or (tokens + _tables.TILE - 1) // _tables.TILE != tiles:
        raise ValueError(f"tokens is {tokens}, which needs another number of tiles than packed has, {tiles}")
    wanted = [*packed.shape[:-2], *_tables.mean_shape(codec, tiles, head_dim, side)]
    if means.dtype != torch.uint8 or list(means.shape) != wanted:
        raise ValueError(f"means is {means.dtype} {list(means.shape)}; allowed: uint8 {wanted}")
    return [*packed.shape[:-2], tokens, head_dim]


def fake(
    packed: Tensor, means: Tensor, codec: int, side: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(_shape(packed, means, codec, side, tokens, head_dim, dtype), dtype=dtype)


def default(
    packed: Tensor, means: Tensor, codec: int, side: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    shape = _shape(packed, means, codec, side, tokens, head_dim, dtype)
    whole = _tiles.decode_tiles(packed, means, _tables.parse_code(codec), side, head_dim)
    flat = whole.reshape(*shape[:-2], packed.shape[-2] * _tables.TILE, head_dim)[..., :tokens, :]
    return flat.to(dtype, copy=True, memory_format=torch.contiguous_format)


OP = _library.register(SCHEMA, fake, default)
