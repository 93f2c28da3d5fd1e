"""Packed storage of one layer: pages, and the table through which kernels find them.

    row 0: [page][page][page]        a page: 4 tiles of 64 tokens, all KV heads, one uint8 tensor
    row 1: [page][page][page]        rows, forks and beams may hold the same page

Pages are shared without reference counts. A page knows how many of its slots were ever written (`filled`),
and a table may write slot s of its last page in place only while `filled == s`. Otherwise another owner has
been there, or the slot held tokens that a crop removed: the table then takes a copy of the slots it uses.
Slots that were written once are never written again, so whoever shares a page keeps reading what it read.
The mean and the map of a row are frozen by its first tile that is not all padding; until then, too, a table takes a
copy: in place, it would freeze them for the others.
Forks may go on in threads of their own, so to look at `filled` and to raise it is one step, under a lock.
A page that is not to be written at all, such as one of a file's memory map, counts as filled.

Offloading takes the pages of a table to host memory (`evict`) and back (`fetch`). It makes new pages, so that other
tables keep theirs where they are. The copy in host memory is kept: unless a slot was written since, to evict a page
again costs no copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kvpack import ops
from kvpack.ops import PAGE_TILES, TILE, _pages, _tables

_FIRST_PAGES = 4  # pages a fresh table has room for
_CLAIM = threading.Lock()  # held to take slots of pages, which other tables may hold


def normal_mode() -> AbstractContextManager[None]:
    """Make ordinary tensors even inside `torch.inference_mode`.

    Buffers outlive the call that made them and are written in place later, perhaps outside that mode, which
    torch refuses for tensors born inside it.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


class Page:
    """One page: `data`, uint8 [page_bytes], 64-byte aligned, and `filled`, the slots ever written (0..4).

    host: of an offloaded layer's page on the device, a copy in host memory, made when `host_filled` slots were.
    """

    __slots__ = ("data", "filled", "host", "host_filled")

    def __init__(self, data: Tensor, filled: int = 0, host: Tensor | None = None) -> None:
        self.data = data
        self.filled = filled
        self.host = host
        self.host_filled = filled

    def evicted(self, store: Callable[[Tensor], Tensor]) -> Page:
        """This page in host memory; `store` copies what is not there yet."""
        if self.host is None or self.host_filled != self.filled:
            self.host, self.host_filled = store(self.data), self.filled
        return Page(self.host, self.filled)

    def fetched(self, load: Callable[[Tensor], Tensor]) -> Page:
        """This page of host memory on the device."""
        return Page(load(self.data), self.filled, self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Page:
        return self  # a deep copy of a cache shares pages: see the module's rule


class PageTable:
    """The pages of one layer: a list per batch row, their addresses, and tokens per tile.

    addresses: int64 [B, P], `addresses[b, t // 4]` is the page with tile t of row b. P grows geometrically.
    counts: int32 [4 * P], tokens of each tile, the same for all rows: 64 except where a crop cut.
    tiles, tokens: how many are in use, per row.
    used: int64 [1], `tiles` as a tensor, for compiled graphs: a number would be compiled into them.
    evicted: the pages are in host memory, for offloading, and all addresses are 0.
    """

    def __init__(self) -> None:
        self.layout: list[int] = []
        self.rows: list[list[Page]] = []
        self.addresses: Tensor | None = None
        self.counts: Tensor | None = None
        self.used: Tensor | None = None
        self.tiles = 0
        self.tokens = 0
        self.evicted = False
        self._cut: dict[int, int] = {}  # tokens of the tiles that a crop cut
        self._first: Tensor | None = None  # the last answer of `first`

    def start(self, layout: Sequence[int], batch: int, tokens: int, device: torch.device) -> None:
        """Begin an empty table for `batch` rows of this layout; `tokens` are about to come.

        In a graph this only makes the tensors, with room for all of these tokens: pages are made, and numbers
        kept, by `write`, which runs before the graph's other effects on this object.
        """
        pages = _FIRST_PAGES
        if torch.compiler.is_compiling():
            pages += tokens // (TILE * PAGE_TILES)
        else:
            self.layout = list(layout)
            self.rows = [[] for _ in range(batch)]
            self._first = None
        with normal_mode():
            self.addresses = torch.zeros((batch, pages), dtype=torch.int64, device=device)
            self.counts = torch.full((pages * PAGE_TILES,), TILE, dtype=torch.int32, device=device)
            self.used = torch.zeros(1, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Let go of all pages and buffers."""
        self.layout, self.rows = [], []
        self.addresses = self.counts = self.used = self._first = None
        self.tiles = self.tokens = 0
        self.evicted = False
        self._cut = {}

    @property
    def cut(self) -> Mapping[int, int]:
        """Tokens of the tiles that a crop cut, by tile; all others hold 64."""
        return self._cut

    def adopt(self, rows: list[list[Page]], tiles: int, cut: Mapping[int, int]) -> None:
        """Take over pages, into a table just started: `tiles` tiles in each row, of 64 tokens but for those `cut`."""
        addresses = self._with_room(len(rows[0]))
        assert self.counts is not None
        assert self.used is not None
        self.rows, self.tiles, self._cut = rows, tiles, dict(cut)
        self.tokens = TILE * tiles - sum(TILE - count for count in cut.values())
        for tile, count in cut.items():
            self.counts[tile] = count
        self.used.fill_(tiles)
        self._refresh(addresses)

    def write(self, addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, layout: Sequence[int]) -> None:
        """Encode whole tiles as the next ones, allocating pages and copying shared ones.

        addresses, used: those of the table, or in a graph the tensors that stand for them.
        keys, values: [B, kv_heads, 64 * n, head size].

        After an error the table holds what it held before.
        """
        if not self.rows:
            self.rows = [[] for _ in range(keys.shape[0])]
            self.layout = list(layout)
        first_page, slot = divmod(self.tiles, PAGE_TILES)
        tiles = keys.shape[2] // TILE
        end = self.tiles + tiles
        last_page = -(-end // PAGE_TILES)
        kept = first_page + (slot > 0)
        size = ops.page_bytes(self.layout)
        for row in self.rows:
            del row[kept:]
        before = [list(row) for row in self.rows]
        with _CLAIM:
            for row in self.rows:
                if slot and not self._may_write(row[first_page], slot):
                    row[first_page] = self._copy(row[first_page], slot)
                while len(row) < last_page:
                    row.append(self._new(size, keys.device))
                for p in range(first_page, last_page):  # at once: the next row may hold the same page
                    row[p].filled = min(PAGE_TILES, end - p * PAGE_TILES)
        numbers = [[page.data.data_ptr() for page in row[first_page:last_page]] for row in self.rows]
        own = addresses if self.addresses is None else self._with_room(last_page)
        for table in (own, addresses):  # the same; a graph's may be the older, smaller one
            fits = min(last_page, table.shape[1])
            new = [row[: fits - first_page] for row in numbers]
            table[:, first_page:fits] = torch.tensor(new, dtype=torch.int64, device=table.device)
        try:
            ops.encode_pages(own, keys, values, self.tiles, self.layout)
        except Exception:
            self.rows = before
            self._refresh(own)
            raise
        self.tiles = end
        self.tokens += tiles * TILE
        for number in (used, self.used):
            if number is not None:
                number.fill_(end)

    def _with_room(self, pages: int) -> Tensor:
        """The addresses, with room for `pages` pages; grown, they and the counts are new tensors."""
        addresses, counts = self.addresses, self.counts
        assert addresses is not None
        assert counts is not None
        batch, room = addresses.shape
        if pages > room:
            more = max(pages, 2 * room)
            with normal_mode():
                grown = torch.zeros((batch, more), dtype=torch.int64, device=addresses.device)
                full = torch.full((more * PAGE_TILES,), TILE, dtype=torch.int32, device=addresses.device)
            grown[:, :room] = addresses
            full[: room * PAGE_TILES] = counts
            self.addresses, self.counts = addresses, counts = grown, full
            self._first = None
        return addresses

    def first(self, tiles: int) -> Tensor:
        """Counts of the first tiles, int32 [tiles]."""
        if self._first is None or self._first.shape[0] != tiles:
            assert self.counts is not None
            self._first = self.counts[:tiles]
        return self._first

    def _new(self, size: int, device: torch.device) -> Page:
        """A page without tiles. Its means are zeros: encoders leave what fills them up as it is."""
        data = torch.empty(size, dtype=torch.uint8, device=device)
        data.view(self.layout[4], -1)[:, PAGE_TILES * ops.record_bytes(self.layout) :] = 0
        return Page(data)

    def _may_write(self, page: Page, slot: int) -> bool:
        """Whether a table that uses the slots before this one may write it in place."""
        return page.filled == slot and _pages.frozen(page.data, _tables.parse_layout(self.layout))

    def _copy(self, page: Page, slots: int) -> Page:
        used, records = slots * ops.record_bytes(self.layout), PAGE_TILES * ops.record_bytes(self.layout)
        data = torch.empty_like(page.data)
        shape = (self.layout[4], ops.head_bytes(self.layout))
        for part in (slice(0, used), slice(records, None)):  # the slots in use, and the means
            data.view(shape)[:, part] = page.data.view(shape)[:, part]
        return Page(data, slots)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens of each row, whole tiles and the head of one more."""
        if self.counts is None:
            return
        excess = self.tokens - tokens
        while excess > 0:
            last = self.tiles - 1
            count = self._cut.pop(last, TILE)
            if count <= excess:
                self.tiles, left, gone = last, TILE, count  # a later tile in this place starts full
            else:
                gone = excess
                self._cut[last] = left = count - gone
            self.counts[last] = left
            self.tokens -= gone
            excess -= gone
        if self.used is not None:
            self.used.fill_(self.tiles)
        pages = -(-self.tiles // PAGE_TILES)
        for row in self.rows:
            del row[pages:]

    def select(self, index: Sequence[int]) -> None:
        """Make row i the former row `index[i]`; rows may repeat and share their pages."""
        if self.addresses is None:
            return
        self.rows = [list(self.rows[i]) for i in index]
        with normal_mode():
            wanted = torch.tensor(index, dtype=torch.int64, device=self.addresses.device)
            self.addresses = self.addresses.index_select(0, wanted)

    def to(self, device: torch.device) -> None:
        """Move pages and tables to a device; pages that rows share stay shared, other tables keep theirs.

        Those that lie in host memory for offloading may have other owners there, of which `filled` does not tell: they
        count as filled.
        """
        if self.addresses is None or self.counts is None or (self.addresses.device == device and not self.evicted):
            return
        evicted, self.evicted = self.evicted, False
        self._replace(lambda page: Page(page.data.to(device), PAGE_TILES if evicted else page.filled))
        self.counts, self._first = self.counts.to(device), None
        self.used = None if self.used is None else self.used.to(device)
        self.addresses = self.addresses.to(device)
        self._refresh(self.addresses)

    def evict(self, store: Callable[[Tensor], Tensor]) -> None:
        """Put the pages into host memory, for offloading. store: a page's bytes to a copy there."""
        if self.addresses is None or self.evicted:
            return
        self._replace(lambda page: page.evicted(store))
        self.evicted = True
        self.addresses.zero_()

    def fetch(self, load: Callable[[Tensor], Tensor]) -> None:
        """Bring evicted pages back to the device. load: a page's bytes to a copy there."""
        if self.addresses is None or not self.evicted:
            return
        self._replace(lambda page: page.fetched(load))
        self.evicted = False
        self._refresh(self.addresses)

    def _replace(self, change: Callable[[Page], Page]) -> None:
        """Put another page in the place of each, one for all rows that hold it. After an error all are as they were."""
        new: dict[int, Page] = {}
        for row in self.rows:
            for page in row:
                if id(page) not in new:
                    new[id(page)] = change(page)
        self.rows = [[new[id(page)] for page in row] for row in self.rows]

    def _refresh(self, addresses: Tensor) -> None:
        """Write the addresses of all pages anew."""
        addresses.zero_()
        numbers = [[page.data.data_ptr() for page in row] for row in self.rows]
        if numbers and numbers[0]:
            addresses[:, : len(numbers[0])] = torch.tensor(numbers, dtype=torch.int64, device=addresses.device)

    def contents(self) -> tuple[list[Tensor], list[list[int]]]:
        """The bytes of every page, once, with zeros in slots not in use; and for each row, which pages it has."""
        pages: list[Tensor] = []
        number: dict[int, int] = {}
        for p, column in enumerate(zip(*self.rows, strict=True)):
            slots = min(PAGE_TILES, self.tiles - p * PAGE_TILES)
            for page in column:
                if id(page) not in number:
                    number[id(page)] = len(pages)
                    pages.append(page.data if slots == PAGE_TILES else _blanked(page.data, slots, self.layout))
        return pages, [[number[id(page)] for page in row] for row in self.rows]

    def slots_in_use(self) -> dict[int, tuple[Page, int]]:
        """Per page (by the address of its bytes): the page, and how many of its slots this table uses."""
        return {
            page.data.data_ptr(): (page, min(PAGE_TILES, self.tiles - p * PAGE_TILES))
            for row in self.rows
            for p, page in enumerate(row)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> PageTable:
        other = PageTable()
        memo[id(self)] = other
        other.layout = list(self.layout)
        other.rows = [list(row) for row in self.rows]
        other.tiles, other.tokens, other._cut = self.tiles, self.tokens, dict(self._cut)
        other.evicted = self.evicted
        with normal_mode():
            other.addresses = None if self.addresses is None else self.addresses.clone()
            other.counts = None if self.counts is None else self.counts.clone()
            other.used = None if self.used is None else self.used.clone()
        return other

    def __getstate__(self) -> dict[str, Any]:
        rows = [[(page.data, page.filled) for page in row] for row in self.rows]
        return {**self.__dict__, "rows": rows, "_first": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        shared: dict[int, Page] = {}  # the unpickler restores one tensor object per shared page
        self.rows = [[shared.setdefault(id(data), Page(data, filled)) for data, filled in row] for row in state["rows"]]
        if self.addresses is not None and not self.evicted:
            self._refresh(self.addresses)  # the old addresses belong to another process


def _blanked(page: Tensor, slots: int, layout: Sequence[int]) -> Tensor:
    copy = page.clone()
    _pages.blank(copy, slots, _tables.parse_layout(layout))
    return copy
