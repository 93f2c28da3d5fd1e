"""Operator benchmarks: `attend` and `encode` against torch, in one process, interleaved.

A decode step walks through the layers of a model, and a layer's cache is not in the processor's caches when
its turn comes. So every contender owns copies of its data, enough to exceed them, and uses them in turn. A
sample is one walk; samples of all contenders alternate, in rotating order, and ratios are formed within a
round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpack.reference import LINE, PAGE_TILES, TILE

from .metrics import jsonable
from .models import torch_dtype
from .modes import Progress, no_progress
from .speed import Spread

TORCH, GROUPED, MATMUL = "torch", "torch, grouped", "torch, matmul"
#: Bytes that the copies of one contender must reach together: several times a processor's last cache.
COLD_BYTES = 128 << 20


@dataclass(frozen=True)
class BenchShape:
    """context: packed tokens, rounded up to whole pages; dtype: of torch's keys and values, and of the query.

    queries: query tokens, the newest of the sequence. One stands for a decode step; several bring their own keys and
    values, and a boolean mask, causal among them, as a chunk of a prompt or a draft to be verified does.
    """

    context: int = 4096
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    queries: int = 1

    @property
    def tokens(self) -> int:
        page = TILE * PAGE_TILES
        return -(-self.context // page) * page

    @property
    def dense_bytes(self) -> int:
        size = torch.empty((), dtype=torch_dtype(self.dtype)).element_size()
        return 2 * self.batch * self.kv_heads * self.tokens * self.head_dim * size

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes are walked through."""
        return max(1, min(256, -(-COLD_BYTES // size)))


@dataclass(frozen=True)
class BenchRow:
    """what: attend or encode. dtype: of the run; "exact@float16" has its own. microseconds: per call (one layer).
    ratio: torch's time over this one's.

    gigabytes_per_second: of what is read (attend: keys and values as stored; encode: the dense input).
    """

    what: str
    codec: str
    against: str
    context: int
    kv_heads: int
    group: int
    head_dim: int
    batch: int
    dtype: str
    queries: int
    threads: int
    rounds: int
    microseconds: Spread
    ratio: Spread
    gigabytes_per_second: float

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = jsonable(self)
        return out


@dataclass
class _Contender:
    codec: str
    calls: list[Callable[[], Any]]
    read: int


def aligned_page(size: int) -> Tensor:
    """uint8 [size] whose data begins at a multiple of 64 bytes."""
    raw = torch.empty(size + LINE, dtype=torch.uint8)
    start = -raw.data_ptr() % LINE
    return raw[start : start + size]


def _random(shape: BenchShape, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.kv_heads, shape.tokens if tokens is None else tokens, shape.head_dim)
    dtype = torch_dtype(shape.dtype)
    return (
        torch.randn(size, generator=generator).to(dtype),
        torch.randn(size, generator=generator).to(dtype),
    )


def _mask(shape: BenchShape) -> Tensor | None:
    """What the query tokens may see of the history and of themselves, bool [1, 1, queries, tokens + queries]."""
    if shape.queries == 1:
        return None
    return torch.ones(shape.queries, shape.tokens + shape.queries, dtype=torch.bool).tril(shape.tokens)[None, None]


def codec_codes(codec: str, dtype: str) -> tuple[int, int]:
    """The operators' codec codes of "tq4" or "tq4/tq3"."""
    from kvpack import spec

    known: dict[str, spec.Dtype] = {name: name for name in spec.DTYPES}
    if dtype not in known:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    key, _, value = codec.partition("/")
    return spec.parse(key).code(known[dtype]), spec.parse(value or key).code(known[dtype])


def _packed(codec: str, shape: BenchShape, query: Tensor, keys: Tensor, values: Tensor, precision: int) -> _Contender:
    from kvpack import ops

    name, _, dtype = codec.partition("@")
    if dtype:
        shape = replace(shape, dtype=dtype)
        query, keys, values = (x.to(torch_dtype(dtype)) for x in (query, keys, values))
    own_keys, own_values, mask = *_random(shape, 1, shape.queries), _mask(shape)

    key, value = codec_codes(name, shape.dtype)
    layout = ops.layout(key, shape.head_dim, value, shape.head_dim, shape.kv_heads)
    size, pages = ops.page_bytes(layout), shape.tokens // (TILE * PAGE_TILES)
    counts = torch.full((shape.tokens // TILE,), TILE, dtype=torch.int32)
    scale = shape.head_dim**-0.5
    calls: list[Callable[[], Any]] = []
    first: list[list[Tensor]] | None = None
    for _ in range(shape.copies(size * pages * shape.batch)):
        own = [[aligned_page(size) for _ in range(pages)] for _ in range(shape.batch)]
        table = torch.tensor([[page.data_ptr() for page in row] for row in own], dtype=torch.int64)
        if first is None:
            ops.encode_pages(table, keys, values, 0, layout)
            first = own
        else:
            for row, encoded in zip(own, first, strict=True):
                for page, source in zip(row, encoded, strict=True):
                    page.copy_(source)

        def call(table: Tensor = table, own: Any = own) -> Tensor:  # `own` keeps the pages alive
            return ops.attend(
                query,
                table,
                counts,
                None,
                None,
                own_keys,
                own_values,
                None,
                mask,
                None,
                layout,
                scale,
                precision=precision,
            )

        calls.append(call)
    return _Contender(codec, calls, size * pages * shape.batch)


def _stock(name: str, shape: BenchShape, query: Tensor, keys: Tensor, values: Tensor) -> _Contender:
    """torch's attention: TORCH, as transformers calls it for one query token without a mask, here with the shape's;
    GROUPED, the query heads of a KV head as rows of one query, as it does with a mask; MATMUL, these with two products
    and a softmax. They can differ by a factor of 20.
    """
    calls: list[Callable[[], Any]] = []
    rows = query.view(shape.batch, shape.kv_heads, shape.group * shape.queries, shape.head_dim)
    scale, mask = shape.head_dim**-0.5, _mask(shape)
    row_mask = None if mask is None else mask.repeat(1, 1, shape.group, 1)
    bias = (
        None if row_mask is None else torch.zeros(row_mask.shape, dtype=query.dtype).masked_fill(~row_mask, -torch.inf)
    )
    if shape.queries > 1:
        own = _random(shape, 1, shape.queries)
        keys, values = torch.cat((keys, own[0]), dim=2), torch.cat((values, own[1]), dim=2)
    for _ in range(shape.copies(shape.dense_bytes)):
        k, v = keys.clone(), values.clone()

        def call(k: Tensor = k, v: Tensor = v) -> Tensor:
            if name == TORCH:
                gqa = shape.group > 1
                return torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=gqa)
            if name == GROUPED:
                return torch.nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=row_mask)
            scores = rows @ k.transpose(-1, -2) * scale
            return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v

        calls.append(call)
    return _Contender(name, calls, shape.dense_bytes)


def _rounds(contenders: list[_Contender], rounds: int, tick: Callable[[int], None]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds + 1):
        for i in range(len(contenders)):
            at = (i + number) % len(contenders)
            calls = contenders[at].calls
            began = time.perf_counter()
            for call in calls:
                call()
            if number:  # the first round warms up
                times[at].append((time.perf_counter() - began) / len(calls))
        tick(number)
    return times


def _rows_of(
    what: str, against: str, shape: BenchShape, contenders: list[_Contender], times: list[list[float]]
) -> list[BenchRow]:
    return [
        BenchRow(
            what=what,
            codec=contender.codec,
            against=against,
            context=shape.tokens,
            kv_heads=shape.kv_heads,
            group=shape.group,
            head_dim=shape.head_dim,
            batch=shape.batch,
            dtype=shape.dtype,
            queries=shape.queries,
            threads=torch.get_num_threads(),
            rounds=len(mine),
            microseconds=Spread.of([t * 1e6 for t in mine]),
            ratio=Spread.of([base / t for base, t in zip(times[0], mine, strict=True)]),
            gigabytes_per_second=contender.read / Spread.of(mine).median / 1e9,
        )
        for contender, mine in zip(contenders, times, strict=True)
    ]


@torch.no_grad()
def bench_attend(
    codecs: Sequence[str],
    shape: BenchShape,
    *,
    rounds: int = 10,
    precision: int = 0,
    progress: Progress = no_progress,
) -> list[BenchRow]:
    """One step of one layer: torch's attention first, in every way that differs, then `attend` over each codec: "tq4",
    "tq4/tq3", or "exact@float16", with elements and a query of a dtype of their own.
    """
    keys, values = _random(shape, 0)
    query = torch.randn(shape.batch, shape.kv_heads * shape.group, shape.queries, shape.head_dim).to(keys.dtype)
    stock = (TORCH, GROUPED, MATMUL) if shape.group > 1 else (TORCH, MATMUL)
    contenders = [_stock(name, shape, query, keys, values) for name in stock]
    for i, codec in enumerate(codecs):
        contenders.append(_packed(codec, shape, query, keys, values, precision))
        progress(f"pack {shape.tokens} tokens", i + 1, len(codecs))
    times = _rounds(contenders, rounds, lambda n: progress(f"attend {shape.tokens} tokens", n, rounds))
    return _rows_of("attend", "scaled_dot_product_attention", shape, contenders, times)


@torch.no_grad()
def bench_encode(
    codecs: Sequence[str], shape: BenchShape, *, rounds: int = 10, progress: Progress = no_progress
) -> list[BenchRow]:
    """Encoding one layer's keys and values into pages, against torch copying them, the least a cache must do."""
    from kvpack import ops

    sources = [_random(shape, seed) for seed in range(min(4, shape.copies(shape.dense_bytes)))]
    sinks = [torch.empty_like(keys) for keys, _ in sources]

    def copy_call(i: int) -> Callable[[], Any]:
        return lambda: (sinks[i].copy_(sources[i][0]), sinks[i].copy_(sources[i][1]))

    contenders = [_Contender(TORCH, [copy_call(i) for i in range(len(sources))], shape.dense_bytes)]
    for codec in codecs:
        key, value = codec_codes(codec, shape.dtype)
        layout = ops.layout(key, shape.head_dim, value, shape.head_dim, shape.kv_heads)
        pages = shape.tokens // (TILE * PAGE_TILES)
        own = [[aligned_page(ops.page_bytes(layout)) for _ in range(pages)] for _ in range(shape.batch)]
        table = torch.tensor([[page.data_ptr() for page in row] for row in own], dtype=torch.int64)

        def encode_call(i: int, table: Tensor = table, own: Any = own, layout: Any = layout) -> Callable[[], Any]:
            def call(own: Any = own) -> None:  # `own` keeps the pages alive
                ops.encode_pages(table, *sources[i], 0, layout)

            return call

        contenders.append(_Contender(codec, [encode_call(i) for i in range(len(sources))], shape.dense_bytes))
    times = _rounds(contenders, rounds, lambda n: progress(f"encode {shape.tokens} tokens", n, rounds))
    return _rows_of("encode", "copy", shape, contenders, times)
