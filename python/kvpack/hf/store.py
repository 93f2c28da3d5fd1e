"""Store: where the tokens of one layer lie, and how they move.

    one row:   [sinks][ packed tiles ........ ][ window ]
               side    pages, 64 tokens per     buffer
               buffer  tile, never rewritten

Tokens arrive in the window, and leave it in whole tiles for as long as it holds at least `window_size + 64`.
The first tokens of all are *pending* until the padding of the rows is known or given up on, and are then
placed: as sinks, tiles and window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpack import ops
from kvpack.ops import TILE
from kvpack.spec import CodecSpec

from . import checks, offload, padding, page_ops
from .pages import PageTable, normal_mode
from .stats import Counters

KEY, VALUE = 0, 1
_COPIED = (torch.float32, torch.float16, torch.bfloat16)  # dtypes that `ops.append` takes
Pair = tuple[Tensor, Tensor]


class Store:
    """Sinks, tiles and window of a layer, for all its rows.

    length: tokens in each row. Each of them is a sink, in a tile, in the window, or pending.
    epoch: raised by every change but appending; what refers to an older one is no longer true.
    away: the pages are in host memory, or on their way back: `bring` them before they are read or written.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    unread: Tensor | None
    warned: set[str]

    def __init__(self, key: CodecSpec, value: CodecSpec, window: int, sinks: int, index: int) -> None:
        self.specs = (key, value)
        self.codes = checks.codes(self.specs)
        self.window_size = window
        self.sinks_wanted = sinks
        self.index = index
        self.table = PageTable()
        self.counters = Counters()
        self.writer = page_ops.enrol(self)
        self.epoch = 0
        self._clear()

    def _clear(self) -> None:
        self.epoch += 1
        self.is_initialized = False
        self.length = 0
        self.layout: list[int] = []
        self.table.clear()
        self.sinks: Pair | None = None  # [B, Hkv, sinks_wanted, d], `sink_count` of them in use
        self.sink_count = 0
        self.window: Pair | None = None  # [B, Hkv, window_size + 64, d], `window_count` of them in use
        self.window_count = 0
        self.fresh = 0  # tiles that the last append packed
        self.pending: Pair | None = None
        self.placed = 0  # length when pending tokens were placed
        self.pads: Tensor | None = None  # int64 [B]; None: no padding, as far as is known
        self.pad_max = 0
        self.rows: Tensor | None = None  # int32 [B, 2], pad and sink_start; None: zeros
        self.away = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.writer = page_ops.enrol(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        with normal_mode():
            other.__setstate__({name: copy.deepcopy(x, memo) for name, x in self.__dict__.items()})
        return other

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Take shapes and dtype from the first keys and values; ValueError if they cannot be packed."""
        self.layout = checks.layout(self.index, self.codes, keys, values)
        self.dtype, self.device = keys.dtype, keys.device
        self.batch, heads = keys.shape[:2]
        self.expected = (self.batch, heads, keys.shape[3], values.shape[3], self.dtype)
        self.table.start(self.layout, self.batch, keys.shape[2], self.device)
        self.is_initialized = True

    # Appending.

    def append(self, own: Pair, count: int) -> tuple[Pair, int]:
        """Add `count` tokens; returns the exact ones, window and own, as they stand before packing: tensors that begin
        with them, and their number.

        After an error the store is as it was.
        """
        assert self.window is not None
        sink_count, fresh = self.sink_count, count
        if sink_count < self.sinks_wanted:  # so far, there are fewer tokens than sinks
            assert self.sinks is not None
            taken = min(self.sinks_wanted - sink_count, count)
            for buffer, new in zip(self.sinks, own, strict=True):
                buffer[:, :, sink_count : sink_count + taken] = new[:, :, :taken]
            sink_count += taken
            own = (own[KEY][:, :, taken:], own[VALUE][:, :, taken:])
            fresh -= taken
        begin = self.window_count
        end = begin + fresh
        keys, values = self.window
        if end <= self.window_size + TILE:
            _write((keys, values), own, begin)
            exact = (keys, values)
        else:
            exact = (
                torch.cat((keys[:, :, :begin], own[KEY]), dim=2),
                torch.cat((values[:, :, :begin], own[VALUE]), dim=2),
            )
        self.fresh, left = 0, end
        if end >= self.window_size + TILE:
            left = self._pack(exact, end)
        self.window_count, self.sink_count = left, sink_count
        self.length += count
        return exact, end

    def append_pending(self, own: Pair, count: int) -> Pair:
        """Add `count` tokens to the pending ones; returns all of them."""
        if self.pending is not None:
            own = (
                torch.cat((self.pending[KEY], own[KEY]), dim=2),
                torch.cat((self.pending[VALUE], own[VALUE]), dim=2),
            )
        self.pending = own
        self.length += count
        return own

    def place(self) -> None:
        """Turn pending tokens into sinks, tiles and window. After an error they are still pending."""
        assert self.pending is not None
        length = self.length
        count = min(self.sinks_wanted, length)
        if self.pads is None:
            self.rows = None
            sinks = (self.pending[KEY][:, :, :count], self.pending[VALUE][:, :, :count])
            stream = (self.pending[KEY][:, :, count:], self.pending[VALUE][:, :, count:])
        else:
            pads = self.pads = self.pads.to(self.device)
            start = pads.clamp(max=max(0, length - self.sinks_wanted))
            self.rows = torch.stack((pads, start), dim=1).to(torch.int32)
            first = padding.sink_positions(self.rows, count, self.device)
            rest = padding.stream_positions(self.rows, count, 0, length - count, self.device)
            keys, values = self.pending
            sinks = (padding.take_real(keys, first, pads), padding.take_real(values, first, pads))
            stream = (padding.take_real(keys, rest, pads), padding.take_real(values, rest, pads))
        self.sink_count, self.placed = count, length
        end = length - count
        if end >= self.window_size + TILE:
            end = self._pack(stream, end)
        else:
            self.window = self.buffers(stream, self.window_size + TILE)
        self.window_count = end
        if self.sinks_wanted:
            self.sinks = self.buffers(sinks, self.sinks_wanted)
        self.pending = None

    def buffers(self, content: Pair, capacity: int) -> Pair:
        """New buffers of `capacity` tokens that begin with the content."""
        with normal_mode():
            keys, values = (x.new_empty((*x.shape[:2], capacity, x.shape[3])) for x in content)
        _write((keys, values), content, 0)
        return keys, values

    def _pack(self, exact: Pair, count: int) -> int:
        """Pack whole tiles from the head of `count` exact tokens; the rest starts a new window.

        The window gets new buffers, because the handles of this call still read the old ones. Returns the
        number of tokens in it.
        """
        tiles = (count - self.window_size) // TILE
        stop = tiles * TILE
        keys, values = exact[KEY][:, :, :stop], exact[VALUE][:, :, :stop]
        if self.pads is not None and self.pad_max > self.placed:  # padding went on after placing
            places = padding.stream_positions(self.rows, self.sinks_wanted, self.table.tokens, stop, self.device)
            keys = padding.zero_padded(keys, places, self.pads)
            values = padding.zero_padded(values, places, self.pads)
        addresses, used = self.table.addresses, self.table.used
        assert addresses is not None
        assert used is not None
        if torch.compiler.is_compiling():
            page_ops.write_tiles(addresses, used, keys, values, self.writer, self.layout)
        else:
            self.write_tiles(addresses, used, keys, values, self.layout)
        self.fresh = tiles
        rest = (exact[KEY][:, :, stop:count], exact[VALUE][:, :, stop:count])
        self.window = self.buffers(rest, self.window_size + TILE)
        return count - stop

    def write_tiles(self, addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, layout: list[int]) -> None:
        """Encode tiles into pages; called eagerly, or by `kvpack::write_tiles` from a compiled graph.

        In a graph, what the same call sets on this object (sinks, layout, ...) may not have arrived yet.

        ValueError, naming layer, side and position, for values that are not finite or whose scale overflows.
        """
        sides = [keys.float(), values.float()] if keys.dtype == torch.float64 else [keys, values]
        if checks.replace_nonfinite():
            for side, tokens in enumerate(sides):
                bad = int((~torch.isfinite(tokens)).sum())
                if bad:
                    self.counters.nonfinite_replaced += bad
                    sides[side] = torch.nan_to_num(tokens, nan=0.0, posinf=0.0, neginf=0.0)
        try:
            self.table.write(addresses, used, sides[KEY], sides[VALUE], layout)
        except (ValueError, RuntimeError) as error:
            raise ValueError(self._explain(error, sides)) from error

    def _explain(self, error: Exception, sides: list[Tensor]) -> str:
        for side, tokens in enumerate(sides):
            found = checks.first_nonfinite(tokens)
            if found is not None:
                row, head, token, value = found
                index = self.table.tokens + token
                places = padding.stream_positions(self.rows, self.sinks_wanted, index, 1, tokens.device)
                position = int(places[row if places.shape[0] > 1 else 0, 0])
                return (
                    f"layer {self.index}: the {checks.SIDES[side]} of position {position} (row {row}, KV "
                    f"head {head}) holds {value}; allowed are finite values. KVPACK_NONFINITE=zero replaces "
                    "others by 0 and counts them in cache.stats()"
                )
        return f"layer {self.index}: {error}"

    # Counting, of eager calls and of those in compiled graphs.

    def count_fused(self, packed: int) -> None:
        """Count a call that read `packed` tokens as they are."""
        self.counters.fused_calls += 1
        self.counters.packed_tokens_read += packed

    def count_fallback(self, packed: int, reason: str) -> None:
        """Count a call that decoded `packed` tokens; warn of a reason that the cache did not meet before."""
        counts = self.counters.fallback_calls
        counts[reason] = counts.get(reason, 0) + 1
        self.counters.packed_tokens_read += packed
        if reason not in self.warned and reason not in checks.ASKED_FOR:
            self.warned.add(reason)
            checks.warn_decoded(self.index, reason)

    # Every other change.

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (all of them, if there are fewer)."""
        if tokens_to_remove > 0:
            raise ValueError(checks.CROP.format(tokens_to_remove))
        if tokens_to_remove == 0 or self.length == 0:
            return
        left = self.length + tokens_to_remove
        if left <= 0:
            self._clear()
            return
        self.epoch += 1
        self.length = left
        if self.pending is not None:
            self.pending = (self.pending[KEY][:, :, :left], self.pending[VALUE][:, :, :left])
            return
        sinks = min(self.sink_count, left)
        if self.rows is not None:
            self._crop_rows(left, sinks)
        stream = left - sinks
        self.sink_count = sinks
        self.window_count = max(0, stream - self.table.tokens)
        self.table.crop(stream)

    def _crop_rows(self, left: int, sinks: int) -> None:
        """Move sinks that would lie beyond the end: in such a row, only padding lies before them."""
        assert self.rows is not None
        assert self.pads is not None
        self.pads = self.pads.clamp(max=left)
        self.pad_max = min(self.pad_max, left)
        old = self.rows[:, 1:].to(torch.int64)
        new = old.clamp(max=left - sinks)
        self.rows = torch.cat((self.pads[:, None], new), dim=1).to(torch.int32)
        if self.sinks is None:
            return
        source = new - old + torch.arange(sinks, device=self.device)
        for buffer in self.sinks:
            moved = padding.take(buffer, source.clamp(min=0))
            buffer[:, :, :sinks] = moved.masked_fill((source < 0)[:, None, :, None], 0)

    def select(self, rows: list[int]) -> None:
        """Make row i the former row `rows[i]`; rows may repeat, and then share their pages."""
        if not rows or min(rows) < -self.batch or max(rows) >= self.batch:
            raise IndexError(f"rows {rows} of a cache with {self.batch}: allowed are 0..{self.batch - 1}, one or more")
        self.epoch += 1
        wanted = torch.tensor(rows, device=self.device) % self.batch
        with normal_mode():
            self._each(lambda x: x.index_select(0, wanted))
        self.table.select(wanted.tolist())
        self.batch = len(rows)
        self.expected = (self.batch, *self.expected[1:])

    def to(self, device: torch.device) -> None:
        """Move everything to a device, where the layer then works."""
        self.settle()
        self.epoch += 1
        with normal_mode():
            self._each(lambda x: x.to(device))
            self.table.to(device)
            self.unread = None if self.unread is None else self.unread.to(device)
        self.away = False
        if self.is_initialized:
            self.device = device

    # Offloading: the pages of a layer wait in host memory while others are at work. Sinks and window stay.

    def offload(self) -> None:
        """Put the packed pages into host memory. Nothing, where the layer works in it."""
        transfer = offload.transfer(self.device) if self.is_initialized else None
        if transfer is not None and self.table.tiles and not self.table.evicted:
            self.settle()
            self.epoch += 1
            with normal_mode():
                self.table.evict(transfer.store)
            self.away = True

    def prefetch(self) -> None:
        """Start to bring the packed pages back to the device; on CUDA, beside what runs there."""
        if self.table.evicted:
            transfer = offload.transfer(self.device)
            assert transfer is not None
            with transfer.ahead(), normal_mode():
                self.table.fetch(transfer.load)

    def bring(self) -> None:
        """Have the pages on the device."""
        self.prefetch()
        transfer = offload.transfer(self.device)
        assert transfer is not None
        transfer.ready()
        self.away = False

    def settle(self) -> None:
        """Wait for pages that are on their way."""
        if self.away and not self.table.evicted:
            self.bring()

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor that is not in the table."""
        for name in ("sinks", "window", "pending"):
            pair = getattr(self, name)
            if pair is not None:
                setattr(self, name, (change(pair[KEY]), change(pair[VALUE])))
        for name in ("rows", "pads"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))


def _write(buffers: Pair, tokens: Pair, begin: int) -> None:
    """Copy tokens into buffers, from token `begin` on."""
    keys, values = tokens
    if torch.compiler.is_compiling() or keys.dtype not in _COPIED:
        for buffer, new in zip(buffers, tokens, strict=True):
            buffer.narrow(2, begin, new.shape[2]).copy_(new)
    else:
        ops.append(*buffers, keys, values, begin)
