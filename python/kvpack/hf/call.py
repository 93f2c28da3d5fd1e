"""What one `update` attends to: the layer as it stood before the call, and the call's own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpack import ops

from . import padding, page_ops

if TYPE_CHECKING:
    from .layer import PackedLayer

KEY, VALUE = 0, 1
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Call:
    """A snapshot that both handles of an `update` share.

    It stays true while the layer appends: packed slots are written once, and the window buffer only beyond
    the tokens seen here. Crop, reorder, select, repeat and reset change what is stored; they raise the
    layer's epoch, and an older snapshot then refuses to answer.

    exact: keys and values [B, Hkv, E, d] of the window (before the call) and of the call's own tokens. With
    `whole`, they are all there is: the very tensors that the stock cache would return. `buffers` begin with them, and
    may have room for more.
    """

    __slots__ = (
        "_exact",
        "buffers",
        "count",
        "epoch",
        "fresh",
        "layer",
        "length",
        "packed",
        "rows",
        "sinks",
        "tiles",
        "told",
        "whole",
    )

    def __init__(
        self,
        layer: PackedLayer,
        buffers: tuple[Tensor, Tensor],
        tiles: int | None = None,
        packed: int = 0,
        count: int | None = None,
    ) -> None:
        """tiles, packed: tiles of the table to read and their tokens; None: there is nothing but the exact tokens.
        count: of exact tokens, with which `buffers` begin; None: all of them.
        """
        self.layer = layer
        self.epoch = layer.epoch
        self.buffers = buffers
        self.count = buffers[KEY].shape[2] if count is None else count
        self._exact: tuple[Tensor, Tensor] | None = buffers if count is None else None
        self.whole = tiles is None
        self.tiles = 0 if tiles is None else tiles
        self.packed = packed
        self.told = False  # whether a fallback was counted
        self.rows = layer.rows
        self.length = layer.length
        self.fresh = layer.fresh  # tiles packed by this call, after the `tiles`; for graphs
        self.sinks: tuple[Tensor, Tensor] | None = None
        if layer.sinks is not None and not self.whole:
            keys, values = layer.sinks
            if layer.sink_count < layer.sinks_wanted:
                keys, values = keys[:, :, : layer.sink_count], values[:, :, : layer.sink_count]
            self.sinks = (keys, values)

    def check(self, is_causal: bool = False, count: int = 0) -> None:
        """RuntimeError if the layer changed what this call refers to, or for a causal mask of `count` queries that
        is not this cache's.
        """
        if not torch.compiler.is_compiling() and self.layer.epoch != self.epoch:
            raise RuntimeError(
                f"keys and values of layer {self.layer.index} were used after the cache was cropped, "
                "reordered, selected, repeated, reset or offloaded; take them from a new update() instead"
            )
        if is_causal and count != self.length:
            raise RuntimeError(
                f"layer {self.layer.index}: is_causal=True with {count} queries and {self.length} keys: torch "
                "aligns that mask to the first key, which hides most of the cache; pass an explicit mask"
            )

    @property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, E, d]."""
        if self._exact is None:
            keys, values = self.buffers
            self._exact = (keys[:, :, : self.count], values[:, :, : self.count])
        return self._exact

    def dense(self, side: int, reason: str = "") -> Tensor:
        """Keys (0) or values (1) as the stock cache would return them, [B, Hkv, S, d], decoded.

        reason: what needs them, for `Cache.stats()`; a call is counted once, and in graphs for its keys.
        """
        if reason and not torch.compiler.is_compiling() and not self.told and not self.whole:
            self.told = True
            self.layer.count_fallback(self.packed, reason)
        self.check()
        exact = self.exact[side]
        if self.whole:
            return exact
        stream = exact
        if self.packed:
            decoded = self._decode(side, exact.dtype, reason if side == KEY else "")
            stream = torch.cat((decoded, exact), dim=2)
        if self.sinks is None:
            return stream
        return padding.in_order(self.sinks[side], stream, self.rows)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Addresses, and counts of all tiles.

        Asked for at every use: growth and copy-on-write replace tensors and pages, and keep their content.
        """
        table = self.layer.table
        assert table.addresses is not None
        assert table.counts is not None
        return table.addresses, table.counts

    def _used(self) -> Tensor:
        used = self.layer.table.used
        assert used is not None
        return used

    def _decode(self, side: int, dtype: torch.dtype, reason: str) -> Tensor:
        addresses, counts = self._tables()
        layout = self.layer.layout
        fast = dtype if dtype in _FUSED_DTYPES else torch.float32
        if torch.compiler.is_compiling():
            args = (addresses, counts, self._used(), self.fresh, side, layout, fast, self.packed)
            decoded: Tensor = page_ops.decode_tiles(*args, self.layer.writer, reason)
        else:
            decoded = ops.decode_pages(addresses, self.layer.table.first(self.tiles), side, layout, fast)
        return decoded.to(dtype)

    def obstacle(
        self, query: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, logits: Tensor | None = None
    ) -> str | None:
        """Why a query cannot take the fused path, or None if it can."""
        if dropout > 0.0:
            return "dropout"
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, mask, logits)):
            return "gradients"
        dtype = query.dtype
        if dtype != self.layer.dtype or dtype not in _FUSED_DTYPES:
            return f"query of {dtype}"
        if query.dim() != 4 or query.shape[0] != self.layer.batch:
            return "query of another batch size"
        return "is_causal" if is_causal else None

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        scale: float | None,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Fused attention of query [B, H, q, dk] over everything; result [B, H, q, dv].

        H is a multiple of the KV heads. Transformers also passes one token of grouped query heads as
        [B, Hkv, heads of a group, dk]. Where all rows of a head see the same positions, rows and grouped heads are
        the same thing, and the second form lets the kernel decode a packed token once for all of them.
        softcap, sink_logits: as of `ops.attend`; the logits are those of H heads.
        """
        layer = self.layer
        batch, heads, count, dim = query.shape
        if mask is not None:
            mask = padding.four_dims(mask)
            if mask.shape[3] != self.length:
                raise ValueError(
                    f"layer {layer.index}: the attention mask has {mask.shape[3]} columns, "
                    f"but the cache holds {self.length} positions"
                )
        alike = mask is None or mask.shape[2] == 1
        fold = count > 1 and heads == layer.layout[4] and alike and sink_logits is None
        if fold:
            query = query.reshape(batch, heads * count, 1, dim)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.expand(-1, heads, count, -1).reshape(mask.shape[0], heads * count, 1, -1)
        sink_keys, sink_values = (None, None) if self.sinks is None else self.sinks
        addresses, counts = self._tables()
        scale = dim**-0.5 if scale is None else scale
        if torch.compiler.is_compiling():
            keys, values = self.exact if self.count else (None, None)
            out: Tensor = page_ops.attend_tiles(
                query,
                addresses,
                counts,
                self._used(),
                self.fresh,
                sink_keys,
                sink_values,
                keys,
                values,
                self.rows,
                mask,
                sink_logits,
                layer.layout,
                scale,
                softcap,
                layer.precision,
                layer.sparse_values,
                layer.writer,
            )
        else:
            layer.count_fused(self.packed)
            out = ops.attend(
                query,
                addresses,
                layer.table.first(self.tiles),
                sink_keys,
                sink_values,
                *self.buffers,
                self.rows,
                mask,
                sink_logits,
                layer.layout,
                scale,
                softcap,
                precision=layer.precision,
                sparse_values=layer.sparse_values,
                unread=layer.unread,
                exact=self.count,
            )
        return out.reshape(batch, heads, count, -1) if fold else out

    def padding_mask(self) -> Tensor | None:
        """[B, 1, 1, S], True for real positions, where the padding of the rows is known."""
        if self.rows is None:
            return None
        position = torch.arange(self.length, device=self.rows.device)
        return (position >= self.rows[:, :1])[:, None, None, :]
