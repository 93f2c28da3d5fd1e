"""Operator ``kvpack::encode``: vectors to the canonical bytes of whole tiles, and the means of centred codecs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _tables, _tiles

SCHEMA = "encode(Tensor x, int codec, int side) -> (Tensor, Tensor)"


def _shapes(x: Tensor, codec: int, side: int) -> tuple[list[int], list[int]]:
    if x.dim() < 2:
        raise ValueError(f"x has {x.dim()} dims; it needs at least 2: [..., tokens, d]")
    _tables.check_dtype(x.dtype, "x")
    parsed = _tables.parse_code(codec)
    if parsed.exact and x.dtype != parsed.dtype:
        raise ValueError(f"x has dtype {x.dtype}; codec code {codec:#x} (exact) stores {parsed.dtype}")
    head_dim = _tables.check_head_dim(x.shape[-1])
    sizes = _tables.sections(codec, head_dim, side)
    tiles = (x.shape[-2] + _tables.TILE - 1) // _tables.TILE
    lead = list(x.shape[:-2])
    return [*lead, tiles, sizes.total], [*lead, *_tables.mean_shape(codec, tiles, head_dim, side)]


def fake(x: Tensor, codec: int, side: int) -> tuple[Tensor, Tensor]:
    data, means = _shapes(x, codec, side)
    return x.new_empty(data, dtype=torch.uint8), x.new_empty(means, dtype=torch.uint8)


def default(x: Tensor, codec: int, side: int) -> tuple[Tensor, Tensor]:
    shapes = _shapes(x, codec, side)
    data, means = _tiles.encode_tiles(x, _tables.parse_code(codec), side)
    return data.reshape(shapes[0]), means.reshape(shapes[1])


OP = _library.register(SCHEMA, fake, default)
