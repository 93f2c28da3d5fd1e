"""Tokens per second of a whole model, by cache and context: DynamicCache, transformers' quantized caches, our codecs.

    python benchmarks/generate.py                    half an hour
    python benchmarks/generate.py --models default --dtypes bfloat16 --codecs tq4,tcq3 --peers none
    python benchmarks/generate.py --models random --random-contexts 16384
    python benchmarks/generate.py --models random --random-hidden 64 --random-contexts 512 --peers none

The default model at 512, 2048 and 8128 tokens, and a Llama of random weights with a head size of 128 at 16384.
Every cache decodes from the same context, round by round, in rotating order; ratios to DynamicCache are formed within
a round, and printed with their 10th and 90th percentile. A further run of each cache under torch's profiler says where
its time goes: in attention (for peers, taking tokens out of their cache is not in it), and in aten::cat, which is how
dense caches grow. The last column is what `update` and the interception of attention take per layer and step, the
operators `attend`, `append` and `encode_pages` not counted, over as many more tokens as a tile has. It is least for a
model that leaves the processor's caches to Python, such as that of the last command.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from attend import processor

from kvpack import isa, ops
from kvpack.eval import load_model, load_text
from kvpack.eval.cachespec import CacheSpec, dense_cache, fill
from kvpack.eval.models import RANDOM, random_model
from kvpack.eval.modes import forward
from kvpack.eval.peers import Peer, fill_peer, peer
from kvpack.eval.quality import available
from kvpack.eval.quality_report import write_doc
from kvpack.eval.speed import DecodeSpeed, decode_speed, prefill
from kvpack.eval.texts import DEFAULT_TEXT, cut_windows
from kvpack.hf import handle
from kvpack.hf.layer import PackedLayer

PYTHON_TOKENS = ops.TILE  # in which one tile is packed
RANDOM_SIZES = {
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
ATTENTION = ("kvpack::attend", "aten::scaled_dot_product_attention")


@torch.no_grad()
def shares(model: Any, context: Any, cache: CacheSpec | Peer | None, token: int, tokens: int) -> tuple[float, float]:
    """Parts of the time of a decode step that attention and aten::cat take."""
    config = model.config
    if cache is None:
        held = copy.deepcopy(context)
    elif isinstance(cache, Peer):
        held = fill_peer(cache, context, config, int(context.get_seq_length()), 1)
    else:
        held = fill(cache, context, config)
    feed = forward(model, torch.tensor([token]), held, keep=1)[-1].argmax(-1, keepdim=True)
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(tokens):
            feed = forward(model, feed, held, keep=1)[-1].argmax(-1, keepdim=True)
        took = time.perf_counter() - began
    found = profile.key_averages()
    attention = sum(one.cpu_time_total for one in found if one.key in ATTENTION)
    cat = sum(one.cpu_time_total for one in found if one.key == "aten::cat")
    return attention * 1e-6 / took, cat * 1e-6 / took


@torch.no_grad()
def python_microseconds(model: Any, context: Any, cache: CacheSpec, token: int, tokens: int) -> float:
    """Of kvpack's Python, and what it calls besides its own operators, per packed layer and step."""
    held = fill(cache, context, model.config)
    spent = {"all": 0.0, "operators": 0.0}

    def timed(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            out = call(*args, **options)
            spent[kind] += time.perf_counter() - began
            return out

        return run

    places: list[tuple[Any, str, str]] = [
        (PackedLayer, "update", "all"),
        (handle, "_attention", "all"),
        (ops, "_append_op", "operators"),
        (ops, "_attend_op", "operators"),
        (ops, "_encode_pages_op", "operators"),
    ]
    feed = forward(model, torch.tensor([token]), held, keep=1)[-1].argmax(-1, keepdim=True)
    stock = [(where, name, getattr(where, name)) for where, name, _ in places]
    try:
        for where, name, kind in places:
            setattr(where, name, timed(kind, getattr(where, name)))
        for _ in range(tokens):
            feed = forward(model, feed, held, keep=1)[-1].argmax(-1, keepdim=True)
    finally:
        for where, name, original in stock:
            setattr(where, name, original)
    return (spent["all"] - spent["operators"]) / tokens / len(held.packed_layers) * 1e6


def random_context(model: Any, length: int) -> Any:
    """A stock cache of random keys and values: those of random weights mean as much."""
    config, cache = model.config, dense_cache(model.config)
    size = (1, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(size).to(model.dtype) for _ in range(2)), layer)
    return cache


def line(row: DecodeSpeed, attention: float, cat: float, python: float | None) -> str:
    """One row of the table."""
    rate, ratio = row.tokens_per_second, row.ratio
    return (
        f"| {row.label} | {row.cache_bytes / 1e6:.1f} | {row.compression:.2f}x | {rate.median:.1f} "
        f"| {ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] | {attention:.0%} | {cat:.0%} "
        f"| {'-' if python is None else f'{python:.0f}'} |"
    )


def tables(name: str, dtype: str, contexts: list[int], options: argparse.Namespace) -> Iterator[str]:
    """A heading, then a table for each context."""
    if name == RANDOM:
        loaded = random_model(dtype, layers=2, hidden_size=options.random_hidden, **RANDOM_SIZES)
    else:
        loaded = load_model(name, dtype=dtype)
    names = [] if options.peers == "none" else options.peers.split(",")
    peers = available([peer(name) for name in names], print)
    caches: list[CacheSpec | Peer] = [*(CacheSpec.of(name) for name in options.codecs.split(",")), *peers]
    yield f"## {loaded.label}"
    for length in contexts:
        if loaded.random:
            context, token = random_context(loaded.model, length), 1
        else:
            ids = cut_windows(load_text(options.text), loaded.tokenizer, length + 1, 1).ids[0]
            context, token = prefill(loaded.model, ids), int(ids[-1])
        rows = decode_speed(
            loaded.model, context, caches, token, rounds=options.rounds, tokens_per_round=options.tokens
        )
        lines = [
            f"**{length} tokens**\n",
            "| cache | MB | smaller | tokens/s | x DynamicCache | attention | cat | Python us |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row, cache in zip(rows, [None, *caches], strict=True):
            attention, cat = shares(loaded.model, context, cache, token, options.tokens)
            python = None
            if isinstance(cache, CacheSpec):
                python = python_microseconds(loaded.model, context, cache, token, PYTHON_TOKENS)
            lines.append(line(row, attention, cat, python))
        yield "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default=f"default,{RANDOM}")
    add("--text", default=DEFAULT_TEXT)
    add("--contexts", default="512,2048,8128")
    add("--random-contexts", default="16384", help="of the model of random weights")
    add("--random-hidden", type=int, default=2048, help="its hidden size")
    add("--codecs", default="exact,q8_0,q4_0,tq4,tq4/tq3,tq3,tq2,tcq4,tcq3,tcq2")
    add("--peers", default="quanto int4,hqq int4,transformers fp8", help="peers, or none")
    add("--dtypes", default="float32,bfloat16")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=8)
    add("--tokens", type=int, default=4, help="tokens of a round")
    add("--doc", default="", help="a Markdown file, written between its markers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    how = f"threads: {options.threads}, ISA {isa.active()}, {options.rounds} rounds of {options.tokens} tokens."
    parts = [f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}, {how}"]
    print(parts[0] + "\n")
    for name, dtype in itertools.product(options.models.split(","), options.dtypes.split(",")):
        contexts = options.random_contexts if name == RANDOM else options.contexts
        for part in tables(name, dtype, [int(x) for x in contexts.split(",")], options):
            print(part + "\n", flush=True)
            parts.append(part)
    if options.doc:
        write_doc(Path(options.doc), "\n\n".join(parts))


if __name__ == "__main__":
    main()
