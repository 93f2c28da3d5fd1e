"""What encoding costs a prompt: time to the first token, and peak memory, beside DynamicCache.

    python benchmarks/prefill.py [--length 4096] [--codecs tq4,tcq4] [--rounds 5]

The prompt goes through the model in one call, as ``generate`` sends it. Rounds alternate between all caches, and the
ratio is formed within a round; printed are medians with the 10th and 90th percentile.

Memory is what torch's allocator had handed out and not taken back, at the highest, in a further run of each cache
under its profiler (resident sizes of a process say more about malloc). Above a run without a cache there may be the
dense K and V of the call and the packed cache: the last column is how much of that was needed.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch

from kvpack import isa
from kvpack.eval import load_model, load_text
from kvpack.eval.cachespec import CacheSpec, dense_bytes, dense_cache
from kvpack.eval.modes import forward
from kvpack.eval.speed import STOCK, Spread
from kvpack.eval.texts import DEFAULT_TEXT, cut_windows

NONE = "no cache"


def build(model: Any, spec: CacheSpec | None, dense: bool) -> Any:
    """A packed cache, DynamicCache, or none."""
    return spec.build(model.config) if spec is not None else dense_cache(model.config) if dense else None


def prompt(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """The prompt in one call, to its last logits."""
    if cache is None:
        model(ids[None], use_cache=False, logits_to_keep=1)
    else:
        forward(model, ids, cache, keep=1)


@torch.no_grad()
def seconds(model: Any, ids: torch.Tensor, spec: CacheSpec | None, dense: bool) -> float:
    """To the first logits."""
    cache = build(model, spec, dense)
    gc.collect()
    began = time.perf_counter()
    prompt(model, ids, cache)
    return time.perf_counter() - began


@torch.no_grad()
def memory(model: Any, ids: torch.Tensor, spec: CacheSpec | None, dense: bool) -> tuple[int, int]:
    """Bytes at the peak of the call, and of the cache."""
    cache = build(model, spec, dense)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        prompt(model, ids, cache)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, 0 if cache is None else int(cache.nbytes) if spec is not None else dense_bytes(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", default=DEFAULT_TEXT)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--codecs", default="tq4,q4_0,kivi4,tcq4,tcq2")
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
    found: dict[str, list[float]] = {name: [] for name, _, _ in rows}
    for number in range(options.rounds + 1):
        for i in range(len(rows)):
            name, spec, dense = rows[(i + number) % len(rows)]
            took = seconds(loaded.model, ids, spec, dense)
            if number:
                found[name].append(took)
    bytes_of = {name: memory(loaded.model, ids, spec, dense) for name, spec, dense in rows}
    print(f"{loaded.label}, {len(ids)} tokens in one call, {torch.get_num_threads()} threads, "
          f"ISA {isa.active()}, {options.rounds} rounds\n")  # fmt: skip
    print("| cache | first token s | x DynamicCache | cache MB | peak MB | of what it may be |")
    print("|---|---|---|---|---|---|")
    for name, _, _ in rows:
        took_all = Spread.of(found[name])
        ratio = Spread.of([mine / stock for mine, stock in zip(found[name], found[STOCK], strict=True)])
        peak, size = bytes_of[name]
        above, allowed = peak - bytes_of[NONE][0], bytes_of[STOCK][1] + size
        share = f"{above / allowed:.2f}" if name not in (STOCK, NONE) else "-"
        print(f"| {name} | {took_all.median:.2f} [{took_all.low:.2f}, {took_all.high:.2f}] "
              f"| {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] "
              f"| {size / 1e6:.1f} | {peak / 1e6:.0f} | {share} |")  # fmt: skip


if __name__ == "__main__":
    main()
