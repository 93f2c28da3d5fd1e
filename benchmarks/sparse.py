"""What the fused kernel leaves out: int8 precision against "high", and values of negligible tiles left unread.

    python benchmarks/sparse.py                              the default model at 4096 and 8000 tokens, a few minutes
    python benchmarks/sparse.py --contexts 4096 --codec tcq3 --shares 1e-3 --doc ""

Caches of one codec, filled with the same context, are fed the same text token by token (mode stepwise). KLD is from
the stock cache, and paired with that of the first row. After that, torch's profiler takes the time of the attention
operator in rounds of some more tokens, in rotating order; its ratios are formed within a round.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack import isa
from kvpack.eval import load_model, load_text, metrics
from kvpack.eval.cachespec import CacheSpec, fill
from kvpack.eval.modes import forward, log_probs
from kvpack.eval.quality_report import write_doc
from kvpack.eval.speed import Spread, prefill
from kvpack.eval.texts import cut_windows

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = "kvpack::attend_counting"
# A share that leaves nothing unread, so that all rows run the same operator.
NOTHING = 1e-30
ROUNDS, ROUND_TOKENS = 4, 4


@dataclass
class Row:
    """One cache, over all windows: divergence of every token, times of attention, and counts of tiles."""

    label: str
    spec: CacheSpec
    kld: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    met: int = 0
    unread: int = 0


@torch.no_grad()
def run(model: Any, context: Any, ids: torch.Tensor, rows: list[Row]) -> None:
    """Feed the tokens of `ids` to the stock cache and to every row's, which all begin with the context."""
    caches = [fill(row.spec, context, model.config) for row in rows]
    for step in range(len(ids)):
        feed = ids[step : step + 1]
        exact = log_probs(forward(model, feed, context, keep=1)[-1])
        for row, cache in zip(rows, caches, strict=True):
            logits = forward(model, feed, cache, keep=1)[-1]
            row.kld.append(float((exact.exp() * (exact - log_probs(logits))).sum()))
    for row, cache in zip(rows, caches, strict=True):
        stats = [layer for layer in cache.stats() if layer.packed]
        if not all(layer.fused_calls == len(ids) and layer.packed_tokens_read for layer in stats):
            raise RuntimeError(f"{row.label}: not every call read packed tokens in the fused kernel")
        row.met += sum(layer.value_tiles_met for layer in stats)
        row.unread += sum(layer.value_tiles_unread for layer in stats)
    for number in range(ROUNDS):
        for i in range(len(rows)):
            at = (i + number) % len(rows)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for step in range(ROUND_TOKENS):
                    forward(model, ids[step : step + 1], caches[at], keep=1)
            found = (one.cpu_time_total for one in profile.key_averages() if one.key == ATTENTION)
            rows[at].attention.append(sum(found))


def table(rows: list[Row], windows: list[int]) -> str:
    """One table of Markdown. windows: the window of every token."""
    numbers = np.array(windows)
    groups = metrics.clusters(numbers, numbers)
    base_kld, base_time = np.array(rows[0].kld), np.array(rows[0].attention)
    lines = ["| | KLD | of the first row's | speed of attention | values unread |", "|---|---|---|---|---|"]
    for row in rows:
        kld = np.array(row.kld)
        mean, ratio = metrics.mean_interval(kld, groups), metrics.ratio_interval(kld, base_kld, groups)
        speed = Spread.of([float(x) for x in base_time / np.array(row.attention)])
        unread = f"{row.unread / row.met:.1%} of tiles" if row.met else "-"
        lines.append(
            f"| {row.label} | {mean.value:.5f} ± {mean.half:.5f} | {ratio.value:.4f} ± {ratio.half:.4f} "
            f"| {speed.median:.3f}x [{speed.low:.2f}, {speed.high:.2f}] | {unread} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="default")
    add("--text", default="wikitext-2")
    add("--codec", default="tq4", help="CODEC or KEY/VALUE")
    add("--contexts", default="4096,8000")
    add("--shares", default="2.5e-4,1e-3,1e-2", help="values of sparse_values")
    add("--windows", type=int, default=5)
    add("--tokens", type=int, default=64, help="scored per window")
    add("--threads", type=int, default=1)
    add("--doc", default=str(ROOT / "docs/sparse.md"), help="written between its markers; empty for none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    parts = [
        f"{loaded.label}, {options.codec}, {options.text}, {options.windows} windows with {options.tokens} scored "
        f"tokens each, mode stepwise; threads: {options.threads}, ISA {isa.active()}."
    ]
    for length in (int(x) for x in options.contexts.split(",")):
        base = CacheSpec.parse(options.codec, sparse_values=NOTHING)
        rows = [Row("default", base), Row('precision="high"', replace(base, precision="high"))]
        rows += [
            Row(f"sparse_values={share}", replace(base, sparse_values=float(share)))
            for share in options.shares.split(",")
        ]
        found = cut_windows(load_text(options.text), loaded.tokenizer, length + options.tokens + 1, options.windows)
        windows: list[int] = []
        for number, ids in enumerate(found):
            # The token that prefill leaves out is the first to be fed.
            context = prefill(loaded.model, ids[: length + 1])
            run(loaded.model, context, ids[length : length + options.tokens], rows)
            windows += [number] * options.tokens
            print(f"{length}: window {number + 1} of {len(found)}", flush=True)
        parts.append(f"**{length} tokens**\n\n{table(rows, windows)}")
        print(parts[-1] + "\n", flush=True)
    if options.doc:
        write_doc(Path(options.doc), "\n\n".join(parts))


if __name__ == "__main__":
    main()
