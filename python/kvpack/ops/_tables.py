"""What a codec code and a layout mean: codebooks, sizes in bytes, and the checks of all of them.

The numbers of the format (ids, bits, levels, units) come from ``kvpack.reference``, which specifies them. A
*codec code* is ``id | rule << 8 | dtype << 16``, a *layout* is the list ``[key_code, key_dim, value_code,
value_dim, kv_heads]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import CODEBOOKS, CODECS, HEAD_SIZES, SCALE_RULES, unsupported_head_size
from ..reference import TILE as TILE  # explicitly, for the other modules here

PAGE_TILES = 4
"""Tiles (slots) in a page."""

LINE = 64
"""Bytes that every section of a record is a multiple of; pages are aligned to it."""

KEY, VALUE = 0, 1

RULES = tuple(SCALE_RULES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Family(NamedTuple):
    """A codec as the format defines it; ``levels``, ``unit`` and ``thresholds`` only where it is rotated."""

    id: int
    name: str
    bits: int  # of a code; 0: exact
    rotated: bool
    scale_block: int  # values that share a scale; 0: all of a vector
    levels: tuple[int, ...] = ()  # int8, ascending; code i stands for levels[i]
    unit: float = 0.0  # level * unit approximates a centroid of N(0, 1)
    thresholds: tuple[float, ...] = ()  # of the positive half, ascending, float32


def _families() -> dict[int, Family]:
    out = {0: Family(0, "exact", 0, False, 0)}
    for name, codec in CODECS.items():
        family = Family(codec.id, name, codec.bits, codec.rotated, codec.scale_block)
        if codec.rotated:
            book = CODEBOOKS[codec.bits]
            levels, thresholds = tuple(book.levels.tolist()), tuple(book.thresholds.tolist())
            family = family._replace(levels=levels, unit=book.unit, thresholds=thresholds)
        out[codec.id] = family
    return out


FAMILIES = _families()


class Codec(NamedTuple):
    """A codec code, taken apart."""

    family: Family
    rule: str  # "" unless rotated
    dtype: torch.dtype  # of the elements of `exact`; float32 otherwise

    @property
    def exact(self) -> bool:
        return self.family.bits == 0

    @property
    def bits(self) -> int:
        """Bits of one code (of one element, if exact)."""
        return self.dtype.itemsize * 8 if self.exact else self.family.bits

    def scale_blocks(self, head_dim: int) -> int:
        """Scales per token: 0 for exact, 1 for rotated codecs."""
        if self.exact:
            return 0
        return -(-head_dim // self.family.scale_block) if self.family.scale_block else 1


class Sections(NamedTuple):
    """Sizes in bytes of the sections of one side of a tile."""

    scales: int
    mean: int
    codes: int

    @property
    def total(self) -> int:
        return self.scales + self.mean + self.codes


class Layout(NamedTuple):
    """A layout list, taken apart. ``record`` and ``page`` are sizes in bytes."""

    codecs: tuple[Codec, Codec]
    head_dims: tuple[int, int]
    kv_heads: int
    sections: tuple[Sections, Sections]
    record: int
    page: int


@lru_cache(maxsize=256)
def parse_code(code: int) -> Codec:
    """The codec of a codec code. ValueError if any of its fields is unknown or must be 0."""
    family_id, rule, dtype = code & 0xFF, (code >> 8) & 0xFF, code >> 16
    family = FAMILIES.get(family_id)
    if code < 0 or family is None:
        known = ", ".join(f"{f.id} ({f.name})" for f in FAMILIES.values())
        raise ValueError(f"codec code {code:#x} names codec id {family_id}; allowed ids: {known}")
    if rule >= (len(RULES) if family.rotated else 1):
        allowed = ", ".join(f"{i} ({r})" for i, r in enumerate(RULES)) if family.rotated else "0"
        raise ValueError(f"codec code {code:#x} has scale rule {rule}; allowed for {family.name}: {allowed}")
    if dtype >= (len(DTYPES) if family.bits == 0 else 1):
        allowed = ", ".join(f"{i} ({d})" for i, d in enumerate(DTYPES)) if family.bits == 0 else "0"
        raise ValueError(f"codec code {code:#x} has dtype {dtype}; allowed for {family.name}: {allowed}")
    return Codec(family, RULES[rule] if family.rotated else "", DTYPES[dtype])


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
    """Sizes in bytes of the sections of one side of a tile."""
    codec = parse_code(code)
    check_head_dim(head_dim)
    check_side(side)
    return Sections(codec.scale_blocks(head_dim) * TILE * 2, 0, TILE * head_dim * codec.bits // 8)


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
    return Layout(
        (parse_code(key_code), parse_code(value_code)),
        (key_dim, value_dim),
        kv_heads,
        both,
        record,
        kv_heads * PAGE_TILES * record,
    )


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
