"""Codec strings: ``name[:option=value[,option=value]]``, for example ``"tq4"`` or ``"tq4:scale=mse"``.

A parsed string is a :class:`CodecSpec`; :meth:`CodecSpec.code` is the integer by which operators and the compiled
core know it. The registry comes from the core (``csrc/codecs/codecs.def``), so a codec is registered in one place.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from kvpack import _core

Side = Literal["key", "value"]
ScaleRule = Literal["stored", "norm", "mse", "unbiased"]
Dtype = Literal["float32", "float16", "bfloat16"]

SIDES: tuple[Side, ...] = get_args(Side)
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
TILE = int(_core.TILE)
"""Tokens of a full tile."""
FORMAT_VERSION = int(_core.FORMAT_VERSION)


@dataclass(frozen=True)
class CodecInfo:
    """A line of the registry. ``bits`` is 0 for ``exact``; ``scale_block`` 0 means one scale per vector."""

    id: int
    name: str
    bits: int
    rotated: bool
    scale_block: int
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
    """Scale rule of a rotated codec; None for the others."""

    @property
    def info(self) -> CodecInfo:
        return registry()[self.name]

    def code(self, dtype: Dtype = "float32") -> int:
        """The codec code ``id | rule << 8 | dtype << 16``; the dtype matters to ``exact`` alone."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
        rule = 0 if self.scale is None else SCALE_RULES.index(self.scale)
        element = DTYPES.index(dtype) if self.info.bits == 0 else 0
        return self.info.id | rule << 8 | element << 16

    def side_bytes(self, head_dim: int, side: Side, dtype: Dtype = "float32") -> int:
        """Bytes of one side of a tile: codes, scales and all metadata of 64 tokens."""
        return int(_core.side_bytes(self.code(dtype), head_dim, side_index(side)))

    def bits(self, head_dim: int, side: Side = "key", dtype: Dtype = "float32") -> float:
        """Honest bits per value of full tiles: codes, scales and all metadata."""
        return 8 * self.side_bytes(head_dim, side, dtype) / (TILE * head_dim)

    def __str__(self) -> str:
        return self.name if self.scale in (None, "norm") else f"{self.name}:scale={self.scale}"


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
    rotated = registry()[name].rotated
    scale: ScaleRule | None = None
    if ":" in text and not tail:
        raise ValueError(f"codec {text!r}: nothing follows ':'; the grammar is name[:option=value[,option=value]]")
    for item in tail.split(",") if tail else []:
        option, equals, value = item.strip().partition("=")
        if not equals:
            raise ValueError(f"codec {text!r}: {item!r} is not of the form option=value")
        if option != "scale":
            raise ValueError(f"codec {text!r}: unknown option {option!r}; allowed: scale{_suggest(option, ['scale'])}")
        if not rotated:
            raise ValueError(f"codec {text!r}: {name} has no scale rule; rotated codecs have one")
        if scale is not None:
            raise ValueError(f"codec {text!r}: option 'scale' is given twice")
        if value not in SCALE_RULES:
            allowed = ", ".join(SCALE_RULES)
            suggestion = _suggest(value, list(SCALE_RULES))
            raise ValueError(f"codec {text!r}: unknown scale rule {value!r}; allowed: {allowed}{suggestion}")
        scale = SCALE_RULES[SCALE_RULES.index(value)]
    return CodecSpec(name, (scale or "norm") if rotated else None)
