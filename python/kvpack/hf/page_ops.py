"""Operator `kvpack::write_tiles`: packing as one opaque step of a compiled graph.

Packing allocates pages and follows their addresses, which torch.compile cannot trace. Traced code therefore
calls this operator with the number of a writer (a layer); eagerly it finds the writer in a registry of weak
references and calls it. Its declared effect is the address tensor, which stands for the pages.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

from torch import Tensor

from kvpack.ops import _library

SCHEMA = "write_tiles(Tensor(a!) table, Tensor keys, Tensor values, SymInt first_tile, SymInt writer) -> ()"


class Writer(Protocol):
    """What packs for one layer."""

    def write_tiles(self, addresses: Tensor, keys: Tensor, values: Tensor, first_tile: int) -> None: ...


_NUMBERS = itertools.count(1)
_WRITERS: weakref.WeakValueDictionary[int, Writer] = weakref.WeakValueDictionary()


def enrol(writer: Writer) -> int:
    """The number under which `write_tiles` finds this writer for as long as it lives."""
    number = next(_NUMBERS)
    _WRITERS[number] = writer
    return number


def _fake(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, writer: int) -> None:
    return None


def _default(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, writer: int) -> None:
    found = _WRITERS.get(writer)
    if found is None:
        raise RuntimeError(f"the cache layer with writer number {writer} no longer exists")
    found.write_tiles(table, keys, values, first_tile)


OP = _library.register(SCHEMA, _fake, _default)


def write_tiles(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, writer: int) -> None:
    """Encode keys and values [B, kv_heads, 64 * n, d] as tiles `first_tile`... of the layer `writer`."""
    OP(table, keys, values, first_tile, writer)
