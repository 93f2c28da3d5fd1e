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
    """What packs for one layer."""

    def write_tiles(self, addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, layout: list[int]) -> None: ...


_NUMBERS = itertools.count(1)
_WRITERS: weakref.WeakValueDictionary[int, Writer] = weakref.WeakValueDictionary()


def enrol(writer: Writer) -> Tensor:
    """int64 [1]: the number under which compiled graphs find this writer for as long as it lives."""
    number = next(_NUMBERS)
    _WRITERS[number] = writer
    return torch.tensor([number])


def _write_fake(
    addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, writer: Tensor, layout: Sequence[int]
) -> None:
    return None


def _write(
    addresses: Tensor, used: Tensor, keys: Tensor, values: Tensor, writer: Tensor, layout: Sequence[int]
) -> None:
    found = _WRITERS.get(int(writer))
    if found is None:
        raise RuntimeError(f"the cache layer with number {int(writer)} no longer exists")
    found.write_tiles(addresses, used, keys, values, list(layout))


def _decode_fake(
    addresses: Tensor,
    counts: Tensor,
    used: Tensor,
    fresh: int,
    side: int,
    layout: Sequence[int],
    dtype: torch.dtype,
    tokens: int,
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
) -> Tensor:
    return ops.decode_pages(addresses, counts[: int(used) - fresh], side, layout, dtype)


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
    layout: Sequence[int],
    scale: float,
    precision: int,
    sparse_values: float,
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
    layout: Sequence[int],
    scale: float,
    precision: int,
    sparse_values: float,
) -> Tensor:
    in_use = counts[: int(used) - fresh]
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
        None,
        layout,
        scale,
        precision=precision,
        sparse_values=sparse_values,
    )


write_tiles = _library.register(
    "write_tiles(Tensor(a!) addresses, Tensor(b!) used, Tensor keys, Tensor values, Tensor writer, int[] layout) -> ()",
    _write_fake,
    _write,
)
"""Encode keys and values [B, kv_heads, 64 * n, d] as the next tiles of a layer."""

decode_tiles = _library.register(
    "decode_tiles(Tensor addresses, Tensor counts, Tensor used, SymInt fresh, int side, int[] layout, "
    "ScalarType dtype, SymInt tokens) -> Tensor",
    _decode_fake,
    _decode,
)
"""`ops.decode_pages` of the tiles in use but for the last `fresh`; they hold `tokens` tokens."""

attend_tiles = _library.register(
    "attend_tiles(Tensor query, Tensor addresses, Tensor counts, Tensor used, SymInt fresh, "
    "Tensor? sink_keys, Tensor? sink_values, Tensor? keys, Tensor? values, Tensor? rows, Tensor? mask, "
    "int[] layout, float scale, int precision, float sparse_values) -> Tensor",
    _attend_fake,
    _attend,
)
"""`ops.attend` over the tiles in use but for the last `fresh`."""
