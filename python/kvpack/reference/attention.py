"""Attention over decoded tokens in float64, and the position of each stored token.

The tokens of a row are stored in three parts, always in this order ("stored order"):

    sinks [S]      exact, the row's first real tokens
    packed [P]     decoded from tiles, oldest first            } together:
    exact [E]      the window and then the call's own tokens   } the stream

Masks, in contrast, have one column per *position*. A left-padded row has its sinks after its padding:

    position   0 ... pad-1                 sink_start ... sink_start+S-1
               stream 0 ...  (padding)     sinks                          rest of the stream
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["attend", "positions", "sink_start"]

F64 = NDArray[np.float64]
Pair = tuple[NDArray[Any], NDArray[Any]]


def sink_start(pad: int, first_call: int, sinks: int) -> int:
    """The position of a row's first sink: after `pad` tokens of left padding, but so that all `sinks` lie
    inside the first call, which had `first_call` tokens."""
    return min(pad, max(0, first_call - sinks))


def positions(
    sinks: int, packed: int, exact: int, pad: int = 0, sink_start: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where the stored tokens of a row sit in its sequence.

    Returns, for each token in stored order, its position, int64 [sinks + packed + exact] (a permutation of
    the sequence), and whether it is real, bool of the same shape: positions below `pad` are padding, never
    attended to.
    Token i of the stream sits at i if i < sink_start, else at i + sinks; sink j sits at sink_start + j.
    ValueError if the stream is too short to reach the sinks.
    """
    stream = np.arange(packed + exact, dtype=np.int64)
    if sinks and not 0 <= sink_start <= len(stream):
        raise ValueError(f"sink_start {sink_start} lies outside a stream of {len(stream)} tokens")
    where = np.concatenate(
        (sink_start + np.arange(sinks, dtype=np.int64), np.where(stream < sink_start, stream, stream + sinks))
    )
    return where, where >= pad


def attend(
    query: NDArray[Any],
    *,
    scale: float,
    sinks: Pair | None = None,
    packed: Pair | None = None,
    exact: Pair | None = None,
    rows: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    sink_logits: NDArray[Any] | None = None,
) -> F64:
    """softmax(softcap(scale q K^T) + mask) V, with grouped query heads: float64 [B, Hq, q, dv].

    query: [B, Hq, q, dk]. sinks, packed, exact: (keys [B, Hkv, n, dk], values [B, Hkv, n, dv]) or None for no
    tokens; packed ones as decoded. Query head h reads KV head h // (Hq / Hkv).
    scale: multiplies q.k, before everything else. softcap c > 0: c tanh(score / c), before the mask.
    rows: int [B, 2] of (pad, sink_start); None: zeros. See `positions`.
    mask: bool (True: attend) or float (added), broadcastable to [B, Hq, q, positions]; -inf forbids.
    causal: query i sees the exact tokens with index < E - q + i + 1, and all sinks and packed tokens.
    sink_logits: [Hq], a logit per head that takes probability and has no value (gpt-oss).
    A query with nothing to attend to gives zeros. ValueError for shapes and masks that do not fit.
    """
    batch, query_heads, queries, dk = query.shape
    parts = [part for part in (sinks, packed, exact) if part is not None]
    if not parts:
        raise ValueError("no sinks, no packed and no exact tokens: give at least one of them")
    counts = [0 if part is None else part[0].shape[2] for part in (sinks, packed, exact)]
    keys = np.concatenate([part[0].astype(np.float64) for part in parts], axis=2)
    values = np.concatenate([part[1].astype(np.float64) for part in parts], axis=2)
    kv_heads, stored = keys.shape[1:3]
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads are not a multiple of {kv_heads} KV heads")

    group = query_heads // kv_heads * queries
    grouped = query.astype(np.float64).reshape(batch, kv_heads, group, dk)
    scores = scale * (grouped @ np.swapaxes(keys, -1, -2)).reshape(batch, query_heads, queries, stored)
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)

    rows = np.zeros((batch, 2), np.int64) if rows is None else rows
    placed = [positions(counts[0], counts[1], counts[2], int(pad), int(start)) for pad, start in rows]
    where = np.stack([position for position, _ in placed])  # [B, stored]
    allowed = np.stack([real for _, real in placed])[:, None, None, :]
    if causal:
        index = np.arange(stored) - counts[0] - counts[1]  # among the exact tokens; negative: before them
        limit = counts[2] - queries + np.arange(queries)[:, None] + 1
        allowed = allowed & ((index < 0) | (index < limit))
    if mask is not None:
        try:
            columns = np.broadcast_to(mask, (batch, query_heads, queries, stored))
        except ValueError:
            raise ValueError(
                f"mask of shape {mask.shape} does not fit [{batch}, {query_heads}, {queries}, {stored}]"
            ) from None
        columns = np.take_along_axis(columns, where[:, None, None, :], axis=-1)
        if mask.dtype == np.bool_:
            allowed = allowed & columns
        elif np.issubdtype(mask.dtype, np.floating):
            scores = scores + columns.astype(np.float64)
        else:
            raise ValueError(f"mask is {mask.dtype}; it may be bool (True: attend) or float (added)")

    scores = np.where(allowed, scores, -np.inf)
    sink = np.full(query_heads, -np.inf) if sink_logits is None else sink_logits.astype(np.float64)
    sink = sink[:, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(top == -np.inf, 0.0, top)
    weights: F64 = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - top)
    summed: F64 = weights.reshape(batch, kv_heads, group, stored) @ values
    summed = summed.reshape(batch, query_heads, queries, values.shape[-1])
    out: F64 = np.divide(summed, total, out=np.zeros_like(summed), where=total > 0)
    return out
