"""Pages behind a page table, as tensors: the only place of the defaults that follows an address.

A page table is an int64 tensor [B, P] of addresses. It is trusted as one trusts ``data_ptr``: whoever builds
it owns the pages, keeps them alive and made them ``page_bytes(layout)`` long. Only null and misaligned
addresses can be told here, and are.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import _tables, _tiles
from ._tables import KEY, LINE, PAGE_TILES, TILE, Layout


def check_table(table: Tensor) -> None:
    """ValueError unless ``table`` is an int64 tensor [B, P]."""
    if table.dtype != torch.int64 or table.dim() != 2:
        raise ValueError(f"table is {table.dtype} with {table.dim()} dims; allowed: torch.int64 [B, P]")


def check_counts(counts: Tensor, table: Tensor) -> None:
    """ValueError unless ``counts`` is int32 [T] with at most as many tiles as the table's pages hold."""
    if counts.dtype != torch.int32 or counts.dim() != 1:
        raise ValueError(f"counts is {counts.dtype} with {counts.dim()} dims; allowed: torch.int32 [T]")
    if counts.shape[0] > table.shape[1] * PAGE_TILES:
        raise ValueError(
            f"counts names {counts.shape[0]} tiles; the table's {table.shape[1]} pages hold {PAGE_TILES} each"
        )


def counts_list(counts: Tensor) -> list[int]:
    """Tokens per tile; ValueError unless each is in 1..64."""
    values: list[int] = counts.tolist()
    for tile, count in enumerate(values):
        if not 1 <= count <= TILE:
            raise ValueError(f"counts[{tile}] is {count}; allowed: 1..{TILE}")
    return values


def _page(address: int, layout: Layout) -> Tensor:
    """The page at an address as uint8 [kv_heads, slot, record_bytes], sharing its memory."""
    memory = (ctypes.c_uint8 * layout.page).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(layout.kv_heads, PAGE_TILES, layout.record)


def open_pages(table: Tensor, first: int, last: int, layout: Layout) -> list[list[Tensor]]:
    """The pages that hold tiles ``first`` to ``last`` (exclusive) of each row; all are checked first."""
    if table.device.type != "cpu":
        raise ValueError(f"table is on {table.device}; allowed: the CPU, as the pages of this release")
    begin, end = first // PAGE_TILES, -(-last // PAGE_TILES)
    rows = table[:, begin:end].tolist() if last > first else [[] for _ in range(table.shape[0])]
    for b, row in enumerate(rows):
        for p, address in enumerate(row, start=begin):
            if address <= 0 or address % LINE:
                raise ValueError(
                    f"table[{b}, {p}] is {address}; allowed: page addresses, not null, {LINE}-byte aligned"
                )
    return [[_page(address, layout) for address in row] for row in rows]


def write_tiles(table: Tensor, sides: tuple[Tensor, Tensor], first_tile: int, layout: Layout) -> None:
    """Store both sides, uint8 [B, kv_heads, tiles, side_bytes], as the tiles from ``first_tile`` on."""
    tiles = sides[KEY].shape[2]
    begin = first_tile // PAGE_TILES
    records = sides[KEY].new_empty((*sides[KEY].shape[:3], layout.record))
    for data, ranges in zip(sides, _ranges(layout), strict=True):
        at = 0
        for start, stop in ranges:
            records[..., start:stop] = data[..., at : at + stop - start]
            at += stop - start
    for b, pages in enumerate(open_pages(table, first_tile, first_tile + tiles, layout)):
        for t in range(tiles):
            page, slot = divmod(first_tile + t, PAGE_TILES)
            pages[page - begin][:, slot].copy_(records[b, :, t])


def read_tiles(table: Tensor, counts: Tensor, side: int, layout: Layout) -> Tensor:
    """The packed tokens of one side: [B, kv_heads, sum(counts), d], float32 (for exact its own dtype)."""
    codec, head_dim, sizes = layout.codecs[side], layout.head_dims[side], layout.sections
    batch, heads, tokens = table.shape[0], layout.kv_heads, counts_list(counts)
    tiles = len(tokens)
    if tiles == 0 or batch == 0:
        dtype = codec.dtype if codec.exact else torch.float32
        return torch.empty((batch, heads, sum(tokens), head_dim), dtype=dtype)
    rows = [torch.cat(pages, dim=1)[:, :tiles] for pages in open_pages(table, 0, tiles, layout)]
    records = torch.stack(rows)  # [B, kv_heads, tiles, record_bytes]
    data = torch.cat([records[..., a:b] for a, b in _ranges(layout)[side]], dim=-1)
    dense = _tiles.decode_tiles(data, codec, side, head_dim, sizes[side])
    dense = dense.reshape(batch, heads, tiles * TILE, head_dim)
    if min(tokens) == TILE:
        return dense
    kept = torch.cat([torch.arange(t * TILE, t * TILE + n) for t, n in enumerate(tokens)])
    return dense[:, :, kept]


def _ranges(layout: Layout) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Byte ranges of (scales, mean, codes) in a record, of either side; in a record, K and V alternate."""
    out: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    at = 0
    for section in range(3):
        for side in (KEY, _tables.VALUE):
            size = layout.sections[side][section]
            out[side].append((at, at + size))
            at += size
    return out
