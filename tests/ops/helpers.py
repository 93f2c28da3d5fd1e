"""Parts of the operator tests: both implementations of each operator, pages of random tokens, attend calls.

With the compiled library present, ``torch.ops`` runs the native kernels and the defaults are called directly,
so that one run tests both. With ``KVPACK_NO_NATIVE=1``, ``torch.ops`` (opcheck, torch.compile) runs the
defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack import ops, reference, spec
from kvpack.ops import _append, _attend, _decode, _decode_pages, _encode, _encode_pages, _rotate

SIDES = ("key", "value")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Implementation:
    """Callables with the arguments of the schemas."""

    name: str
    encode: Callable[..., tuple[Tensor, Tensor]]
    decode: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    encode_pages: Callable[..., None]
    decode_pages: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    attend_counting: Callable[..., None]
    append: Callable[..., None]


DEFAULT = Implementation(
    "default",
    _encode.default,
    _decode.default,
    _rotate.default,
    _encode_pages.default,
    _decode_pages.default,
    _attend.default,
    _attend.counting_default,
    _append.default,
)
NATIVE = Implementation(
    "native",
    _encode.OP,
    _decode.OP,
    _rotate.OP,
    _encode_pages.OP,
    _decode_pages.OP,
    _attend.OP,
    _attend.COUNTING_OP,
    _append.OP,
)


def refuses(impl: Implementation, named: str = ".") -> AbstractContextManager[Any]:
    """A context in which ValueError is raised; of messages, only the default's must match ``named``."""
    return pytest.raises(ValueError, match=named if impl is DEFAULT else ".")


@dataclass
class Cache:
    """Pages with encoded tokens, and what the reference decodes from them."""

    layout: list[int]
    table: Tensor
    counts: Tensor
    keys: Tensor  # [B, kv_heads, 64 * tiles, dk], as they were before encoding
    values: Tensor
    packed: tuple[Any, Any] | None  # float64 arrays [B, kv_heads, sum(counts), d*] by the reference
    memory: list[Tensor]  # keeps the pages alive

    def page(self, row: int, page: int) -> Tensor:
        return self.memory[row * self.table.shape[1] + page]


def new_page(layout: list[int]) -> Tensor:
    """A 64-byte aligned page, filled with a byte that no test expects."""
    size = ops.page_bytes(layout)
    raw = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
    skip = -raw.data_ptr() % 64
    return raw[skip : skip + size]


def code(text: str, dtype: str = "float32", scale: str | None = None) -> int:
    """The code of a codec string; a scale rule may be given apart."""
    parsed = spec.parse(text)
    return (parsed if scale is None else replace(parsed, scale=scale)).code(dtype)  # type: ignore[arg-type]


def named(text: str) -> dict[str, Any]:
    """A codec string as the arguments of `reference.encode`: name, scale, center, search."""
    parsed = spec.parse(text)
    return {"name": parsed.name, "scale": parsed.scale, "center": parsed.center or "none", "search": parsed.search}


def slow(text: str) -> bool:
    """Whether the reference's encoder takes its time (trellis codes)."""
    name = spec.parse(text).name
    return name in reference.CODECS and reference.CODECS[name].stream


def quick_or_full(name: str, quick: Collection[str]) -> Any:
    """A parameter that only the full suite runs, unless it is among the quick ones."""
    return pytest.param(name, marks=[] if name in quick else pytest.mark.full)


def numpy(x: Tensor) -> Any:
    """A NumPy array of the same values; of bfloat16, the bits (as the reference takes them)."""
    return x.contiguous().view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.contiguous().numpy()


def make_cache(
    key: str = "tq4",
    value: str = "tq3",
    *,
    key_dim: int = 128,
    value_dim: int = 128,
    heads: int = 2,
    batch: int = 1,
    counts: tuple[int, ...] = (64, 64),
    dtype: str = "float32",
    seed: int = 0,
    shift: float = 0.0,
    encode: Callable[..., None] | None = None,
    spare_pages: int = 0,
) -> Cache:
    """A cache of random tokens, encoded by ``encode`` (if None by the default, slow codecs by the operator)."""
    generator = torch.Generator().manual_seed(seed)
    layout = ops.layout(code(key, dtype), key_dim, code(value, dtype), value_dim, heads)
    tiles = len(counts)
    pages = -(-tiles // ops.PAGE_TILES) + spare_pages
    memory = [new_page(layout) for _ in range(batch * pages)]
    table = torch.tensor([page.data_ptr() for page in memory], dtype=torch.int64).reshape(batch, pages)
    keys, values = (
        torch.randn((batch, heads, 64 * tiles, d), generator=generator).to(DTYPES[dtype]) for d in (key_dim, value_dim)
    )
    keys, values = (x + (shift * torch.linspace(-1, 1, x.shape[-1])).to(x.dtype) for x in (keys, values))
    encode = encode or (ops.encode_pages if slow(key) or slow(value) else DEFAULT.encode_pages)
    encode(table, keys, values, 0, layout)
    packed = None
    if tiles:
        kept = [64 * t + i for t, n in enumerate(counts) for i in range(n)]
        packed = tuple(expected(x, name, side, dtype)[:, :, kept] for x, name, side in (
            (keys, key, "key"), (values, value, "value")
        ))  # fmt: skip
    return Cache(layout, table, torch.tensor(counts, dtype=torch.int32), keys, values, packed, memory)


def reference_bytes(x: Tensor, text: str, side: str) -> tuple[Any, Any]:
    """Bytes of tiles and of means by the reference."""
    options = named(text)
    rows = numpy(x if options["name"] == "exact" else x.float())
    return reference.encode(rows, side=side, **options), reference.encode_means(
        rows, options["name"], options["center"], side
    )


def expected(x: Tensor, text: str, side: str, dtype: str = "float32") -> Any:
    """What the reference decodes from its own encoding: float64 [..., tokens, d].

    Of trellis codes, from the operator's, which takes a hundredth of the time and has the same bytes.
    """
    if slow(text):
        data, means = (part.numpy() for part in ops.encode(x, code(text), SIDES.index(side)))
    else:
        data, means = reference_bytes(x, text, side)
    return reference.decode(data, named(text)["name"], side, x.shape[-1], x.shape[-2], dtype=dtype, mean=means)


class Case:
    """One attend call: its arguments, with setters for what a test varies, and what the reference says."""

    def __init__(
        self,
        cache: Cache,
        *,
        query_heads: int = 4,
        queries: int = 1,
        sinks: int = 0,
        exact: int = 0,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(100 + seed)
        self.cache = cache
        batch = cache.table.shape[0]
        _, self.dk, _, self.dv, heads = cache.layout

        def tokens(count: int, dim: int) -> Tensor:
            # A stride that is not the dense one, as of heads split from one projection.
            x = torch.randn(batch, count, heads, dim, generator=generator).to(DTYPES[dtype])
            return x.transpose(1, 2)

        self.query = torch.randn(batch, query_heads, queries, self.dk, generator=generator).to(DTYPES[dtype])
        self.sinks = (tokens(sinks, self.dk), tokens(sinks, self.dv)) if sinks else None
        self.exact = (tokens(exact, self.dk), tokens(exact, self.dv)) if exact else None
        self.positions = sinks + int(cache.counts.sum()) + exact
        self.options = {
            "rows": None, "mask": None, "sink_logits": None, "scale": self.dk**-0.5, "softcap": 0.0,
            "causal": False, **options,
        }  # fmt: skip

    def arguments(self, precision: int = 1) -> list[Any]:
        o = self.options
        sinks, exact = self.sinks or (None, None), self.exact or (None, None)
        return [
            self.query, self.cache.table, self.cache.counts, *sinks, *exact, o["rows"], o["mask"],
            o["sink_logits"], self.cache.layout, o["scale"], o["softcap"], o["causal"], precision,
        ]  # fmt: skip

    def expected(self) -> Any:
        def arrays(pair: tuple[Tensor, Tensor] | None) -> Any:
            return None if pair is None else tuple(x.float().numpy() for x in pair)

        o: dict[str, Any] = dict(self.options)
        for name in ("rows", "mask", "sink_logits"):
            if o[name] is not None:
                o[name] = (o[name].float() if o[name].is_floating_point() else o[name]).numpy()
        return reference.attend(
            self.query.float().numpy(),
            sinks=arrays(self.sinks),
            packed=self.cache.packed,
            exact=arrays(self.exact),
            **o,
        )


def rows(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int32)
