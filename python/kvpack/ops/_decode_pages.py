"""Operator ``kvpack::decode_pages``: one side of the packed tokens of a table, as a dense tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library, _pages, _tables

SCHEMA = "decode_pages(Tensor table, Tensor counts, int side, int[] layout, ScalarType dtype) -> Tensor"


def _check(table: Tensor, counts: Tensor, side: int, layout: Sequence[int], dtype: torch.dtype) -> None:
    _tables.parse_layout(layout)
    _tables.check_side(side)
    _tables.check_dtype(dtype, "the result")
    _pages.check_table(table)
    _pages.check_counts(counts, table)


def fake(table: Tensor, counts: Tensor, side: int, layout: Sequence[int], dtype: torch.dtype) -> Tensor:
    _check(table, counts, side, layout, dtype)
    parsed = _tables.parse_layout(layout)
    tokens = torch.library.get_ctx().new_dynamic_size()  # sum(counts), which only the values know
    return table.new_empty((table.shape[0], parsed.kv_heads, tokens, parsed.head_dims[side]), dtype=dtype)


def default(table: Tensor, counts: Tensor, side: int, layout: Sequence[int], dtype: torch.dtype) -> Tensor:
    _check(table, counts, side, layout, dtype)
    dense = _pages.read_tiles(table, counts, side, _tables.parse_layout(layout))
    return dense.to(dtype).contiguous()


OP = _library.register(SCHEMA, fake, default, extra_tags=(torch.Tag.dynamic_output_shape,))
