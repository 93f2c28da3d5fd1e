"""What a codec code and a layout mean: options, sizes in bytes, and the checks of all of them.

The numbers of the format (ids, bits, options) come from ``kvpack.reference``, which specifies them. A *codec
code* is ``id | rule << 8 | dtype << 16 | center << 24 | search << 28``, a *layout* is the list ``[key_code,
key_dim, value_code, value_dim, kv_heads]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import CENTERS, CODECS, HEAD_SIZES, MEANS_PER_PAGE, SCALE_RULES, SIDES, unsupported_head_size
from ..reference import LINE as LINE  # explicitly, for the other modules here
from ..reference import PAGE_TILES as PAGE_TILES
from ..reference import TILE as TILE

KEY, VALUE = 0, 1

RULES = tuple(SCALE_RULES)
FIELDS = ((0, 0xFF), (8, 0xFF), (16, 0xFF), (24, 0xF), (28, 1))  # of a codec code: first bit, mask
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Codec(NamedTuple):
    """A codec code, taken apart."""

    name: str
    rule: str  # "" unless it has scale rules
    dtype: torch.dtype  # of the elements of `exact`; float32 otherwise
    center: str
    search: bool

    @property
    def exact(self) -> bool:
        return self.name == "exact"

    def sections(self, head_dim: int, side: int) -> tuple[int, int]:
        """Bytes of (scales, codes) of one side of a tile."""
        if self.exact:
            return 0, TILE * head_dim * self.dtype.itemsize
        codec = CODECS[self.name]
        return 2 * TILE * codec.scale_rows(head_dim, SIDES[side]), codec.code_bytes(head_dim)

    def map_bytes(self, head_dim: int) -> int:
        """Bytes of a row's map of channels; 0 without one."""
        return 0 if self.exact else CODECS[self.name].map_bytes(head_dim)


class Sections(NamedTuple):
    """Sizes in bytes of what belongs to one side of a tile or page.

    scales, codes: of a tile. means: of a page, one KV head, `mean_count` of them. map: of a page, one KV head. entry:
    what goes with tiles standing alone, a mean and a map.
    """

    scales: int
    codes: int
    mean_count: int
    means: int
    map: int
    entry: int

    @property
    def total(self) -> int:
        """Bytes of one side of a tile, without means."""
        return self.scales + self.codes


class Layout(NamedTuple):
    """A layout list, taken apart. ``record``, ``means``, ``head`` and ``page`` are sizes in bytes.

    means: of one KV head in a page, with maps and what fills them up. head: the part of a page of one KV head.
    """

    codecs: tuple[Codec, Codec]
    head_dims: tuple[int, int]
    kv_heads: int
    sections: tuple[Sections, Sections]
    record: int
    means: int
    head: int
    page: int


NAMES = {0: "exact"} | {codec.id: name for name, codec in CODECS.items()}


@lru_cache(maxsize=256)
def parse_code(code: int) -> Codec:
    """The codec of a codec code. ValueError if any of its fields is unknown or must be 0."""
    number, rule, dtype, center, search = (code >> at & mask for at, mask in FIELDS)
    name = NAMES.get(number)
    if code < 0 or name is None:
        known = ", ".join(f"{i} ({n})" for i, n in NAMES.items())
        raise ValueError(f"codec code {code:#x} names codec id {number}; allowed ids: {known}")
    codec = CODECS.get(name)
    rules = RULES if codec is not None and codec.scale_rules else ()
    fields = (
        ("scale rule", rule, rules),
        ("dtype", dtype, DTYPES if codec is None else ()),
        ("center", center, CENTERS if codec is not None and codec.rotated else ()),
        ("search", search, (False, True) if rules else ()),
    )
    for what, value, known_values in fields:
        if value >= max(1, len(known_values)):
            allowed = ", ".join(f"{i} ({x})" for i, x in enumerate(known_values)) or "0"
            raise ValueError(f"codec code {code:#x} has {what} {value}; allowed for {name}: {allowed}")
    if code >> 29:
        raise ValueError(f"codec code {code:#x} has bits above the 28th; allowed: none")
    return Codec(name, RULES[rule] if rules else "", DTYPES[dtype], CENTERS[center], bool(search))


def check_head_dim(head_dim: int) -> int:
    """The head size as a plain int; ValueError if this release does not accept it."""
    head_dim = int(head_dim)  # under torch.compile: specialises, since the layout is given as plain integers
    if head_dim not in HEAD_SIZES:
        raise ValueError(unsupported_head_size(head_dim))
    return head_dim


def check_side(side: int) -> int:
    """The side; ValueError unless 0 (key) or 1 (value)."""
    if side not in (KEY, VALUE):
        raise ValueError(f"side {side} is unknown; allowed: 0 (key), 1 (value)")
    return side


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """ValueError unless ``dtype`` is one that tensors of tokens may have."""
    if dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {dtype}; allowed: {', '.join(map(str, DTYPES))}")


@lru_cache(maxsize=256)
def sections(code: int, head_dim: int, side: int) -> Sections:
    """Sizes in bytes of what belongs to one side of a tile."""
    codec = parse_code(code)
    check_head_dim(head_dim)
    check_side(side)
    means, maps = MEANS_PER_PAGE[codec.center], codec.map_bytes(head_dim)
    entry = maps if maps and not means else head_dim + 2 + maps
    return Sections(*codec.sections(head_dim, side), means, means * (head_dim + 2), maps, entry)


def mean_shape(code: int, tiles: int, head_dim: int, side: int) -> list[int]:
    """Of what goes with tiles standing alone: the number of entries and their bytes."""
    sizes = sections(code, head_dim, side)
    if parse_code(code).center == "tile":
        return [tiles, sizes.entry]
    return [-(-tiles // PAGE_TILES) if sizes.mean_count or sizes.map else 0, sizes.entry]


@lru_cache(maxsize=256)
def _layout(values: tuple[int, ...]) -> Layout:
    if len(values) != 5:
        raise ValueError(
            f"a layout has {len(values)} entries; it needs 5: key codec code, key head size, value codec "
            "code, value head size, KV heads"
        )
    key_code, key_dim, value_code, value_dim, kv_heads = values
    if kv_heads < 1:
        raise ValueError(f"a layout has {kv_heads} KV heads; it needs at least 1")
    both = (sections(key_code, key_dim, KEY), sections(value_code, value_dim, VALUE))
    record = both[KEY].total + both[VALUE].total
    means = -(-sum(sizes.means + sizes.map for sizes in both) // LINE) * LINE
    head = PAGE_TILES * record + means
    codecs = (parse_code(key_code), parse_code(value_code))
    return Layout(codecs, (key_dim, value_dim), kv_heads, both, record, means, head, kv_heads * head)


def parse_layout(layout: Sequence[int]) -> Layout:
    """A layout list, checked and taken apart; ValueError for a bad one."""
    return _layout(tuple(int(value) for value in layout))


def check_tokens(name: str, x: Tensor, batch: int, layout: Layout, side: int) -> None:
    """ValueError unless x is [batch, kv_heads, tokens, d] of the layout."""
    check_dtype(x.dtype, name)
    if x.dim() != 4:
        raise ValueError(f"{name} have {x.dim()} dims; allowed: 4, [B, kv_heads, tokens, d]")
    wanted = ((0, batch, "rows"), (1, layout.kv_heads, "KV heads"), (3, layout.head_dims[side], "dims"))
    for axis, size, what in wanted:
        if x.shape[axis] != size:
            raise ValueError(f"{name} have {x.shape[axis]} {what}; allowed: {size}")
