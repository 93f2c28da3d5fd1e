"""Operator ``kvpack::encode_pages``: keys and values of whole tiles into the pages of a table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _library, _pages, _tables
from ._tables import KEY, PAGE_TILES, TILE, VALUE

# The pages lie outside every tensor argument; the table stands for them, so it is what is declared mutated,
# and a later read through the same table is ordered after the write.
SCHEMA = "encode_pages(Tensor(a!) table, Tensor keys, Tensor values, int first_tile, int[] layout) -> ()"


def _check(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, layout: Sequence[int]) -> None:
    parsed = _tables.parse_layout(layout)
    _pages.check_table(table)
    for name, x, side in (("keys", keys, KEY), ("values", values, VALUE)):
        _tables.check_tokens(name, x, table.shape[0], parsed, side)
        codec = parsed.codecs[side]
        if codec.exact and x.dtype != codec.dtype:
            raise ValueError(f"{name} have dtype {x.dtype}; the layout's exact codec stores {codec.dtype}")
    if keys.dtype != values.dtype or keys.shape[2] != values.shape[2]:
        raise ValueError(
            f"keys are {keys.dtype} of {keys.shape[2]} tokens, values {values.dtype} of {values.shape[2]}; "
            "allowed: the same dtype and number of tokens"
        )
    tokens = keys.shape[2]
    if tokens % TILE != 0:
        raise ValueError(f"keys and values have {tokens} tokens; allowed: multiples of {TILE} (whole tiles)")
    if first_tile < 0 or first_tile + tokens // TILE > table.shape[1] * PAGE_TILES:
        raise ValueError(
            f"tiles {first_tile}..{first_tile + tokens // TILE - 1} do not lie in the table; allowed: "
            f"0..{table.shape[1] * PAGE_TILES - 1}"
        )


def fake(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, layout: Sequence[int]) -> None:
    _check(table, keys, values, first_tile, layout)


def default(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, layout: Sequence[int]) -> None:
    _check(table, keys, values, first_tile, layout)
    parsed = _tables.parse_layout(layout)
    _pages.write_tiles(table, (keys, values), first_tile, parsed)


OP = _library.register(SCHEMA, fake, default)
