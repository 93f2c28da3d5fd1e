"""How long a cache takes to be written to a file, and to come back: save, load, load as a memory map.

    python benchmarks/snapshot.py                         32 layers, 8 KV heads, d = 128, 32,768 tokens, tq4
    python benchmarks/snapshot.py --tokens 8192 --codec tcq3/tcq2 --folder /dev/shm

Each load is the first of a new process, after its imports. The file is in the page cache of the system, but for the
line "cold", before which the system is asked to drop it. Everything is verified in each of them. What comes back is
compared: the bytes of every page, and the attention of a token over the last layer, which must be equal to the bit.
Keys and values are random; no model is run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
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


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """How long it takes, and the time that all threads work on it."""
    began = time.perf_counter(), time.process_time()
    made = run()
    took = time.perf_counter() - began[0], time.process_time() - began[1]
    del made  # later: to let go of memory is no part of it
    return took


def load_in_a_new_process(path: Path, args: argparse.Namespace, mmap: bool) -> tuple[float, float]:
    """`seconds` of its first load there."""
    options = [
        f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("layers", "kv-heads", "head-dim", "threads")
    ]
    command = [sys.executable, __file__, *options, f"--child={'map' if mmap else 'read'}", f"--folder={path}"]
    wall, work = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(wall), float(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--codec", default="tq4", help="key codec, or key/value codecs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=("read", "map"), help=argparse.SUPPRESS)
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
    if args.child:
        kvpack.Cache(config)  # what is imported when it is first needed
        print(*seconds(lambda: kvpack.Cache.load(args.folder, config, mmap=args.child == "map")))
        return
    cache = filled(config, args.codec, args.tokens)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "cache.kvpack"
        names = ("save, to the disk", "load", "load, mmap=True", "load, cold")
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            rows["save, to the disk"].append(seconds(lambda: cache.save(path)))
            rows["load"].append(load_in_a_new_process(path, args, mmap=False))
            rows["load, mmap=True"].append(load_in_a_new_process(path, args, mmap=True))
            drop(path)
            rows["load, cold"].append(load_in_a_new_process(path, args, mmap=False))
        size = path.stat().st_size
        wanted = attention(cache.fork(1)[0], config)
        for mmap in (False, True):
            loaded = kvpack.Cache.load(path, config, mmap=mmap)
            if not (same(cache, loaded) and torch.equal(attention(loaded, config), wanted)):
                raise SystemExit(f"load(mmap={mmap}) does not give the cache that was saved")
    print(f"{cache!r}\nfile: {size} bytes, {args.threads} threads\n")
    print("| | seconds, median [min, max] | CPU seconds of all threads | GB/s |\n|---|---|---|---|")
    for name, pairs in rows.items():
        times, work = zip(*pairs, strict=True)
        median = statistics.median(times)
        spread = f"{median:.2f} [{min(times):.2f}, {max(times):.2f}]"
        print(f"| {name} | {spread} | {statistics.median(work):.2f} | {size / median / 1e9:.1f} |")


if __name__ == "__main__":
    main()
