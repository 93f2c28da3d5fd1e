"""What encoding costs a prompt: time to the first token, and peak memory, beside DynamicCache.

    python benchmarks/prefill.py [--length 4096] [--codecs tq4,tcq4] [--rounds 5]

The prompt goes through the model in one call, as ``generate`` sends it. Rounds alternate between all caches, and the
ratio is formed within a round; printed are medians with the 10th and 90th percentile.

Memory is the highest resident size of the process during the call (Linux: VmHWM) above what it was before. It may be
that of a call without a cache, plus the dense K and V of the call, plus the packed cache: the last column is how much
of that was needed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import torch

from kvpack import isa
from kvpack.eval import load_model, load_text
from kvpack.eval.cachespec import CacheSpec, dense_bytes, dense_cache
from kvpack.eval.modes import forward
from kvpack.eval.speed import STOCK, Spread
from kvpack.eval.texts import DEFAULT_TEXT, cut_windows

NONE = "no cache"


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> int:
    """Gives freed memory back to the system, begins a new peak, and returns the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, spec: CacheSpec | None, dense: bool) -> tuple[float, int, int]:
    """Seconds to the first logits, bytes at the peak above the start, bytes of the cache."""
    cache = spec.build(model.config) if spec is not None else dense_cache(model.config) if dense else None
    before = forget_peak()
    began = time.perf_counter()
    if cache is None:
        model(ids[None], use_cache=False, logits_to_keep=1)
    else:
        forward(model, ids, cache, keep=1)
    seconds = time.perf_counter() - began
    size = 0 if cache is None else int(cache.nbytes) if spec is not None else dense_bytes(cache)
    return seconds, resident("VmHWM") - before, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", default=DEFAULT_TEXT)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--codecs", default="q8_0,q4_0,tq4,tq3,tq2,tcq4,tcq3,tcq2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype=options.dtype)
    ids = cut_windows(load_text(options.text), loaded.tokenizer, options.length, 1).ids[0]
    specs = [CacheSpec.of(name) for name in options.codecs.split(",")]
    rows: list[tuple[str, CacheSpec | None, bool]] = [(STOCK, None, True), *((s.label, s, False) for s in specs)]
    rows.append((NONE, None, False))
    found: dict[str, list[tuple[float, int, int]]] = {name: [] for name, _, _ in rows}
    for number in range(options.rounds + 1):
        for i in range(len(rows)):
            name, spec, dense = rows[(i + number) % len(rows)]
            result = run(loaded.model, ids, spec, dense)
            if number:
                found[name].append(result)
    peak = {name: max(one[1] for one in each) for name, each in found.items()}
    dense_size = found[STOCK][0][2]
    print(f"{loaded.label}, {len(ids)} tokens in one call, {torch.get_num_threads()} threads, "
          f"ISA {isa.active()}, {options.rounds} rounds\n")  # fmt: skip
    print("| cache | first token s | x DynamicCache | cache MB | peak MB | of what it may be |")
    print("|---|---|---|---|---|---|")
    for name, _, _ in rows:
        seconds = Spread.of([one[0] for one in found[name]])
        ratio = Spread.of([mine[0] / stock[0] for mine, stock in zip(found[name], found[STOCK], strict=True)])
        size = found[name][0][2]
        allowed = peak[NONE] + dense_size + size
        share = f"{peak[name] / allowed:.2f}" if name not in (STOCK, NONE) else "-"
        print(f"| {name} | {seconds.median:.2f} [{seconds.low:.2f}, {seconds.high:.2f}] "
              f"| {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] "
              f"| {size / 1e6:.1f} | {peak[name] / 1e6:.0f} | {share} |")  # fmt: skip


if __name__ == "__main__":
    main()
