"""Operator ``kvpack::encode``: vectors to the canonical bytes of whole tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _tables, _tiles

SCHEMA = "encode(Tensor x, int codec, int side) -> Tensor"


def _shape(x: Tensor, codec: int, side: int) -> list[int]:
    if x.dim() < 2:
        raise ValueError(f"x has {x.dim()} dims; it needs at least 2: [..., tokens, d]")
    _tables.check_dtype(x.dtype, "x")
    parsed = _tables.parse_code(codec)
    if parsed.exact and x.dtype != parsed.dtype:
        raise ValueError(f"x has dtype {x.dtype}; codec code {codec:#x} (exact) stores {parsed.dtype}")
    sizes = _tables.sections(codec, _tables.check_head_dim(x.shape[-1]), side)
    return [*x.shape[:-2], (x.shape[-2] + _tables.TILE - 1) // _tables.TILE, sizes.total]


def fake(x: Tensor, codec: int, side: int) -> Tensor:
    return x.new_empty(_shape(x, codec, side), dtype=torch.uint8)


def default(x: Tensor, codec: int, side: int) -> Tensor:
    shape = _shape(x, codec, side)
    sizes = _tables.sections(codec, x.shape[-1], side)
    return _tiles.encode_tiles(x, _tables.parse_code(codec), side, sizes).reshape(shape)


OP = _library.register(SCHEMA, fake, default)
