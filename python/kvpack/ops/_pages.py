"""Pages behind a page table, as tensors: the only place of the defaults that follows an address.

A page table is an int64 tensor [B, P] of addresses. It is trusted as one trusts ``data_ptr``: whoever builds
it owns the pages, keeps them alive and made them ``page_bytes(layout)`` long. Only null and misaligned
addresses can be told here, and are.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from . import _tiles
from ._tables import KEY, LINE, PAGE_TILES, TILE, VALUE, Layout


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


class Page(NamedTuple):
    """A page, sharing its memory: records uint8 [kv_heads, slot, record_bytes], means uint8 [kv_heads, bytes]."""

    records: Tensor
    means: Tensor


def _page(address: int, layout: Layout) -> Page:
    memory = (ctypes.c_uint8 * layout.page).from_address(address)
    heads = torch.frombuffer(memory, dtype=torch.uint8).view(layout.kv_heads, layout.head)
    records = PAGE_TILES * layout.record
    return Page(heads[:, :records].view(layout.kv_heads, PAGE_TILES, layout.record), heads[:, records:])


def open_pages(table: Tensor, first: int, last: int, layout: Layout) -> list[list[Page]]:
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


def _mean_parts(side: int, layout: Layout) -> tuple[slice, slice, slice]:
    """Where the levels, the scales and the map of a side lie in the means of a KV head."""
    parts, at = [], 0
    for sizes in zip(*((s.means - 2 * s.mean_count, 2 * s.mean_count, s.map) for s in layout.sections), strict=True):
        first = at + (0 if side == KEY else sizes[KEY])
        parts.append(slice(first, first + sizes[side]))
        at += sum(sizes)
    return parts[0], parts[1], parts[2]


def _read_means(means: Tensor, side: int, layout: Layout) -> Tensor:
    """Of the means [..., bytes] of a KV head, those of one side as they stand alone: [..., n, entry]."""
    sizes, head = layout.sections[side], means.shape[:-1]
    levels, scales, maps = (means[..., part] for part in _mean_parts(side, layout))
    if sizes.map and not sizes.mean_count:
        return maps[..., None, :]
    count = sizes.mean_count
    both = (levels.reshape(*head, count, layout.head_dims[side]), scales.reshape(*head, count, 2))
    return torch.cat((*both, maps[..., None, :].expand(*head, count, sizes.map)), dim=-1)


def _write_means(means: Tensor, side: int, layout: Layout, new: Tensor) -> None:
    """The inverse of `_read_means`; the map is that of the first entry."""
    sizes, d = layout.sections[side], layout.head_dims[side]
    levels, scales, maps = _mean_parts(side, layout)
    if sizes.mean_count:
        means[..., levels] = new[..., :d].flatten(-2)
        means[..., scales] = new[..., d : d + 2].flatten(-2)
    if sizes.map:
        means[..., maps] = new[..., 0, -sizes.map :]


def blank(page: Tensor, slots: int, layout: Layout) -> None:
    """Zero what a page uint8 [page_bytes] holds beyond its first ``slots`` slots: records, and means of tiles."""
    heads = page.view(layout.kv_heads, layout.head)
    records = PAGE_TILES * layout.record
    heads[:, slots * layout.record : records] = 0
    for side in (KEY, VALUE):
        if layout.sections[side].mean_count == PAGE_TILES:
            levels, scales, _ = _mean_parts(side, layout)
            for part in (levels, scales):
                size = (part.stop - part.start) // PAGE_TILES
                heads[:, records + part.start + slots * size : records + part.stop] = 0


def frozen(page: Tensor, layout: Layout) -> bool:
    """Whether a page uint8 [page_bytes] has all the means and maps of its row: later tiles change none of them."""
    means = page.view(layout.kv_heads, layout.head)[:, PAGE_TILES * layout.record :]
    for side, sizes in enumerate(layout.sections):
        _, scales, maps = _mean_parts(side, layout)
        parts = ((scales, sizes.mean_count == 1), (maps, sizes.map > 0))
        if not all(bool(means[:, part].any(dim=1).all()) for part, there in parts if there):
            return False
    return True


def write_tiles(table: Tensor, tokens: tuple[Tensor, Tensor], first_tile: int, layout: Layout) -> None:
    """Encode keys and values [B, kv_heads, 64 * tiles, d] as the tiles from ``first_tile`` on.

    Where the mean is the row's, it is frozen at the row's first tile with a token that is not all zeros, and every
    page from there on carries a copy; likewise the map of a split codec.
    """
    tiles = tokens[KEY].shape[2] // TILE
    before = min(first_tile // PAGE_TILES, 1)  # one page more, for its mean
    begin = first_tile // PAGE_TILES - before
    opened = open_pages(table, begin * PAGE_TILES, first_tile + tiles, layout)
    places = [divmod(first_tile + t - begin * PAGE_TILES, PAGE_TILES) for t in range(tiles)]
    for side in (KEY, VALUE):
        codec, x, mean, maps = layout.codecs[side], tokens[side], None, None
        size = layout.sections[side].map
        if tiles == 0 or x.numel() == 0:
            continue
        if codec.center == "mean" or size:
            _tiles.check_finite(x, side)
            for b, pages in enumerate(opened):
                _freeze(x[b], pages, places, side, layout)
            pages_of = [[_read_means(pages[page].means, side, layout) for page, _ in places] for pages in opened]
            known = torch.stack([torch.cat([means[:, :1] for means in row], dim=1) for row in pages_of])
            mean, maps = (known, None) if codec.center == "mean" else (None, known[..., -size:])
        data, means = _tiles.encode_tiles(x, codec, side, mean, maps)
        for b, pages in enumerate(opened):
            for t, (page, slot) in enumerate(places):
                at = 0
                for start, stop in _ranges(layout)[side]:
                    pages[page].records[:, slot, start:stop] = data[b, :, t, at : at + stop - start]
                    at += stop - start
                if codec.center == "tile":
                    whole, width = _read_means(pages[page].means, side, layout), layout.head_dims[side] + 2
                    whole[:, slot, :width] = means[b, :, t, :width]
                    _write_means(pages[page].means, side, layout, whole)


def _freeze(x: Tensor, pages: list[Page], places: list[tuple[int, int]], side: int, layout: Layout) -> None:
    """Write the mean of a row x [kv_heads, tokens, d] and its map to the pages of its tiles, head by head."""
    codec, d, size = layout.codecs[side], layout.head_dims[side], layout.sections[side].map
    for t, (page, slot) in enumerate(places):
        now = _read_means(pages[page].means, side, layout)
        if slot == 0:
            before = _read_means(pages[page - 1].means, side, layout) if page else torch.zeros_like(now)
            now = before if codec.center != "tile" else torch.cat((now[..., :-size], before[..., -size:]), dim=-1)
        for h in range(layout.kv_heads):
            tile = x[h, t * TILE : (t + 1) * TILE]
            if size and not bool(now[h, 0, -size:].any()):
                now[h, :, -size:] = _tiles.maps_of(tile, codec, side)
            if codec.center == "mean" and not bool(now[h, 0, d : d + 2].any()):
                now[h] = _tiles.means_of(tile, codec, side, now[h, :, -size:] if size else None)
        _write_means(pages[page].means, side, layout, now)


def read_tiles(table: Tensor, counts: Tensor, side: int, layout: Layout) -> Tensor:
    """The packed tokens of one side: [B, kv_heads, sum(counts), d], float32 (for exact its own dtype)."""
    codec, head_dim = layout.codecs[side], layout.head_dims[side]
    batch, heads, tokens = table.shape[0], layout.kv_heads, counts_list(counts)
    tiles = len(tokens)
    if tiles == 0 or batch == 0:
        dtype = codec.dtype if codec.exact else torch.float32
        return torch.empty((batch, heads, sum(tokens), head_dim), dtype=dtype)
    opened = open_pages(table, 0, tiles, layout)
    records = torch.stack([torch.cat([page.records for page in pages], dim=1)[:, :tiles] for pages in opened])
    data = torch.cat([records[..., a:b] for a, b in _ranges(layout)[side]], dim=-1)
    means = torch.stack([torch.cat([_read_means(p.means, side, layout) for p in pages], dim=1) for pages in opened])
    count = tiles if codec.center == "tile" else means.shape[2]
    dense = _tiles.decode_tiles(data, means[:, :, :count], codec, side, head_dim)
    dense = dense.reshape(batch, heads, tiles * TILE, head_dim)
    if min(tokens) == TILE:
        return dense
    kept = torch.cat([torch.arange(t * TILE, t * TILE + n) for t, n in enumerate(tokens)])
    return dense[:, :, kept]


def _ranges(layout: Layout) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Byte ranges of (scales, codes) in a record, of either side; in a record, K and V alternate."""
    out: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    at = 0
    for section in range(2):
        for side in (KEY, VALUE):
            size = layout.sections[side][section]
            out[side].append((at, at + size))
            at += size
    return out
