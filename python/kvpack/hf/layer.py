"""PackedLayer: the cache of one full-attention layer, packed.

    one row:   [sinks][ packed tiles ........ ][ window ][ the call's own tokens ]
               side    pages, 64 tokens per     buffer    exact during the call
               buffer  tile, never rewritten

A call attends to sinks, tiles and window as they stood before it, and to its own tokens exact. After it, whole
tiles leave the exact tokens for as long as these number at least `window + 64`.

Until padding is known, the first call of several rows is *pending*: its tokens wait, dense, for the attention
mask (`saw_mask`), and are then placed: sinks, tiles, window.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpack.ops import TILE
from kvpack.spec import CodecSpec

from . import checks, padding, page_ops
from .call import KEY, VALUE, Call
from .handle import Handle
from .pages import PageTable, normal_mode
from .stats import Counters

Pair = tuple[Tensor, Tensor]
_NAMES = ("key", "value")


class PackedLayer(CacheLayerMixin):
    """Keys and values of one layer: sinks and window exact, everything between them packed.

    Args:
        key, value: codecs.
        window: tokens kept exact at the end, at least.
        sinks: first real tokens kept exact.
        fused: return handles (True) or dense tensors (False) once there is a history.
        precision: of the fused path, 0 default or 1 high.
        index: of the layer in the model, for messages.
        query_heads: query heads of the model, if known; lets grouped heads share the decoding of a token.
        guards_prompt: look for prompts that arrive twice (one layer of a cache does).
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        key: CodecSpec,
        value: CodecSpec,
        *,
        window: int = 128,
        sinks: int = 4,
        fused: bool = True,
        precision: int = 0,
        index: int = 0,
        query_heads: int | None = None,
        guards_prompt: bool = False,
    ) -> None:
        self.specs = (key, value)
        self.codes = checks.codes(self.specs)
        self.window_size = window
        self.sinks_wanted = sinks
        self.fused = fused
        self.precision = precision
        self.index = index
        self.query_heads = query_heads
        self.guards_prompt = guards_prompt
        self.table = PageTable()
        self.epoch = 0
        self.writer = page_ops.enrol(self)
        self.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.writer = page_ops.enrol(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        import copy

        other = type(self).__new__(type(self))
        memo[id(self)] = other
        with normal_mode():
            other.__setstate__({name: copy.deepcopy(x, memo) for name, x in self.__dict__.items()})
        return other

    def __repr__(self) -> str:
        key, value = self.specs
        return f"PackedLayer({self.index}, {key}/{value}, {self.length} tokens, {self.table.tokens} packed)"

    # State.

    def reset(self) -> None:
        """Empty the layer; forgets padding and counters too."""
        self.counters = Counters()
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
        self.pending: Pair | None = None
        self.placed = 0  # length when pending tokens were placed
        self.heard = False  # whether the mask of the pending call was seen
        self.last_count = 0
        self.pads: Tensor | None = None  # int64 [B]; None: no padding, as far as is known
        self.pad_max = 0
        self.padding_known = False
        self.rows: Tensor | None = None  # int32 [B, 2], pad and sink_start

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.layout = checks.layout(self.index, self.codes, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, heads = key_states.shape[:2]
        self._expected = (self.batch, heads, key_states.shape[3], value_states.shape[3], self.dtype)
        self.n_rep = 1 if self.query_heads is None else self.query_heads // heads
        if self.pads is not None and self.pads.shape[0] != self.batch:
            raise ValueError(
                f"layer {self.index}: the padding mask has {self.pads.shape[0]} rows, the keys have {self.batch}"
            )
        self.table.start(self.layout, self.batch, self.device)
        self.is_initialized = True

    def set_padding(self, pads: Tensor) -> None:
        """Tell the padded positions per row, int64 [B], before they are placed; later, warn and count."""
        if self.is_initialized and pads.shape[0] != self.batch:
            raise ValueError(f"the padding mask has {pads.shape[0]} rows, the cache has {self.batch}")
        if self.length and self.pending is None:
            if not self.padding_known:
                self._late(pads.to(self.device))
            return
        self.pads = pads if bool(pads.any()) else None
        self.pad_max = int(pads.max())
        self.padding_known = True
        if self.pending is not None:
            self._place_if_ready()

    # Updating.

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values [B, Hkv, tokens, d], and return what attention is to read.

        Returns dense tensors for the first call of one row (they are the arguments) and with `fused=False` or
        gradients; handles [B, Hkv, length, d] otherwise. After an error the layer is as it was.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self._unexpected(key_states, value_states):
            raise checks.change(self.index, key_states, value_states, self._expected)
        count = key_states.shape[2]
        if self.pending is not None and not (self.padding_known or self.heard):
            self._place()  # nobody looked at the mask of the last call, or it has no padding
        if count == 0:
            return self._state(key_states, value_states)
        if 1 < count == self.length + 1 and self.guards_prompt and not torch.compiler.is_compiling():
            self._check_repeated(key_states)

        tracked = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        own = (key_states.detach(), value_states.detach()) if tracked else (key_states, value_states)
        if self.length == 0 or self.pending is not None:
            call = self._update_whole(own, count, tracked)
        else:
            call = self._update_packed(own, count)
        if self.fused and not tracked:
            if self.batch == 1 and call.length == count:
                return key_states, value_states
            return self._handles(call)
        if call.length == count:
            return key_states, value_states
        self.count_fallback(call, "gradients" if tracked else "fused=False")
        dense = (call.dense(KEY), call.dense(VALUE))
        if tracked:
            _warn_gradients()
            past = call.length - count
            pairs = zip(dense, (key_states, value_states), strict=True)
            keys, values = (torch.cat((old[:, :, :past], new), dim=2) for old, new in pairs)
            return keys, values
        return dense

    def _unexpected(self, keys: Tensor, values: Tensor) -> bool:
        if keys.dim() != 4 or values.dim() != 4:
            return True
        b, h, n, dk = keys.shape
        return (b, h, dk, values.shape[3], keys.dtype) != self._expected or (b, h, n, values.dtype) != (
            *values.shape[:3],
            keys.dtype,
        )

    def _handles(self, call: Call) -> tuple[Handle, Handle]:
        batch, heads, key_dim, value_dim, _ = self._expected
        return (
            Handle(call, KEY, torch.Size((batch, heads, call.length, key_dim))),
            Handle(call, VALUE, torch.Size((batch, heads, call.length, value_dim))),
        )

    def _state(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        """What an update with no tokens returns: the layer as it is."""
        if self.length == 0:
            return key_states, value_states
        call = self._snapshot()
        return self._handles(call) if self.fused else (call.dense(KEY), call.dense(VALUE))

    def _snapshot(self) -> Call:
        if self.pending is not None:
            return Call(self, self.pending, True, self.length, 0)
        assert self.window is not None
        n = self.window_count
        exact = (self.window[KEY][:, :, :n], self.window[VALUE][:, :, :n])
        return Call(self, exact, False, self.length, self.sink_count)

    def _update_whole(self, own: Pair, count: int, tracked: bool) -> Call:
        """A call before anything is placed: the first, and those that find only padding before them."""
        before = (self.pending, self.length, self.heard, self.last_count)
        if self.pending is not None:
            own = (torch.cat((self.pending[KEY], own[KEY]), 2), torch.cat((self.pending[VALUE], own[VALUE]), 2))
        self.pending, self.length, self.heard, self.last_count = own, self.length + count, False, count
        call = Call(self, own, True, self.length, 0)
        try:
            if self.padding_known:
                self._place_if_ready()
            elif self.batch == 1 or tracked or not self.fused:
                self._place()
        except Exception:
            self.pending, self.length, self.heard, self.last_count = before
            raise
        return call

    def _update_packed(self, own: Pair, count: int) -> Call:
        """A call with sinks and window in place."""
        assert self.window is not None
        sink_count = self.sink_count
        if sink_count < self.sinks_wanted:  # so far, there are fewer tokens than sinks
            assert self.sinks is not None
            taken = min(self.sinks_wanted - sink_count, count)
            for buffer, new in zip(self.sinks, own, strict=True):
                buffer[:, :, sink_count : sink_count + taken] = new[:, :, :taken]
            sink_count += taken
            own = (own[KEY][:, :, taken:], own[VALUE][:, :, taken:])
        begin = self.window_count
        end = begin + own[KEY].shape[2]
        keys, values = self.window
        if end <= self.window_size + TILE:
            keys.narrow(2, begin, end - begin).copy_(own[KEY])
            values.narrow(2, begin, end - begin).copy_(own[VALUE])
            exact = (keys[:, :, :end], values[:, :, :end])
        else:
            exact = (
                torch.cat((keys[:, :, :begin], own[KEY]), dim=2),
                torch.cat((values[:, :, :begin], own[VALUE]), dim=2),
            )
        length = self.length + count
        call = Call(self, exact, False, length, sink_count)
        if end >= self.window_size + TILE:
            call.fresh = (end - self.window_size) // TILE
            end = self._pack(exact, end)
        self.window_count, self.sink_count, self.length = end, sink_count, length
        return call

    def _place_if_ready(self) -> None:
        """Place pending tokens, unless a row still has no real token; a decoding step does not wait for one."""
        if self.pad_max < self.length or self.last_count == 1:
            self._place()

    def _place(self) -> None:
        """Turn pending tokens into sinks, packed tiles and window."""
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
        if self.sinks_wanted:
            self.sinks = self._buffers(sinks, self.sinks_wanted)
        self.sink_count = count
        end = length - count
        if end >= self.window_size + TILE:
            end = self._pack(stream, end)
        else:
            self.window = self._buffers(stream, self.window_size + TILE)
        self.window_count = end
        self.placed = length
        self.pending = None

    def _buffers(self, content: Pair, capacity: int) -> Pair:
        """New buffers of `capacity` tokens that begin with the content."""
        out = []
        for tokens in content:
            b, h, n, d = tokens.shape
            with normal_mode():
                buffer = torch.empty((b, h, capacity, d), dtype=tokens.dtype, device=tokens.device)
            buffer[:, :, :n] = tokens
            out.append(buffer)
        return out[KEY], out[VALUE]

    def _pack(self, exact: Pair, count: int) -> int:
        """Pack whole tiles from the head of `count` exact tokens; the rest starts a new window.

        The window gets new buffers, because the handles of this call still read the old ones. Returns the
        number of tokens in it.
        """
        tiles = (count - self.window_size) // TILE
        stop = tiles * TILE
        keys, values = exact[KEY][:, :, :stop], exact[VALUE][:, :, :stop]
        if self.pads is not None and self.pad_max > self.placed:  # padding went on after placing
            first_token = self.table.tokens
            places = padding.stream_positions(self.rows, self.sinks_wanted, first_token, stop, self.device)
            keys = padding.zero_padded(keys, places, self.pads)
            values = padding.zero_padded(values, places, self.pads)
        addresses, used = self.table.addresses, self.table.used
        assert addresses is not None and used is not None
        if torch.compiler.is_compiling():
            page_ops.write_tiles(addresses, used, keys, values, self.writer)
        else:
            self.write_tiles(addresses, used, keys, values)
        rest = (exact[KEY][:, :, stop:count], exact[VALUE][:, :, stop:count])
        self.window = self._buffers(rest, self.window_size + TILE)
        return count - stop

    def write_tiles(self, addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor) -> None:
        """Encode tiles into pages; called eagerly, or by `kvpack::write_tiles` from a compiled graph.

        ValueError, naming layer, side and position, for values that are not finite or whose scale overflows.
        """
        sides = [keys.float(), values.float()] if keys.dtype == torch.float64 else [keys, values]
        if checks.replace_nonfinite():
            for side, spec in enumerate(self.specs):
                if spec.name == "exact":
                    continue
                bad = int((~torch.isfinite(sides[side])).sum())
                if bad:
                    self.counters.nonfinite_replaced += bad
                    sides[side] = torch.nan_to_num(sides[side], nan=0.0, posinf=0.0, neginf=0.0)
        try:
            self.table.write(addresses, used, sides[KEY], sides[VALUE])
        except (ValueError, RuntimeError) as error:
            raise ValueError(self._explain(error, sides)) from error

    def _explain(self, error: Exception, sides: list[Tensor]) -> str:
        for side, spec in enumerate(self.specs):
            found = None if spec.name == "exact" else checks.first_nonfinite(sides[side])
            if found is not None:
                row, head, token, value = found
                sinks, first = self.sink_count or self.sinks_wanted, self.table.tokens
                place = padding.stream_positions(self.rows, sinks, first + token, 1, self.device)
                position = int(place[row if place.shape[0] > 1 else 0, 0])
                return (
                    f"layer {self.index}: {_NAMES[side]} of position {position} (row {row}, KV head {head}) holds "
                    f"{value}, which codec {spec} cannot pack; set KVPACK_NONFINITE=zero to replace such values "
                    "by 0 and count them in cache.stats()"
                )
        return f"layer {self.index}: {error}"

    def _check_repeated(self, keys: Tensor) -> None:
        """RuntimeError if the keys of the whole cache arrive again, one token longer: `use_cache=False`."""
        call = self._snapshot()
        stored, again = [], []
        if call.sinks is not None and self.rows is None:
            stored.append(call.sinks[KEY])
            again.append(keys[:, :, : self.sink_count])
        exact = call.exact[KEY]
        recent = min(exact.shape[2], max(0, self.length - self.pad_max - self.sinks_wanted))
        if call.whole:
            recent = exact.shape[2]
        stored.append(exact[:, :, exact.shape[2] - recent :])
        again.append(keys[:, :, self.length - recent : self.length])
        old, new = torch.cat(stored, dim=2), torch.cat(again, dim=2)
        if old.shape[2] and checks.repeated(old, new):
            raise RuntimeError(f"layer {self.index}: {checks.REPEATED}")

    # What handles tell.

    def saw_mask(self, mask: Tensor | None) -> None:
        """The mask of the pending call: learn the padding from it, and place the tokens."""
        if self.pending is None or self.padding_known:
            return
        self.heard = True
        self.pads = None if mask is None else padding.from_attention(mask, self.batch)
        if torch.compiler.is_compiling():
            self.pad_max = 0 if self.pads is None else self.length  # at most; values cannot be looked at
            self.padding_known = True
            self._place()
            return
        self.pad_max = 0 if self.pads is None else int(self.pads.max())
        # A row of nothing but padding may have more of it in the next chunk.
        self.padding_known = self.pad_max < self.length or self.last_count == 1
        if self.padding_known:
            self._place()

    def nothing_to_learn(self) -> None:
        """The pending call is read by something other than attention with a mask: place its tokens."""
        if self.pending is not None and not (self.padding_known or self.heard):
            self._place()

    def check_mask(self, mask: Tensor | None, count: int) -> None:
        """What the mask of a call with history tells: a repeated prompt, or (once) padding nobody told of."""
        if mask is None or torch.compiler.is_compiling():
            return
        past = self.length - count
        if 1 < count == past + 1 and self.guards_prompt and mask.shape[-1] == self.length:
            # generate(use_cache=False) masks what it believes not to be there: all but one of the new tokens.
            if not bool(padding.visible(mask)[..., -1, past + 1 :].any()):
                raise RuntimeError(f"layer {self.index}: {checks.REPEATED}")
        if self.padding_known:
            return
        self.padding_known = True
        pads = padding.from_attention(mask, self.batch)
        if pads is not None:
            self._late(pads)

    def _late(self, pads: Tensor) -> None:
        late = int(pads.sum()) if self.pads is None else int((pads - self.pads).clamp(min=0).sum())
        if late:
            self.counters.late_padding += late
            warnings.warn(
                "kvpack: left padding became known only after its tokens were packed or made sinks. It stays "
                "masked, but costs quality; pass attention_mask= to kvpack.Cache, or call cache.set_padding(mask) "
                "before the prompt",
                stacklevel=2,
            )

    def count_fused(self, call: Call) -> None:
        if not torch.compiler.is_compiling():
            self.counters.fused_calls += 1
            self.counters.packed_tokens_read += call.packed

    def count_fallback(self, call: Call, reason: str) -> None:
        """Count a call once that decodes; one with nothing packed and nothing to decode is not counted."""
        if not torch.compiler.is_compiling() and not call.told and not call.whole:
            call.told = True
            counts = self.counters.fallback_calls
            counts[reason] = counts.get(reason, 0) + 1
            self.counters.packed_tokens_read += call.packed

    # The rest of the stock interface.

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys [B, Hkv, length, d], decoded; None while the layer is empty. For direct readers."""
        return self._snapshot().dense(KEY) if self.length else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values [B, Hkv, length, d], decoded; None while the layer is empty."""
        return self._snapshot().dense(VALUE) if self.length else None

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (all of them, if there are fewer)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): allowed is a negative number, how many tokens to remove from the end"
            )
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
        if self.rows is not None and self.sinks is not None:
            self._crop_rows(left, sinks)
        stream = left - sinks
        self.sink_count = sinks
        self.window_count = max(0, stream - self.table.tokens)
        self.table.crop(stream)

    def _crop_rows(self, left: int, sinks: int) -> None:
        """Move sinks that would lie beyond the end: in such a row, only padding lies before them."""
        assert self.rows is not None and self.sinks is not None and self.pads is not None
        self.pads = self.pads.clamp(max=left)
        self.pad_max = min(self.pad_max, left)
        old = self.rows[:, 1:].to(torch.int64)
        new = old.clamp(max=left - sinks)
        self.rows = torch.cat((self.pads[:, None], new), dim=1).to(torch.int32)
        source = new - old + torch.arange(sinks, device=self.device)
        for buffer in self.sinks:
            moved = padding.take(buffer, source.clamp(min=0))
            buffer[:, :, :sinks] = moved.masked_fill((source < 0)[:, None, :, None], 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i the former row `beam_idx[i]`."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        if self.is_initialized:
            self._select(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (whole numbers, or a boolean mask)."""
        if self.is_initialized:
            self._select(torch.arange(self.batch)[indices.cpu() if isinstance(indices, Tensor) else indices])

    def _select(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = index.tolist()
        if not rows or min(rows) < -self.batch or max(rows) >= self.batch:
            raise IndexError(f"rows {rows} of a cache with {self.batch}: allowed are 0..{self.batch - 1}, one or more")
        self.epoch += 1
        wanted = torch.tensor(rows, device=self.device) % self.batch
        with normal_mode():
            self._each(lambda x: x.index_select(0, wanted))
        self.table.select(wanted.tolist())
        self.batch = len(rows)
        self._expected = (self.batch, *self._expected[1:])

    def _each(self, change: Any) -> None:
        """Apply a function to every tensor of the layer that is not in the table."""
        for name in ("sinks", "window", "pending"):
            pair = getattr(self, name)
            if pair is not None:
                setattr(self, name, (change(pair[KEY]), change(pair[VALUE])))
        for name in ("rows", "pads"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def _move(self, device: torch.device) -> None:
        self.epoch += 1
        with normal_mode():
            self._each(lambda x: x.to(device))
        self.table.to(device)

    def offload(self) -> None:
        """Move everything to the CPU."""
        if self.is_initialized and self.device.type != "cpu":
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized and self.device.type != "cpu":
            self._move(self.device)


def _warn_gradients() -> None:
    warnings.warn(
        "kvpack: gradients are enabled, so attention reads decoded keys and values; use torch.no_grad() (or "
        "torch.inference_mode()) for the fused path",
        stacklevel=3,
    )
