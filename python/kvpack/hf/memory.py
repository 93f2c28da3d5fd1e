"""What caches weigh: every tensor that a cache keeps, a page or storage that several share once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache as StockCache
from transformers import EncoderDecoderCache

from kvpack.ops import PAGE_TILES, _tables

from .layer import PackedLayer
from .pages import Page, PageTable

KINDS = ("codes", "scales", "means", "window", "sinks", "slack", "tables", "other", "host", "workspace")


def nbytes(*caches: StockCache) -> int:
    """Bytes that the caches keep, together: what they share is counted once.

    Takes `kvpack.Cache`, stock caches and `EncoderDecoderCache`. Python's own objects are not counted.
    """
    return sum(memory(*caches).values())


def memory(*caches: StockCache) -> dict[str, int]:
    """Bytes by kind; the kinds are disjoint and add up to `nbytes`.

    codes, scales, means: of the tiles in use; the mean and the map of channels of a row count in every page, which has
    a copy. window, sinks: their buffers, with free room; tokens that wait to be placed count as window. slack: slots of
    pages that are not in use. tables: page addresses, tile counts, padding. other: layers that are not packed.
    host: of offloaded caches, copies in host memory of pages that are on the device. workspace: kept between calls
    (none is: attend asks torch for its own and gives it back).
    """
    out = dict.fromkeys(KINDS, 0)
    storages: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    pages: dict[int, tuple[Page, int, PageTable]] = {}
    seen: set[int] = set()
    for layer in _layers(caches):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if not isinstance(layer, PackedLayer):
            _add(storages["other"], _tensors(vars(layer)))
            continue
        _add(storages["window"], _tensors((layer.window, layer.pending)))
        _add(storages["sinks"], _tensors(layer.sinks))
        table = layer.table
        _add(
            storages["tables"],
            _tensors((table.addresses, table.counts, table.used, layer.rows, layer.pads, layer.writer, layer.unread)),
        )
        for number, (page, used) in table.slots_in_use().items():
            if number not in pages or pages[number][1] < used:
                pages[number] = (page, used, table)
    for page, used, table in pages.values():
        if page.host is not None and page.host.data_ptr() not in pages:
            _add(storages["host"], [page.host])
        out["slack"] += page.data.untyped_storage().nbytes()
        layout = _tables.parse_layout(table.layout)
        sizes = {
            "scales": used * sum(side.scales for side in layout.sections),
            "codes": used * sum(side.codes for side in layout.sections),
            "means": sum(
                side.map + (side.means if side.mean_count == 1 else used * (side.means // PAGE_TILES))
                for side in layout.sections
            ),
        }
        for kind, size in sizes.items():
            out[kind] += layout.kv_heads * size
            out["slack"] -= layout.kv_heads * size
    for kind, found in storages.items():
        out[kind] += sum(found.values())
    return out


def _layers(caches: Iterable[StockCache]) -> Iterator[Any]:
    for cache in caches:
        if isinstance(cache, EncoderDecoderCache):
            yield from _layers((cache.self_attention_cache, cache.cross_attention_cache))
        else:
            yield from cache.layers


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for item in x.values():
            yield from _tensors(item)
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(item)


def _add(storages: dict[int, int], tensors: Iterable[Tensor]) -> None:
    for x in tensors:
        storage = x.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
