"""Snapshots: a cache in a file, and back. docs/snapshot.md specifies the file; container.py reads and writes its bytes.

What a file must match to be loaded, and how each thing is checked:

* the snapshot's own version, and that of the packed format: equal numbers
* the model: the fields of its config that decide about keys and values, and, if asked for, a hash of its weights
* the codecs: names and options of every layer, as the policy of the file gives them here
* every byte of it: checksums
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpack._version import __version__
from kvpack.ops import PAGE_TILES, TILE, page_bytes
from kvpack.policy import Policy
from kvpack.spec import FORMAT_VERSION

from . import container, fingerprint, stock_state
from .container import Reader, SnapshotError
from .layer import PackedLayer
from .pages import Page, normal_mode
from .store import KEY, VALUE

if TYPE_CHECKING:
    from .cache import Cache

VERSION = 1
"""Of the file: which tensors and metadata there are, and what they mean."""
TOKEN_IDS = "token_ids"
_NUMBERS = ("length", "sink_count", "window_count", "placed", "pad_max", "last_count")
_FLAGS = ("padding_known", "heard")


@dataclasses.dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot says of itself.

    path, nbytes: of the file.
    kvpack: the version that wrote it.
    model_type: of the config, such as "llama".
    policy: codecs, window and sinks.
    rows, length: of the cache; length counts all tokens.
    weights: whether it has a hash of the model's weights.
    token_ids: int64 [rows, length], if they were saved.
    """

    path: Path
    nbytes: int
    kvpack: str
    model_type: str
    policy: Policy
    rows: int
    length: int
    weights: bool
    token_ids: Tensor | None = dataclasses.field(repr=False, compare=False)


def save(cache: Cache, path: str | os.PathLike[str], token_ids: Tensor | None, model: Any) -> None:
    """`Cache.save`."""
    rows, length = _size(cache)
    tensors: dict[str, container.Content] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        name = f"layers.{index}"
        if isinstance(layer, PackedLayer):
            layers.append(_packed_state(layer, name, tensors))
        else:
            layers.append(stock_state.of(layer, name, tensors))
    metadata = {
        "kvpack_snapshot": VERSION,
        "packed_format": FORMAT_VERSION,
        "kvpack": __version__,
        "model": json.loads(cache.model_fields),
        "weights": None if model is None else fingerprint.of_weights(model),
        "policy": cache.policy.to_json(),
        "options": cache.options,
        "rows": rows,
        "length": length,
        "layers": layers,
    }
    if token_ids is not None:
        tensors[TOKEN_IDS] = _token_ids(token_ids, rows, length)
    container.write(path, tensors, {name: json.dumps(x) for name, x in metadata.items()})


def _size(cache: Cache) -> tuple[int, int]:
    """Rows and tokens of a cache."""
    layer = cache.packed_layers[0]
    return (layer.batch, layer.length) if layer.is_initialized else (0, 0)


def _token_ids(ids: Tensor, rows: int, length: int) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        what = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"token_ids are {what}; allowed: a tensor of whole numbers [rows, tokens]")
    if list(ids.shape) != [rows, length]:
        raise ValueError(
            f"token_ids have shape {list(ids.shape)}; allowed: [{rows}, {length}], those in the cache (the last token "
            "that generate returns is not: ids[:, :cache.get_seq_length()])"
        )
    return ids.to(torch.int64)


# What metadata that mean nothing lead to, in a file whose checksums are right.
_NONSENSE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load(kind: type[Cache], path: str | os.PathLike[str], config: Any, model: Any, mapped: bool) -> Cache:
    """`Cache.load`."""
    with Reader(path) as reader:
        metadata = _metadata(reader)
        _check_model(reader, metadata, config, model)
        try:
            policy = Policy.from_json(metadata["policy"])
            encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
            cache = kind(config, policy=policy, encoder_decoder=encoder_decoder, **metadata["options"])
            if len(metadata["layers"]) != len(cache.layers):
                raise ValueError(f"it has {len(metadata['layers'])} layers, the model {len(cache.layers)}")
        except _NONSENSE as error:
            raise reader.error(f"cannot be read by this version of kvpack ({__version__}): {error}") from error
        tensors = reader.read([name for name in reader.entries if name != TOKEN_IDS], mapped)
        try:
            with normal_mode():
                for index, (layer, state) in enumerate(zip(cache.layers, metadata["layers"], strict=True)):
                    if isinstance(layer, PackedLayer):
                        _restore(layer, state, f"layers.{index}", tensors, mapped)
                    else:
                        stock_state.restore(layer, state, f"layers.{index}", tensors)
        except _NONSENSE as error:
            raise reader.error(f"is not consistent: layer {index}: {error!r}") from error
    return cache


def inspect(path: str | os.PathLike[str]) -> SnapshotInfo:
    """`Cache.inspect`."""
    with Reader(path) as reader:
        metadata = _metadata(reader)
        ids = reader.read([TOKEN_IDS])[TOKEN_IDS] if TOKEN_IDS in reader.entries else None
        try:
            return SnapshotInfo(
                path=reader.path,
                nbytes=reader.nbytes,
                kvpack=metadata["kvpack"],
                model_type=metadata["model"].get("model_type", ""),
                policy=Policy.from_json(metadata["policy"]),
                rows=metadata["rows"],
                length=metadata["length"],
                weights=metadata["weights"] is not None,
                token_ids=ids,
            )
        except _NONSENSE as error:
            raise reader.error(f"cannot be read by this version of kvpack ({__version__}): {error}") from error


def _metadata(reader: Reader) -> dict[str, Any]:
    """The metadata, of a version that is known."""
    if "kvpack_snapshot" not in reader.metadata:
        raise reader.error("is no snapshot of kvpack")
    try:
        metadata = {name: json.loads(text) for name, text in reader.metadata.items()}
        metadata["model"] = dict(metadata["model"])
    except _NONSENSE as error:
        raise reader.error("is no snapshot of kvpack: its metadata are no JSON, or not those of one") from error
    for name, what, ours in (
        ("kvpack_snapshot", "a snapshot", VERSION),
        ("packed_format", "in packed format", FORMAT_VERSION),
    ):
        if metadata.get(name) != ours:
            raise reader.error(
                f"is {what} of version {metadata.get(name)}, written by kvpack {metadata.get('kvpack')}; this kvpack "
                f"({__version__}) reads version {ours}"
            )
    return metadata


def _check_model(reader: Reader, metadata: Mapping[str, Any], config: Any, model: Any) -> None:
    """SnapshotError if the file is of another model than config and model."""
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config is a {type(config).__name__}; allowed: a transformers config, as model.config")
    found = fingerprint.differences(fingerprint.of_config(config), json.dumps(metadata.get("model", {})))
    if found is not None:
        raise reader.error(f"is of another model: {found}")
    if model is None:
        return
    weights = metadata.get("weights")
    if weights is None:
        raise reader.error(
            "has no hash of its model's weights, so they cannot be compared: save with model=, or load without"
        )
    if weights != fingerprint.of_weights(model):
        raise reader.error("is of a model with the same config and other weights (or weights of another dtype)")


# One packed layer.


def _packed_state(layer: PackedLayer, name: str, tensors: dict[str, container.Content]) -> dict[str, Any]:
    """What is not a tensor of a packed layer; its tensors are put in `tensors`."""
    layer.settle()
    key, value = layer.specs
    state: dict[str, Any] = {"packed": True, "key": str(key), "value": str(value), "told_rows": layer.told_rows}
    state |= {field: getattr(layer, field) for field in (*_NUMBERS, *_FLAGS)}
    for field in ("pads", "rows"):
        tensor = getattr(layer, field)
        if tensor is not None:
            tensors[f"{name}.{field}"] = tensor
    if not layer.is_initialized:
        return state
    table = layer.table
    state |= {
        "layout": layer.layout,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "batch": layer.batch,
        "tiles": table.tiles,
        "cut": [[tile, count] for tile, count in sorted(table.cut.items())],
    }
    for field, count in (("sinks", layer.sink_count), ("window", layer.window_count), ("pending", None)):
        pair = getattr(layer, field)
        if pair is not None:
            for side, tokens in zip(("keys", "values"), pair, strict=True):
                tensors[f"{name}.{field}.{side}"] = tokens[:, :, :count]
    pages, index = table.contents()
    if pages:
        tensors[f"{name}{container.PAGES}"] = pages
        tensors[f"{name}.table"] = torch.tensor(index, dtype=torch.int32)
    return state


def _restore(layer: PackedLayer, state: Mapping[str, Any], name: str, tensors: Mapping[str, Any], mapped: bool) -> None:
    """Make a new packed layer what the state and the tensors say. ValueError if they are not consistent."""
    codecs = [str(spec) for spec in layer.specs]
    if codecs != [state["key"], state["value"]]:
        raise ValueError(f"the codecs of its policy are {codecs} here, {state['key']} and {state['value']} there")
    for field in (*_NUMBERS, *_FLAGS, "told_rows"):
        setattr(layer, field, state[field])
    layer.pads, layer.rows = tensors.get(f"{name}.pads"), tensors.get(f"{name}.rows")
    if "layout" not in state:
        return
    _, key_dim, _, value_dim, heads = state["layout"]
    dtype, batch, dims = getattr(torch, state["dtype"]), state["batch"], (key_dim, value_dim)
    told = [tensors.get(f"{name}.{field}") for field in ("pending.keys", "sinks.keys", "window.keys", "table")]
    rows = {tensor.shape[0] for tensor in told if tensor is not None}
    _expect("rows", rows or {batch}, {batch})  # before anything is made for so many
    empty = [torch.empty((batch, heads, 0, dim), dtype=dtype) for dim in dims]
    layer.begin(empty[KEY], empty[VALUE])
    _expect("layout", layer.layout, state["layout"])

    def pair(field: str, count: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a field, if it is there."""
        if f"{name}.{field}.keys" not in tensors:
            return None
        found = tensors[f"{name}.{field}.keys"], tensors[f"{name}.{field}.values"]
        for tokens, dim in zip(found, dims, strict=True):
            _expect(field, (list(tokens.shape), tokens.dtype), ([batch, heads, count, dim], dtype))
        return found

    layer.pending = pair("pending", layer.length)
    sinks, window = pair("sinks", layer.sink_count), pair("window", layer.window_count)
    if sinks is not None:
        layer.sinks = layer.buffers(sinks, layer.sinks_wanted)
    if window is not None:
        layer.window = layer.buffers(window, layer.window_size + TILE)
    if f"{name}{container.PAGES}" in tensors:
        _restore_pages(layer, state, tensors[f"{name}{container.PAGES}"], tensors[f"{name}.table"], mapped)
    if layer.pending is None:
        _expect("tokens", layer.sink_count + layer.table.tokens + layer.window_count, layer.length)
    for field, size in (("pads", [batch]), ("rows", [batch, 2])):
        tensor = getattr(layer, field)
        if tensor is not None:
            _expect(field, list(tensor.shape), size)


def _restore_pages(
    layer: PackedLayer, state: Mapping[str, Any], pages: list[Tensor], table: Tensor, mapped: bool
) -> None:
    tiles, cut = int(state["tiles"]), {int(tile): int(count) for tile, count in state["cut"]}
    columns = -(-tiles // PAGE_TILES)
    _expect("bytes of pages", {page.numel() for page in pages}, {page_bytes(layer.layout)})
    _expect("table", (list(table.shape), table.dtype), ([layer.batch, columns], torch.int32))
    if not all(0 <= tile < tiles and 0 < count < TILE for tile, count in cut.items()):
        raise ValueError(f"cut tiles {cut} of {tiles}")
    # Pages of a memory map count as filled: a table that goes on in one takes a copy.
    filled = PAGE_TILES if mapped else 0
    own = [Page(page, filled) for page in pages]
    index = table.tolist()
    if any(not 0 <= number < len(own) for row in index for number in row):
        raise ValueError(f"its table names pages that are not there; there are {len(own)}")
    for row in index:
        for p, number in enumerate(row):
            own[number].filled = max(own[number].filled, min(PAGE_TILES, tiles - p * PAGE_TILES))
    layer.table.adopt([[own[number] for number in row] for row in index], tiles, cut)


def _expect(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{what}: {found} where {wanted} is needed")


__all__ = ["SnapshotError", "SnapshotInfo", "inspect", "load", "save"]
