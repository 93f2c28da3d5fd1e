"""Operator ``kvpack::attend``: attention of queries over packed pages, sinks and exact tokens; and
``kvpack::attend_counting``, which does the same and counts the tiles whose values stayed unread.

The default decodes everything and takes one dense float32 softmax; it leaves no values unread.

Positions of row b with (pad, sink_start) = rows[b]: the *stream* (packed tokens, then the exact ones) is
interleaved with S sinks. Stream index i sits at position i if i < sink_start, else at i + S; sink j at
sink_start + j. Positions below ``pad`` are masked. The columns of ``mask`` are positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, _pages, _tables
from ._tables import KEY, VALUE, Layout

_ARGUMENTS = (
    "Tensor query, Tensor table, Tensor counts, Tensor? sink_keys, Tensor? sink_values, Tensor? keys, "
    "Tensor? values, Tensor? rows, Tensor? mask, Tensor? sink_logits, int[] layout, float scale, "
    "float softcap, bool causal, int precision"
)
SCHEMA = f"attend({_ARGUMENTS}, float sparse_values=0.0, int exact=-1) -> Tensor"
COUNTING_SCHEMA = (
    f"attend_counting({_ARGUMENTS}, float sparse_values, int exact, Tensor(a!) out, Tensor(b!) unread) -> ()"
)


class Call(NamedTuple):
    """The arguments, in the order of the schema."""

    query: Tensor
    table: Tensor
    counts: Tensor
    sink_keys: Tensor | None
    sink_values: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    rows: Tensor | None
    mask: Tensor | None
    sink_logits: Tensor | None
    layout: Sequence[int]
    scale: float
    softcap: float
    causal: bool
    precision: int
    sparse_values: float = 0.0
    exact: int = -1


def _pair(name: str, keys: Tensor | None, values: Tensor | None, query: Tensor, layout: Layout) -> int:
    """The number of tokens of a pair of optional keys and values."""
    if keys is None or values is None:
        if keys is not values:
            raise ValueError(f"one of the {name} keys and values is None; allowed: both or neither")
        return 0
    if keys.dtype != query.dtype or values.dtype != query.dtype:
        raise ValueError(f"{name} keys and values are {keys.dtype} and {values.dtype}; allowed: {query.dtype}")
    batch = query.shape[0]
    _tables.check_tokens(f"{name} keys", keys, batch, layout, KEY)
    _tables.check_tokens(f"{name} values", values, batch, layout, VALUE)
    if keys.shape[2] != values.shape[2]:
        raise ValueError(f"{name} keys and values differ: {keys.shape[2]} and {values.shape[2]} tokens")
    return keys.shape[2]


def _check(call: Call, layout: Layout) -> tuple[int, int]:
    """Every check that needs no values; returns the numbers of sinks and of exact tokens."""
    query, table, rows, mask, logits = call.query, call.table, call.rows, call.mask, call.sink_logits
    if query.dim() != 4:
        raise ValueError(f"query has {query.dim()} dims; it needs 4: [B, Hq, q, dk]")
    _tables.check_dtype(query.dtype, "query")
    batch, heads, count, dim = query.shape
    if dim != layout.head_dims[KEY]:
        raise ValueError(f"query has head size {dim}; the layout's keys have {layout.head_dims[KEY]}")
    if heads % layout.kv_heads != 0:
        raise ValueError(f"query has {heads} heads; allowed: multiples of {layout.kv_heads}, the KV heads")
    _pages.check_table(table)
    if table.shape[0] != batch:
        raise ValueError(f"table has {table.shape[0]} rows; query has {batch}")
    _pages.check_counts(call.counts, table)
    sinks = _pair("sink", call.sink_keys, call.sink_values, query, layout)
    exact = _pair("exact", call.keys, call.values, query, layout)
    if not -1 <= call.exact <= exact:
        raise ValueError(f"exact is {call.exact}; allowed: -1 (all), 0 to {exact}, the tokens of keys and values")
    exact = exact if call.exact < 0 else call.exact
    if rows is not None and (rows.dtype != torch.int32 or rows.dim() != 2):
        raise ValueError(f"rows is {rows.dtype} with {rows.dim()} dims; allowed: torch.int32 [B, 2]")
    if rows is not None and (rows.shape[0] != batch or rows.shape[1] != 2):
        raise ValueError(f"rows has shape {list(rows.shape)}; allowed: [{batch}, 2]")
    if mask is not None:
        if mask.dtype != torch.bool and mask.dtype not in _tables.DTYPES:
            raise ValueError(f"mask has dtype {mask.dtype}; allowed: torch.bool, {', '.join(map(str, _tables.DTYPES))}")
        if mask.dim() != 4:
            raise ValueError(f"mask has {mask.dim()} dims; it needs 4: [B or 1, Hq or 1, q or 1, positions]")
        for axis, size in enumerate((batch, heads, count)):
            if mask.shape[axis] != 1 and mask.shape[axis] != size:
                raise ValueError(f"mask has size {mask.shape[axis]} at dim {axis}; allowed: 1 or {size}")
    if logits is not None and (logits.dtype != torch.float32 or list(logits.shape) != [heads]):
        raise ValueError(f"sink_logits is {logits.dtype} {list(logits.shape)}; allowed: torch.float32 [{heads}]")
    if not call.softcap >= 0.0:
        raise ValueError(f"softcap is {call.softcap}; allowed: 0 (off) or positive")
    if call.precision not in (0, 1):
        raise ValueError(f"precision is {call.precision}; allowed: 0 (default), 1 (high)")
    if not 0.0 <= call.sparse_values < 1.0:
        raise ValueError(f"sparse_values is {call.sparse_values}; allowed: 0 to below 1")
    return sinks, exact


def _positions(rows: Tensor | None, batch: int, sinks: int, stream: int) -> tuple[Tensor, Tensor]:
    """Positions int64 [B, sinks + stream], sinks first, and pads [B, 1]."""
    if rows is None:
        rows = torch.zeros((batch, 2), dtype=torch.int32)
    for b, (pad, start) in enumerate(rows.tolist()):
        if pad < 0 or (sinks and not 0 <= start <= stream):
            raise ValueError(f"rows[{b}] is (pad {pad}, sink_start {start}); allowed: pad >= 0, sink_start 0..{stream}")
    pad, start = (rows[:, i : i + 1].to(torch.int64) for i in range(2))
    index = torch.arange(stream, device=rows.device)
    places = torch.where(index < start, index, index + sinks)
    return torch.cat((start + torch.arange(sinks, device=rows.device), places), dim=1), pad


def fake(*args: Any, **kwargs: Any) -> Tensor:
    call = Call(*args, **kwargs)
    layout = _tables.parse_layout(call.layout)
    _check(call, layout)
    return call.query.new_empty((*call.query.shape[:3], layout.head_dims[VALUE]))


def default(*args: Any, **kwargs: Any) -> Tensor:
    call = Call(*args, **kwargs)
    layout = _tables.parse_layout(call.layout)
    sinks, exact = _check(call, layout)
    query, mask, softcap = call.query, call.mask, call.softcap
    batch, heads, count, _ = query.shape
    packed = sum(_pages.counts_list(call.counts))
    total = sinks + packed + exact
    if mask is not None and mask.shape[3] != total:
        raise ValueError(
            f"mask has {mask.shape[3]} positions; allowed: {total} ({sinks} sinks, {packed} packed and "
            f"{exact} exact tokens)"
        )
    positions, pad = _positions(call.rows, batch, sinks, packed + exact)

    dense = []  # keys and values in storage order: sinks, packed, exact
    for side, sink, recent in ((KEY, call.sink_keys, call.keys), (VALUE, call.sink_values, call.values)):
        recent = recent if recent is None else recent[:, :, :exact]
        parts = [sink, _pages.read_tiles(call.table, call.counts, side, layout), recent]
        dense.append(torch.cat([part.to(torch.float32) for part in parts if part is not None], dim=2))

    group = heads // layout.kv_heads * count  # all queries of all heads that share a KV head
    grouped = query.to(torch.float32).reshape(batch, layout.kv_heads, group, query.shape[3])
    scores = torch.matmul(grouped, dense[KEY].transpose(-1, -2)) * call.scale
    scores = scores.reshape(batch, heads, count, total)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    columns = positions[:, None, None, :].expand(batch, heads, count, total)
    hidden = columns < pad[:, :, None, None]
    if mask is not None:
        chosen = mask.expand(batch, heads, count, total).gather(3, columns)
        if mask.dtype == torch.bool:
            hidden = hidden | ~chosen
        else:
            scores = scores + chosen.to(torch.float32)
    if call.causal:
        index = torch.arange(total) - (sinks + packed)  # of exact tokens; sinks and packed tokens are below 0
        limit = torch.arange(count) + (exact - count + 1)
        hidden = hidden | ((index >= 0) & (index >= limit[:, None]))
    scores = scores.masked_fill(hidden, float("-inf"))

    # One more logit per head, that of the sink logits; -inf if there are none. It carries no value.
    extra = scores.new_full((batch, heads, count, 1), float("-inf"))
    if call.sink_logits is not None:
        extra = call.sink_logits[:, None, None].expand_as(extra)
    scores = torch.cat((scores, extra), dim=-1)
    peak = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - peak.clamp(min=torch.finfo(torch.float32).min))
    mass = weights.sum(dim=-1, keepdim=True)
    weights = weights[..., :total] / torch.where(mass == 0, torch.ones_like(mass), mass)
    out = torch.matmul(weights.reshape(batch, layout.kv_heads, group, total), dense[VALUE])
    return out.reshape(batch, heads, count, layout.head_dims[VALUE]).to(query.dtype).contiguous()


def _check_counting(call: Call, layout: Layout, out: Tensor, unread: Tensor) -> None:
    """Checks of what `attend_counting` writes to."""
    shape = [*call.query.shape[:3], layout.head_dims[VALUE]]
    if list(out.shape) != shape or out.dtype != call.query.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; allowed: {call.query.dtype} {shape}, contiguous")
    if unread.dtype != torch.int64 or list(unread.shape) != [2] or not unread.is_contiguous():
        raise ValueError(f"unread is {unread.dtype} {list(unread.shape)}; allowed: torch.int64 [2], contiguous")


def counting_fake(*args: Any) -> None:
    call, (out, unread) = Call(*args[:-2]), args[-2:]
    layout = _tables.parse_layout(call.layout)
    _check(call, layout)
    _check_counting(call, layout, out, unread)


def counting_default(*args: Any) -> None:
    counting_fake(*args)
    args[-2].copy_(default(*args[:-2]))


OP = _library.register(SCHEMA, fake, default)
COUNTING_OP = _library.register(COUNTING_SCHEMA, counting_fake, counting_default)
