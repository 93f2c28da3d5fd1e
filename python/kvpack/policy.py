"""Policy: which codec each (layer, side) of a cache gets, with window and sinks.

    Policy.uniform("tq4", "tq3")                                   every layer the same
    Policy.uniform("tq3", layers={0: ("tq4", "tq4"), 5: ("tq3", "tq2")})     a default, and a table of exceptions
    Policy.of("balanced")                                          a preset, a JSON file, or any of the above

A policy says nothing about a model but the numbers of its layers; `check` holds them against one. The JSON form
carries a version, and what it does not know it refuses.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpack.spec import CodecSpec, Side, of_cache, parse, side_index

VERSION = 1
"""Of the JSON form."""
WINDOW, SINKS = 128, 4
"""Defaults of every cache: newest and first tokens that are kept exact."""

_VERSION_FIELD = "kvpack_policy"
_LAYER_FIELDS = ("key", "value")

Table = tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class Policy:
    """Codecs by layer, window and sinks. Hashable, and equal where all of that is equal.

    Args:
        key, value: codecs of the layers that `layers` does not name; `value` None means the same as `key`.
        layers: layer index to (key codec, value codec); kept as a sorted tuple of (layer, key, value).
        window: newest tokens kept exact, at least.
        sinks: first real tokens of each row kept exact.
        name: what reports call it; not compared.

    Raises:
        ValueError: unknown codec or option, a layer that is no whole number, negative window or sinks.
    """

    key: str = "tq4"
    value: str | None = None
    layers: Mapping[int, tuple[str, str]] | Table = ()
    window: int = WINDOW
    sinks: int = SINKS
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        key, value = _codec("key", self.key), _codec("value", self.key if self.value is None else self.value)
        table = _table(self.layers)
        for what, number in (("window", self.window), ("sinks", self.sinks)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{what}={number!r} is not allowed: a whole number of tokens, 0 or more")
        # What the default says already is left out, so that equal policies compare equal.
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "layers", tuple(row for row in table if row[1:] != (key, value)))

    @classmethod
    def uniform(
        cls,
        key: str | CodecSpec = "tq4",
        value: str | CodecSpec | None = None,
        layers: Mapping[int, tuple[str, str]] | None = None,
        *,
        window: int = WINDOW,
        sinks: int = SINKS,
        name: str = "",
    ) -> Policy:
        """The same codecs in every layer, but for those that `layers` names. Arguments and errors as `Policy`."""
        return cls(str(key), None if value is None else str(value), layers or {}, window, sinks, name)

    @classmethod
    def of(cls, policy: Policy | str | os.PathLike[str] | Mapping[str, Any]) -> Policy:
        """From anything that is accepted as `policy=`: a Policy, a preset's name, a JSON file, its content.

        Raises:
            ValueError: neither a preset nor a file; names the presets.
            TypeError: something else.
        """
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, Mapping):
            return cls.from_json(policy)
        if isinstance(policy, str) and policy in PRESETS:
            return PRESETS[policy]
        if isinstance(policy, (str, os.PathLike)):
            if Path(policy).expanduser().is_file():
                return cls.load(policy)
            raise ValueError(
                f"policy {str(policy)!r} is neither a preset ({', '.join(PRESETS)}) nor a JSON file that exists"
            )
        raise TypeError(
            f"policy is a {type(policy).__name__}; allowed: a kvpack.Policy, a preset ({', '.join(PRESETS)}), "
            "the path of a JSON file, or what it holds"
        )

    # Asking.

    def codecs(self, layer: int) -> tuple[str, str]:
        """Key and value codec of a layer."""
        return self.table.get(layer, (self.key, str(self.value)))

    def codec(self, layer: int, side: Side) -> str:
        """Codec of a (layer, side)."""
        return self.codecs(layer)[side_index(side)]

    @property
    def table(self) -> dict[int, tuple[str, str]]:
        """Layers that differ from the default, to their codecs."""
        rows = self.layers
        assert isinstance(rows, tuple)
        return {layer: (key, value) for layer, key, value in rows}

    @property
    def is_uniform(self) -> bool:
        return not self.layers

    @property
    def label(self) -> str:
        """Its name; without one, the default's codecs, and how many layers have others: "tq4/tq3", "tq3 +4 layers"."""
        if self.name:
            return self.name
        pair = pair_label(self.key, str(self.value))
        count = len(self.layers)
        return f"{pair} +{count} layer{'s' if count > 1 else ''}" if count else pair

    def bits(self, head_dim: int, layers: int | Iterable[int], value_dim: int | None = None) -> float:
        """Honest bits per value of full tiles, the mean over the packed `layers` (their numbers, or how many) and
        both sides: codes, scales and all metadata.
        """
        value_dim = head_dim if value_dim is None else value_dim
        numbers = range(layers) if isinstance(layers, int) else list(layers)
        if not numbers:
            raise ValueError("bits of no layers: at least one is needed")
        total = 0.0
        for pair, count in Counter(self.codecs(layer) for layer in numbers).items():
            key = of_cache(pair[0], "key", self.sinks).bits(head_dim, "key")
            value = of_cache(pair[1], "value", self.sinks).bits(value_dim, "value")
            total += count * (key * head_dim + value * value_dim)
        return total / (len(numbers) * (head_dim + value_dim))

    def names(self) -> set[str]:
        """Every codec that the policy names."""
        return {self.key, str(self.value), *(codec for pair in self.table.values() for codec in pair)}

    def check(self, layers: int, packed: Collection[int] | None = None) -> None:
        """ValueError if the table names a layer that a model of `layers` layers does not have, or does not pack."""
        for layer in self.table:
            if layer >= layers:
                raise ValueError(
                    f"policy {self.label!r} names layer {layer}, but the model has {layers}: allowed are "
                    f"0..{layers - 1}"
                )
            if packed is not None and layer not in packed:
                allowed = ", ".join(map(str, sorted(packed))) or "none"
                raise ValueError(f"policy {self.label!r} names layer {layer}, which is not packed; allowed: {allowed}")

    # JSON.

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers: what `from_json` takes."""
        out: dict[str, Any] = {_VERSION_FIELD: VERSION}
        if self.name:
            out["name"] = self.name
        out.update(key=self.key, value=self.value, window=self.window, sinks=self.sinks)
        out["layers"] = {str(layer): {"key": key, "value": value} for layer, (key, value) in self.table.items()}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Policy:
        """From what `to_json` makes, or that as text.

        Raises:
            ValueError: not JSON, another version, unknown or missing fields, unknown codecs.
        """
        if isinstance(data, str):
            try:
                data = json.loads(data, object_pairs_hook=_once)
            except json.JSONDecodeError as error:
                raise ValueError(f"a policy is a JSON object; this is no JSON: {error}") from error
        if not isinstance(data, Mapping):
            raise ValueError(f"a policy is a JSON object, not a {type(data).__name__}")
        if data.get(_VERSION_FIELD) != VERSION:
            found = data.get(_VERSION_FIELD)
            raise ValueError(f"{_VERSION_FIELD}={found!r} is no version that this kvpack reads; allowed: {VERSION}")
        known = (_VERSION_FIELD, "name", "key", "value", "window", "sinks", "layers")
        _only(data, known, "a policy")
        if "key" not in data:
            raise ValueError("a policy needs the field 'key'")
        layers = data.get("layers", {})
        if not isinstance(layers, Mapping):
            raise ValueError(f"'layers' of a policy is a {type(layers).__name__}; allowed: an object by layer number")
        table: dict[int, tuple[str, str]] = {}
        for layer, pair in layers.items():
            where = f"layer {layer!r} of a policy"
            if not str(layer).isdecimal():
                raise ValueError(f"{where}: allowed are whole numbers, 0 or more")
            if not isinstance(pair, Mapping) or set(_LAYER_FIELDS) - set(pair):
                raise ValueError(f"{where} needs the fields 'key' and 'value', not {pair!r}")
            _only(pair, _LAYER_FIELDS, where)
            if int(layer) in table:
                raise ValueError(f"{where} is given twice")
            table[int(layer)] = (pair["key"], pair["value"])
        options = {name: data[name] for name in ("value", "window", "sinks", "name") if name in data}
        return cls(key=data["key"], layers=table, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to a file."""
        Path(path).expanduser().write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a file that `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: as `from_json`, with the path.
        """
        try:
            return cls.from_json(Path(path).expanduser().read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def pair_label(key: str, value: str) -> str:
    """One codec, or key/value codecs where they differ."""
    return key if key == value else f"{key}/{value}"


def _codec(what: str, text: Any) -> str:
    try:
        return str(parse(text))
    except TypeError as error:
        raise ValueError(f"{what}={text!r}: {error}") from error


def _table(layers: Any) -> Table:
    """Sorted rows (layer, key, value) of a mapping, or of such rows."""
    rows = [(layer, *_two(layer, pair)) for layer, pair in layers.items()] if isinstance(layers, Mapping) else layers
    out = []
    for layer, key, value in rows:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer {layer!r} of a policy is not allowed: a whole number, 0 or more")
        out.append((layer, _codec(f"layer {layer}, key", key), _codec(f"layer {layer}, value", value)))
    if len({row[0] for row in out}) < len(out):
        twice = next(layer for layer, count in Counter(row[0] for row in out).items() if count > 1)
        raise ValueError(f"layer {twice} of a policy is given twice")
    return tuple(sorted(out))


def _two(layer: object, pair: Any) -> tuple[str, str]:
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        return pair[0], pair[1]
    raise ValueError(f"layer {layer!r} of a policy needs a pair (key codec, value codec), not {pair!r}")


def _only(data: Mapping[str, Any], known: Collection[str], where: str) -> None:
    unknown = sorted(str(name) for name in data if name not in known)
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; allowed: {', '.join(known)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON text; the parser itself would let the last of two equal names win."""
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"a policy names {twice!r} twice")
    return out


PRESETS: dict[str, Policy] = {
    "quality": Policy.uniform("tcq4", name="quality"),
    "balanced": Policy.uniform("tcq4", "tcq3", name="balanced"),
    "small": Policy.uniform("tcq3", "tcq2", name="small"),
}
"""Presets by name. At equal bits trellis codes have about half the divergence of Lloyd-Max ones, and a bit on keys is
worth more than one on values (docs/quality.md)."""
