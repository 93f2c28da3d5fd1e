"""How long a cache takes to be written to a file, and to come back: save, load, load as a memory map.

    python benchmarks/snapshot.py                         32 layers, 8 KV heads, d = 128, 32,768 tokens, tq4
    python benchmarks/snapshot.py --tokens 8192 --codec tcq3/tcq2 --folder /dev/shm

The file is in the page cache of the system when it is loaded, but for the line "cold", before which the system is asked
to drop it. Everything is verified in each of them, and what comes back is compared: the bytes of every page, and the
attention of a token over the last layer, which must be equal to the bit. Random keys and values; no model is run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import kvpack


def filled(config: LlamaConfig, codec: str, tokens: int) -> kvpack.Cache:
    """A cache that holds the same random tokens in every layer."""
    key, _, value = codec.partition("/")
    cache = kvpack.Cache(config, key=key, value=value or None)
    torch.manual_seed(0)
    new = [torch.randn(1, config.num_key_value_heads, tokens, config.head_dim, dtype=torch.bfloat16) for _ in range(2)]
    for layer in range(config.num_hidden_layers):
        cache.update(*new, layer)
    return cache


def attention(cache: kvpack.Cache, config: LlamaConfig) -> torch.Tensor:
    """Of one more token, in the last layer."""
    torch.manual_seed(1)
    query, keys, values = (
        torch.randn(1, heads, 1, config.head_dim, dtype=torch.bfloat16)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    handles = cache.update(keys, values, config.num_hidden_layers - 1)
    return F.scaled_dot_product_attention(query, *handles, enable_gqa=True)


def same(a: kvpack.Cache, b: kvpack.Cache) -> bool:
    """Whether all pages have the same bytes."""
    return all(
        torch.equal(x, y)
        for one, other in zip(a.packed_layers, b.packed_layers, strict=True)
        for x, y in zip(one.table.contents()[0], other.table.contents()[0], strict=True)
    )


def drop(path: Path) -> None:
    """Ask the system to forget what it holds of a file."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(run: Callable[[], Any], rounds: int, before: Callable[[], None] | None = None) -> list[float]:
    """Time of each round; what a round makes is gone before the next begins."""
    times = []
    for _ in range(rounds):
        if before is not None:
            before()
        begin = time.perf_counter()
        made = run()
        times.append(time.perf_counter() - begin)
        del made
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--codec", default="tq4", help="key codec, or key/value codecs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the file is written (default: the system's temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("error")
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        num_attention_heads=4 * args.kv_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        hidden_size=4 * args.kv_heads * args.head_dim,
    )
    cache = filled(config, args.codec, args.tokens)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "cache.kvpack"
        rows = {"save, to the disk": seconds(lambda: cache.save(path), min(args.rounds, 3))}
        rows["load"] = seconds(lambda: kvpack.Cache.load(path, config), args.rounds)
        rows["load, mmap=True"] = seconds(lambda: kvpack.Cache.load(path, config, mmap=True), args.rounds)
        rows["load, cold"] = seconds(lambda: kvpack.Cache.load(path, config), 3, lambda: drop(path))
        size = path.stat().st_size
        wanted = attention(cache.fork(1)[0], config)
        for mmap in (False, True):
            loaded = kvpack.Cache.load(path, config, mmap=mmap)
            if not (same(cache, loaded) and torch.equal(attention(loaded, config), wanted)):
                raise SystemExit(f"load(mmap={mmap}) does not give the cache that was saved")
    print(f"{cache!r}\nfile: {size} bytes, {args.threads} threads\n")
    print("| | seconds, median [min, max] | GB/s |\n|---|---|---|")
    for name, times in rows.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} [{min(times):.3f}, {max(times):.3f}] | {size / median / 1e9:.2f} |")


if __name__ == "__main__":
    main()
