"""Decode speed of a model under several caches: paired, interleaved, each from the same context.

The stock cache is prefilled once; every other cache is filled from its dense keys and values. Then, round by
round, every cache decodes a few tokens, in rotating order, so that a slow moment of the machine hits all of
them. The ratio is formed within a round: it is what can be trusted; the rates themselves drift with the
machine.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cachespec import CacheSpec, dense_bytes, dense_cache, fill
from .metrics import jsonable
from .modes import BLOCK, Progress, forward, no_progress
from .peers import Peer, fill_peer, held_bytes

STOCK = "DynamicCache"


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])


@dataclass(frozen=True)
class DecodeSpeed:
    """tokens_per_second: of single-token calls. ratio: over the stock cache in the same round (stock: 1).

    context: tokens held when the first round begins; cache_bytes: everything the cache held then.
    """

    label: str
    context: int
    dtype: str
    tokens_per_second: Spread
    ratio: Spread
    cache_bytes: int
    compression: float
    rounds: int
    tokens_per_round: int

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = jsonable(self)
        return out


@torch.no_grad()
def prefill(model: Any, ids: Tensor, *, progress: Progress = no_progress, chunk: int = 2 * BLOCK) -> Any:
    """A stock cache holding all of `ids` [length] but the last token, which is the first to be decoded."""
    cache = dense_cache(model.config)
    length = len(ids) - 1
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        forward(model, ids[begin:end], cache, keep=1)
        progress("prefill", end, length)
    return cache


@torch.no_grad()
def decode_speed(
    model: Any,
    context: Any,
    caches: Sequence[Any],
    token: int,
    *,
    rounds: int = 8,
    tokens_per_round: int = 4,
    progress: Progress = no_progress,
) -> list[DecodeSpeed]:
    """The stock cache first, then `caches` (see CacheSpec.of; or a Peer), decoding from the tokens in `context`.

    context: a stock cache as `prefill` makes it; it is not changed. token: the id that is fed first; after it
    every cache is fed the token it finds most likely. One more round, unmeasured, warms up.
    """
    start, stock_bytes = int(context.get_seq_length()), dense_bytes(context)
    held, labels, sizes = [copy.deepcopy(context)], [STOCK], [stock_bytes]
    for cache in caches:
        if isinstance(cache, Peer):
            held.append(fill_peer(cache, context, model.config, start, 1))
            labels.append(cache.name)
            sizes.append(held_bytes(held[-1]))
        else:
            spec = CacheSpec.of(cache)
            held.append(fill(spec, context, model.config))
            labels.append(spec.label)
            sizes.append(int(held[-1].nbytes))
    feeds = [torch.tensor([token]) for _ in held]
    times: list[list[float]] = [[] for _ in held]
    for number in range(rounds + 1):
        for i in range(len(held)):
            at = (i + number) % len(held)
            began = time.perf_counter()
            for _ in range(tokens_per_round):
                feeds[at] = forward(model, feeds[at], held[at], keep=1)[-1].argmax(-1, keepdim=True)
            if number:
                times[at].append((time.perf_counter() - began) / tokens_per_round)
        progress("decode speed", number, rounds)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [
        DecodeSpeed(
            label=label,
            context=start,
            dtype=dtype,
            tokens_per_second=Spread.of([1 / t for t in mine]),
            ratio=Spread.of([stock / t for stock, t in zip(times[0], mine, strict=True)]),
            cache_bytes=size,
            compression=stock_bytes / size,
            rounds=rounds,
            tokens_per_round=tokens_per_round,
        )
        for label, mine, size in zip(labels, times, sizes, strict=True)
    ]


@torch.no_grad()
def continue_text(model: Any, ids: Tensor, cache: Any, tokens: int, eos: int | None = None) -> list[int]:
    """Greedy continuation through the model's own `generate`; `cache` holds all of `ids` [length] but the
    last.
    """
    device = next(model.parameters()).device
    out = model.generate(
        input_ids=ids[None].to(device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
    )
    return [int(i) for i in out[0, len(ids) :]]
