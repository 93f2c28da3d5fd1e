"""Codec strings: ``name[:option=value[,option=value]]``, for example ``"tq4"`` or ``"tcq3:center=tile,search"``.

    scale   stored, norm (default), mse, unbiased     which scale is stored, codecs with one scale for the vector
    center  none, mean, tile                          what is subtracted before quantization, rotated codecs
    search  on, off (default); `search` alone is on   the encoder tries seven gains and keeps the best, as scale

Not given, center is `none` for codecs on arrays; a cache takes `tile` for keys and `mean` for values, where it keeps
sinks exact (:func:`of_cache`).

A parsed string is a :class:`CodecSpec`; :meth:`CodecSpec.code` is the integer by which operators and the compiled
core know it. The registry comes from the core (``csrc/codecs/codecs.def``), so a codec is registered in one place.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from kvpack import _core

Side = Literal["key", "value"]
ScaleRule = Literal["stored", "norm", "mse", "unbiased"]
Center = Literal["none", "mean", "tile"]
Dtype = Literal["float32", "float16", "bfloat16"]

SIDES: tuple[Side, ...] = get_args(Side)
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
CENTERS: tuple[Center, ...] = get_args(Center)
SWITCH = ("off", "on")
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
TILE = int(_core.TILE)
"""Tokens of a full tile."""
PAGE_TILES = int(_core.PAGE_TILES)
"""Tiles of one KV head in a page."""
FORMAT_VERSION = int(_core.FORMAT_VERSION)


@dataclass(frozen=True)
class CodecInfo:
    """A line of the registry. ``bits`` of one code, 0 for ``exact``; ``scale_block`` 0: a scale per vector and part."""

    id: int
    name: str
    bits: float
    rotated: bool
    scale_rules: bool
    trellis: bool
    elements: bool
    asymmetric: bool
    scale_block: int
    parts: int
    split: bool
    what: str
    source: str


@cache
def registry() -> dict[str, CodecInfo]:
    """Name to line of the registry, in the order of their ids."""
    return {line["name"]: CodecInfo(**line) for line in _core.registry()}


@dataclass(frozen=True)
class CodecSpec:
    """A codec with its options; ``str(spec)`` is the shortest string that parses to it."""

    name: str
    scale: ScaleRule | None = None
    """Scale rule, of a codec that has them; None for the others."""
    center: Center | None = None
    """What is subtracted: nothing, the mean of the row's first tile, or the mean of each tile. None: not said, which
    is nothing for codecs on arrays."""
    search: bool = False
    """Whether the encoder searches for the best gain; the decoder does not care."""

    @property
    def info(self) -> CodecInfo:
        return registry()[self.name]

    def code(self, dtype: Dtype = "float32") -> int:
        """The codec code ``id | rule << 8 | dtype << 16 | center << 24 | search << 28``.

        The dtype matters to ``exact`` alone.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
        rule = 0 if self.scale is None else SCALE_RULES.index(self.scale)
        element = DTYPES.index(dtype) if self.info.bits == 0 else 0
        return (
            self.info.id
            | rule << 8
            | element << 16
            | CENTERS.index(self.center or "none") << 24
            | int(self.search) << 28
        )

    def side_bytes(self, head_dim: int, side: Side, dtype: Dtype = "float32") -> int:
        """Bytes of one side of a tile of 64 tokens: codes and scales, without means."""
        return int(_core.side_bytes(self.code(dtype), head_dim, side_index(side)))

    def bits(self, head_dim: int, side: Side = "key", dtype: Dtype = "float32") -> float:
        """Honest bits per value of full pages (4 tiles): codes, scales, means and all metadata."""
        tiles = PAGE_TILES * self.side_bytes(head_dim, side, dtype)
        means = int(_core.page_mean_bytes(self.code(dtype), head_dim, side_index(side)))
        return 8 * (tiles + means) / (PAGE_TILES * TILE * head_dim)

    def __str__(self) -> str:
        options = []
        if self.scale not in (None, "norm"):
            options.append(f"scale={self.scale}")
        if self.center is not None:
            options.append(f"center={self.center}")
        if self.search:
            options.append("search")
        return self.name + (":" + ",".join(options) if options else "")


def side_index(side: str) -> int:
    """0 for ``"key"``, 1 for ``"value"``."""
    if side not in SIDES:
        raise ValueError(f"side {side!r} is not known; allowed: 'key', 'value'")
    return SIDES.index(side)


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse(text: str | CodecSpec) -> CodecSpec:
    """Parse a codec string.

    Raises:
        TypeError: not a string.
        ValueError: unknown codec (with a suggestion), unknown or repeated option, bad value.
    """
    if isinstance(text, CodecSpec):
        return text
    if not isinstance(text, str):
        raise TypeError(f"a codec is a string such as 'tq4' or 'tq4:scale=mse', not {type(text).__name__}")
    name, _, tail = text.strip().partition(":")
    known = list(registry())
    if name not in known:
        raise ValueError(f"unknown codec {name!r}; known: {', '.join(known)}{_suggest(name, known)}")
    info = registry()[name]
    if ":" in text and not tail:
        raise ValueError(f"codec {text!r}: nothing follows ':'; the grammar is name[:option=value[,option=value]]")
    known_values: dict[str, tuple[str, ...]] = {"scale": SCALE_RULES, "center": CENTERS, "search": SWITCH}
    given: dict[str, str] = {}
    for item in tail.split(",") if tail else []:
        option, equals, value = item.strip().partition("=")
        if option == "search" and not equals:
            equals, value = "=", "on"
        if not equals:
            raise ValueError(f"codec {text!r}: {item!r} is not of the form option=value")
        if option not in known_values:
            allowed = ", ".join(known_values)
            suggestion = _suggest(option, list(known_values))
            raise ValueError(f"codec {text!r}: unknown option {option!r}; allowed: {allowed}{suggestion}")
        if not (info.rotated if option == "center" else info.scale_rules):
            what = {"scale": "scale rule", "center": "centring", "search": "search of its scale"}[option]
            have = "rotated codecs" if option == "center" else "rotated codecs with one scale for the vector"
            raise ValueError(f"codec {text!r}: {name} has no {what}; {have} have one")
        if option in given:
            raise ValueError(f"codec {text!r}: option {option!r} is given twice")
        if value not in known_values[option]:
            what = {"scale": "scale rule"}.get(option, option)
            allowed = ", ".join(known_values[option])
            suggestion = _suggest(value, list(known_values[option]))
            raise ValueError(f"codec {text!r}: unknown {what} {value!r}; allowed: {allowed}{suggestion}")
        given[option] = value
    scale = SCALE_RULES[SCALE_RULES.index(given.get("scale", "norm"))] if info.scale_rules else None
    center = CENTERS[CENTERS.index(given["center"])] if "center" in given else None
    return CodecSpec(name, scale, center, given.get("search") == "on")


CACHE_CENTERS: dict[Side, Center] = {"key": "tile", "value": "mean"}
"""What a cache centres by where the codec does not say: measured best (docs/quality.md)."""


def of_cache(codec: str | CodecSpec, side: Side, sinks: int) -> CodecSpec:
    """The codec as a cache uses it: with a centre, if the codec is rotated and does not say.

    Without exact sinks nothing is centred: the first token, whose key is small, would become a large one.
    """
    spec = parse(codec)
    if spec.center is not None or not spec.info.rotated:
        return spec
    return replace(spec, center=CACHE_CENTERS[side] if sinks else "none")
