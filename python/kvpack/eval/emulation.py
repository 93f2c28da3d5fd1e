"""`emulated` and `fake`: attention of one pass that behaves as if its keys and values came out of a packed
cache.

Shares no cache code with `kvpack.hf`. The model runs over a stock DynamicCache, so attention receives the
exact keys and values (after RoPE) of every token; this module quantizes and dequantizes them with
`kvpack.codec` and decides, query by query, which tokens a real cache would have held packed:

    position   0 .. sinks-1 | sinks ..................... | .............. n
               exact        | packed(n) tokens, coded     | window, exact

    packed(n) = 64 * floor(max(0, start(n) - sinks - window) / 64)

start(n) is the position at which the call that brings token n begins: n itself for `stepwise`. `fake` codes
every token but the sinks, the query's own included. Queries with equal packed(n) share one softmax over
[exact sinks | coded | exact]: the same as two score matrices under one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kvpack.spec import SIDES, CodecSpec, of_cache

from .cachespec import CacheSpec

TILE = 64


def packed_tokens(start: int, window: int, sinks: int) -> int:
    """Packed tokens that a call beginning at position `start` sees (architecture: window, tiles, sinks)."""
    return TILE * (max(0, start - sinks - window) // TILE)


def roundtrip(x: Tensor, codec: str | CodecSpec, side: Literal["key", "value"]) -> Tensor:
    """Encode and decode: float32 [..., tokens, d] of what comes back. The input is rounded to float32 first.

    `exact` returns x as it is, in its own dtype: a codec that keeps elements has nothing to round.
    """
    import kvpack

    if str(codec) == "exact":
        return x
    coder = kvpack.codec(codec, head_dim=x.shape[-1], side=side)
    rows = x.detach().to("cpu", torch.float32).contiguous()
    return torch.as_tensor(coder.decode(coder.encode(rows))).to(x.device, torch.float32)


@dataclass(frozen=True)
class Rule:
    """Which tokens a query sees coded. `prompt`: tokens of the first call; `chunk`: tokens of each later
    call.
    """

    spec: CacheSpec
    fake: bool = False
    prompt: int = 0
    chunk: int = 1

    def packed(self, position: int) -> int:
        """Coded tokens seen by the query at `position`."""
        if self.fake:
            raise AssertionError("fake has no boundary")
        if position < self.prompt:
            return 0
        start = self.prompt + (position - self.prompt) // self.chunk * self.chunk
        return packed_tokens(start, self.spec.window, self.spec.sinks)

    def groups(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, coded) of the runs of equal boundary among queries first .. first+count-1, from 0."""
        if self.fake:
            yield 0, count, max(0, first + count - self.spec.sinks)
            return
        begin = 0
        while begin < count:
            coded = self.packed(first + begin)
            end = begin + 1
            while end < count and self.packed(first + end) == coded:
                end += 1
            yield begin, end, coded
            begin = end


@dataclass
class _Coded:
    """Dequantized stream tokens of one layer, both sides: whole tiles are kept, a partial last one is redone."""

    tokens: int = 0
    sides: list[Tensor] = field(default_factory=list)


class Emulator:
    """The attention of one document.

    calls: how often attention of a packed layer came here. reads: per layer, queries that attended to a coded
    token, counted where the coded tokens are joined in.
    """

    def __init__(self, rule: Rule, layers: tuple[int, ...]) -> None:
        self.rule = rule
        self.layers = frozenset(layers)
        self.calls = 0
        self.reads: dict[int, int] = {}
        self._coded: dict[int, _Coded] = {}

    def coded(self, layer: int, key: Tensor, value: Tensor, tokens: int) -> list[Tensor]:
        """The first `tokens` stream tokens of a layer, dequantized, [B, Hkv, tokens, d] each side."""
        spec = self.rule.spec
        held = self._coded.setdefault(layer, _Coded())
        if held.tokens < tokens:
            pair = zip(spec.codecs(layer), SIDES, strict=True)
            key_codec, value_codec = (of_cache(codec, side, spec.sinks) for codec, side in pair)
            # Whole tiles stay as they are, but for the mean of a row and its map, which are those of its first tile.
            frozen = any(codec.center == "mean" or codec.info.split for codec in (key_codec, value_codec))
            whole = 0 if frozen else held.tokens // TILE * TILE
            here = slice(spec.sinks + whole, spec.sinks + tokens)
            fresh = [
                roundtrip(key[:, :, here], key_codec, "key"),
                roundtrip(value[:, :, here], value_codec, "value"),
            ]
            if whole:
                fresh = [torch.cat([a[:, :, :whole], b], dim=2) for a, b in zip(held.sides, fresh, strict=True)]
            held.tokens, held.sides = tokens, fresh
        return [side[:, :, :tokens] for side in held.sides]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        *,
        causal: bool = True,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """Attention output [B, Hq, q, dv] in the query's dtype, or None if no query sees a coded token.

        query [B, Hq, q, d], key and value [B, Hkv, S, d] exact; the queries are the last q of S positions.
        mask: None, bool (True = attend) or additive, [B|1, Hq|1, q, S]; `causal` counts where it is None.
        Computed in float32, or float64 for a float64 model.
        """
        self.calls += 1
        count, total = query.shape[2], key.shape[2]
        first, sinks = total - count, self.rule.spec.sinks
        groups = list(self.rule.groups(first, count))
        if not any(coded for _, _, coded in groups):
            return None
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.empty(*query.shape[:3], value.shape[-1], dtype=query.dtype, device=query.device)
        self.coded(layer, key, value, max(coded for _, _, coded in groups))  # once for all
        for begin, end, coded in groups:
            mixed = [key, value]
            if coded:
                self.reads[layer] = self.reads.get(layer, 0) + end - begin
                parts = self.coded(layer, key, value, coded)
                mixed = [
                    torch.cat([x[:, :, :sinks].to(work), c.to(work), x[:, :, sinks + coded :].to(work)], dim=2)
                    for x, c in zip((key, value), parts, strict=True)
                ]
            rows = slice(begin, end)
            allowed = _rows(mask, rows)
            if allowed is None and causal:
                at = torch.arange(first + begin, first + end, device=query.device)[:, None]
                allowed = (torch.arange(total, device=query.device)[None] <= at)[None, None]
            out[:, :, rows] = softmax_attention(
                query[:, :, rows].to(work),
                mixed[0].to(work),
                mixed[1].to(work),
                allowed,
                scale,
                softcap=softcap,
                sink_logits=sink_logits,
                bias=_rows(bias, rows),
            ).to(query.dtype)
        return out


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Textbook attention, grouped query heads: [B, Hq, q, d] x [B, Hkv, S, d] -> [B, Hq, q, dv]."""
    batch, heads, count, dim = query.shape
    groups = key.shape[1]
    scores = query.reshape(batch, groups, heads // groups * count, dim) @ key.transpose(-1, -2)
    scores = scores.view(batch, heads, count, key.shape[2]) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sink_logits is not None:
        extra = sink_logits.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, count, 1)
        weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights.reshape(batch, groups, heads // groups * count, key.shape[2]) @ value
    return out.view(batch, heads, count, value.shape[-1])


def stock_scale(query: Tensor, scaling: float | None) -> float:
    return float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
