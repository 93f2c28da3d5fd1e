"""Operators with which a compiled graph packs and reads: what torch.compile cannot trace, made opaque.

Packing allocates pages and follows their addresses, and the number of packed tiles grows as the graph runs
again and again; compiled in as a number, it would mean a new graph for each. In traced code a layer is
therefore a number in a tensor (`writer`), which eager code looks up in a registry of weak references, and the
tile count is a tensor too (`used`). The declared effects of packing, on addresses and tile count, keep the
order: a call packs before it reads, and leaves the `fresh` tiles of its own out.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpack import ops
from kvpack.ops import _library


class Writer(Protocol):
    """What packs, and counts, for one layer."""

    unread: Tensor | None

    def write_tiles(self, addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, layout: list[int]) -> None: ...

    def count_fused(self, packed: int) -> None: ...

    def count_fallback(self, packed: int, reason: str) -> None: ...


_NUMBERS = itertools.count(1)
_WRITERS: weakref.WeakValueDictionary[int, Writer] = weakref.WeakValueDictionary()


def enrol(writer: Writer) -> Tensor:
    """int64 [1]: the number under which compiled graphs find this writer for as long as it lives."""
    number = next(_NUMBERS)
    _WRITERS[number] = writer
    return torch.tensor([number])


def _find(writer: Tensor) -> Writer:
    found = _WRITERS.get(int(writer))
    if found is None:
        raise RuntimeError(f"the cache layer with number {int(writer)} no longer exists")
    return found


def _write_fake(
    addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, writer: Tensor, layout: Sequence[int]
) -> None:
    return None


def _write(
    addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, writer: Tensor, layout: Sequence[int]
) -> None:
    _find(writer).write_tiles(addresses, used, keys, values, list(layout))


def _decode_fake(
    addresses: Tensor,
    counts: Tensor,
    used: Tensor,
    fresh: int,
    side: int,
    layout: Sequence[int],
    dtype: torch.dtype,
    tokens: int,
    writer: Tensor,
    reason: str,
) -> Tensor:
    shape = (addresses.shape[0], layout[4], tokens, layout[2 * side + 1])
    return addresses.new_empty(shape, dtype=dtype)


def _decode(
    addresses: Tensor,
    counts: Tensor,
    used: Tensor,
    fresh: int,
    side: int,
    layout: Sequence[int],
    dtype: torch.dtype,
    tokens: int,
    writer: Tensor,
    reason: str,
) -> Tensor:
    in_use = counts[: int(used) - fresh]
    if reason:
        _find(writer).count_fallback(int(in_use.sum()), reason)
    return ops.decode_pages(addresses, in_use, side, layout, dtype)


def _attend_fake(
    query: Tensor,
    addresses: Tensor,
    counts: Tensor,
    used: Tensor,
    fresh: int,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    rows: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    layout: Sequence[int],
    scale: float,
    softcap: float,
    precision: int,
    sparse_values: float,
    writer: Tensor,
) -> Tensor:
    return query.new_empty((*query.shape[:3], layout[3]))


def _attend(
    query: Tensor,
    addresses: Tensor,
    counts: Tensor,
    used: Tensor,
    fresh: int,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    rows: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    layout: Sequence[int],
    scale: float,
    softcap: float,
    precision: int,
    sparse_values: float,
    writer: Tensor,
) -> Tensor:
    in_use = counts[: int(used) - fresh]
    layer = _find(writer)
    layer.count_fused(int(in_use.sum()))
    return ops.attend(
        query,
        addresses,
        in_use,
        sink_keys,
        sink_values,
        keys,
        values,
        rows,
        mask,
        sink_logits,
        layout,
        scale,
        softcap,
        precision=precision,
        sparse_values=sparse_values,
        unread=layer.unread,
    )


write_tiles = _library.register(
    "write_tiles(Tensor(a!) addresses, Tensor(b!) used, Tensor keys, Tensor values, Tensor writer, int[] layout) -> ()",
    _write_fake,
    _write,
)
"""Encode keys and values [B, kv_heads, 64 * n, d] as the next tiles of a layer."""

decode_tiles = _library.register(
    "decode_tiles(Tensor addresses, Tensor counts, Tensor used, SymInt fresh, int side, int[] layout, "
    "ScalarType dtype, SymInt tokens, Tensor writer, str reason) -> Tensor",
    _decode_fake,
    _decode,
)
"""`ops.decode_pages` of the tiles in use but for the last `fresh`; they hold `tokens` tokens. A `reason` is counted."""

attend_tiles = _library.register(
    "attend_tiles(Tensor query, Tensor addresses, Tensor counts, Tensor used, SymInt fresh, "
    "Tensor? sink_keys, Tensor? sink_values, Tensor? keys, Tensor? values, Tensor? rows, Tensor? mask, "
    "Tensor? sink_logits, int[] layout, float scale, float softcap, int precision, float sparse_values, "
    "Tensor writer) -> Tensor",
    _attend_fake,
    _attend,
)
"""`ops.attend` over the tiles in use but for the last `fresh`; counts the call."""
