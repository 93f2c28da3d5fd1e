"""PackedLayer: the cache of one full-attention layer, packed.

A call attends to sinks, tiles and window as they stood before it, and to its own tokens exact. Packing
happens in `update`, eagerly; what the call reads is the snapshot that its handles share (`Call`).

Until padding is known, the first call of several rows is pending: its tokens wait, dense, for the mask of its
attention (`saw_mask`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpack.spec import CodecSpec

from . import checks, padding
from .call import Call
from .handle import Handle
from .stats import Counters, LayerStats
from .store import KEY, VALUE, Pair, Store


class PackedLayer(Store, CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: sinks and window exact, everything between them packed.

    Args:
        key, value: codecs.
        window: tokens kept exact at the end, at least.
        sinks: first real tokens kept exact.
        fused: return handles (True) or dense tensors (False) once there is a history.
        precision: of the fused path, 0 default or 1 high.
        sparse_values: of the fused path, share of a query's probability whose values may stay unread.
        index: of the layer in the model, for messages.
        guards_prompt: look for prompts that arrive twice (one layer of a cache does).
        warned: reasons to decode that were warned of; the layers of a cache share it.
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
        sparse_values: float = 0.0,
        index: int = 0,
        guards_prompt: bool = False,
        warned: set[str] | None = None,
    ) -> None:
        self.fused = fused
        self.precision = precision
        self.sparse_values = sparse_values
        # Counts of tiles by the fused path: met, values unread.
        self.unread = torch.zeros(2, dtype=torch.int64) if sparse_values else None
        self.guards_prompt = guards_prompt
        self.warned = set() if warned is None else warned
        super().__init__(key, value, window, sinks, index)

    def __repr__(self) -> str:
        key, value = self.specs
        return f"PackedLayer({self.index}, {key}/{value}, {self.length} tokens, {self.table.tokens} packed)"

    def _clear(self) -> None:
        super()._clear()
        self.padding_known = False
        self.told_rows: int | None = None  # rows of the padding mask that the user gave
        self.heard = False  # whether the mask of the pending call was seen
        self.last_count = 0

    def reset(self) -> None:
        """Empty the layer; forgets padding and counters too."""
        self.counters = Counters()
        if self.unread is not None:
            self.unread.zero_()
        self._clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.told_rows is not None:
            checks.same_rows(self.told_rows, key_states.shape[0])
        self.begin(key_states, value_states)

    # Updating.

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values [B, Hkv, tokens, d], and return what attention is to read.

        Returns the arguments for the first call of one row, dense tensors with `fused=False` (but for the first calls
        of several rows) or gradients, and handles [B, Hkv, length, d] otherwise. After an error the layer is as it was.
        """
        if self.away:
            self.bring()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self._unexpected(key_states, value_states):
            raise checks.change(self.index, key_states, value_states, self.expected)
        count = key_states.shape[2]
        if self.pending is not None and not (self.padding_known or self.heard):
            self.place()  # nobody looked at the mask of the last call
        if count == 0:
            return self._state(key_states, value_states)
        if 1 < count == self.length + 1 and self.guards_prompt and not torch.compiler.is_compiling():
            checks.repeated_prompt(self.index)

        tracked = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        own = (key_states.detach(), value_states.detach()) if tracked else (key_states, value_states)
        if self.length == 0 or self.pending is not None:
            call = self._update_pending(own, count, tracked)
        else:
            tiles, packed = self.table.tiles, self.table.tokens
            exact, number = self.append(own, count)
            call = Call(self, exact, tiles, packed, number)
        first = call.length == count
        # A pending call needs handles even where everything is to be dense: they see the mask.
        if not tracked and (self.fused or self.pending is not None):
            return (key_states, value_states) if first and self.batch == 1 else self._handles(call)
        if first:
            return key_states, value_states
        reason = "gradients" if tracked else "fused=False"
        dense = (call.dense(KEY, reason), call.dense(VALUE, reason))
        if tracked:
            past = call.length - count
            keys = torch.cat((dense[KEY][:, :, :past], key_states), dim=2)
            return keys, torch.cat((dense[VALUE][:, :, :past], value_states), dim=2)
        return dense

    def _unexpected(self, keys: Tensor, values: Tensor) -> bool:
        batch, heads, key_dim, value_dim, dtype = self.expected
        if keys.dim() != 4 or keys.dtype != dtype or values.dtype != dtype:
            return True
        shape = keys.shape
        count = shape[2]
        return shape != (batch, heads, count, key_dim) or values.shape != (batch, heads, count, value_dim)

    def _update_pending(self, own: Pair, count: int, tracked: bool) -> Call:
        """A call before anything is placed: the first, and those that find only padding before them."""
        before = (self.pending, self.length, self.heard, self.last_count)
        self.heard, self.last_count = False, count
        call = Call(self, self.append_pending(own, count))
        try:
            if self.padding_known:
                self._place_if_ready()
            elif self.batch == 1 or tracked:
                self.place()
        except Exception:
            self.pending, self.length, self.heard, self.last_count = before
            raise
        return call

    def _place_if_ready(self) -> None:
        """Place pending tokens, unless a row has no real token yet; a decoding step does not wait for one."""
        if self.pad_max < self.length or self.last_count == 1:
            self.place()

    def _handles(self, call: Call) -> tuple[Handle, Handle]:
        batch, heads, key_dim, value_dim, _ = self.expected
        keys = values = torch.Size((batch, heads, call.length, key_dim))
        if value_dim != key_dim:
            values = torch.Size((batch, heads, call.length, value_dim))
        return Handle(call, KEY, keys), Handle(call, VALUE, values)

    def _state(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        """What an update with no tokens returns: the layer as it is."""
        if self.length == 0:
            return key_states, value_states
        call = self._snapshot()
        return self._handles(call) if self.fused else (call.dense(KEY), call.dense(VALUE))

    def _snapshot(self) -> Call:
        if self.away:
            self.bring()
        if self.pending is not None:
            return Call(self, self.pending)
        assert self.window is not None
        n = self.window_count
        call = Call(self, self.window, self.table.tiles, self.table.tokens, n)
        call.fresh = 0  # this one reads all that is packed
        return call

    # Padding: told by the user, or by the masks that handles see.

    def set_padding(self, pads: Tensor) -> None:
        """Tell the padded positions per row, int64 [B], before they are placed; later, warn and count."""
        if self.is_initialized:
            checks.same_rows(pads.shape[0], self.batch)
        if self.length and self.pending is None:
            if not self.padding_known:
                self._late(pads)
            return
        self._learn(pads if bool(pads.any()) else None)
        self.padding_known, self.told_rows = True, pads.shape[0]
        if self.pending is not None:
            self._place_if_ready()

    def _learn(self, pads: Tensor | None) -> None:
        self.pads = pads
        if pads is None:
            self.pad_max = 0
        elif torch.compiler.is_compiling():  # values cannot be looked at
            self.pad_max = self.length
        else:
            self.pad_max = int(pads.max())

    def saw_mask(self, mask: Tensor | None) -> None:
        """The mask of the pending call: learn the padding from it, and place the tokens."""
        if self.pending is None or self.padding_known:
            return
        self.heard = True
        self._learn(None if mask is None else padding.from_attention(mask, self.batch))
        # A row of nothing but padding may have more of it in the next chunk.
        known = self.pad_max < self.length or self.last_count == 1 or torch.compiler.is_compiling()
        self.padding_known = known
        if known:
            self.place()

    def nothing_to_learn(self) -> None:
        """The pending call is read by something other than attention with a mask: place its tokens."""
        if self.pending is not None and not (self.padding_known or self.heard):
            self.place()

    def check_mask(self, mask: Tensor | None) -> None:
        """What the mask of a call with history tells: (once) padding nobody told of."""
        if mask is None or torch.compiler.is_compiling():
            return
        if self.padding_known:
            return
        self.padding_known = True
        pads = padding.from_attention(mask, self.batch)
        if pads is not None:
            self._late(pads.masked_fill(pads == self.length, 0))  # a row that sees nothing tells nothing

    def _late(self, pads: Tensor) -> None:
        late = int(pads.sum()) if self.pads is None else int((pads - self.pads).clamp(min=0).sum())
        if late:
            self.counters.late_padding += late
            warnings.warn(
                "kvpack: left padding became known only after its tokens were packed or made sinks. The "
                "model's mask still hides it, but it costs quality; pass attention_mask= to kvpack.Cache, or "
                "call cache.set_padding(mask) before the prompt",
                stacklevel=2,
            )

    def stats(self) -> LayerStats:
        """What happened since the layer was made or reset."""
        met, unread = (0, 0) if self.unread is None else self.unread.tolist()
        return LayerStats(
            layer=self.index,
            type="full_attention",
            packed=True,
            why="",
            key=str(self.specs[KEY]),
            value=str(self.specs[VALUE]),
            tokens_packed=self.table.tokens,
            packed_tokens_read=self.counters.packed_tokens_read,
            fused_calls=self.counters.fused_calls,
            fallback_calls=dict(self.counters.fallback_calls),
            nonfinite_replaced=self.counters.nonfinite_replaced,
            late_padding=self.counters.late_padding,
            value_tiles_met=met,
            value_tiles_unread=unread,
        )

    # The rest of the stock interface.

    @property
    def keys(self) -> Tensor | None:
        """All keys [B, Hkv, length, d], decoded; None while the layer is empty. For direct readers."""
        return self._snapshot().dense(KEY) if self.length else None

    @property
    def values(self) -> Tensor | None:
        """All values [B, Hkv, length, d], decoded; None while the layer is empty."""
        return self._snapshot().dense(VALUE) if self.length else None

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i the former row `beam_idx[i]`."""
        if self.is_initialized:
            self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        if self.is_initialized:
            self.select([row for row in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (whole numbers, or a boolean mask)."""
        if self.is_initialized:
            self.select(torch.arange(self.batch)[torch.as_tensor(indices).cpu()].tolist())
