"""The speed of attention over packed tokens: every codec against torch and our own exact kernel; writes docs/speed.md.

    python benchmarks/attend.py                             a quarter of an hour
    python benchmarks/attend.py --levels avx512_vbmi,avx2   further levels that the processor has, one table each
    python benchmarks/attend.py --contexts 16384 --dims 128 --threads 1 --codecs exact,tq4,tcq3 --doc ""
    python benchmarks/attend.py --queries 2,16,128,512 --contexts 4096,16384 --dims 128 --threads 1 --rounds 5 \\
        --codecs exact,tq4,tq3,tq2,tcq4,tcq3,tcq2,q8_0,q4_0,kivi4,fp8

The last, query tokens with a mask over a packed history, goes to docs/history.md. Otherwise: decode steps of one
layer, cold: every contender walks through copies of its data that are together larger than the processor's caches.
All contenders run interleaved in one process; printed are medians and, of ratios within a round, the 10th and 90th
percentile. "torch best" is the fastest of torch's ways in that table. `exact` comes in the dtype of the run and, as
`exact@float16`, in fp16: which is the faster one depends on the processor, so that there is a column for each. Codecs
are as their names say, not centred; what a cache makes of `tq4`, keys centred by tile and values by the mean, is a
row of its own. The bandwidth is that of torch.dot over vectors of float32 of the same total size, before or after the
table, whichever is more.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from pathlib import Path

import torch

import kvpack
from kvpack import isa
from kvpack.eval import bench
from kvpack.eval.bench import GROUPED, MATMUL, TORCH, BenchRow, BenchShape, bench_attend
from kvpack.eval.quality_report import write_doc
from kvpack.spec import CACHE_CENTERS

ROOT = Path(__file__).resolve().parent.parent
STOCK = (TORCH, GROUPED, MATMUL)
#: What a cache of `tq4` keeps.
CENTRED = f"tq4:center={CACHE_CENTERS['key']}/tq4:center={CACHE_CENTERS['value']}"


def bandwidth() -> float:
    """Bytes per second that torch.dot reads, the best of some runs: what this many threads get from memory."""
    a, b = (torch.ones(bench.COLD_BYTES // 8) for _ in range(2))
    best = 0.0
    for _ in range(7):
        began = time.perf_counter()
        torch.dot(a, b)
        best = max(best, 2 * a.nbytes / (time.perf_counter() - began))
    return best


def table(rows: list[BenchRow], memory: float) -> str:
    """One table of Markdown."""
    exact = [row for row in rows if row.codec.partition("@")[0] == "exact"]
    best = min((row for row in rows if row.codec in STOCK), key=lambda row: row.microseconds.median)
    columns = "".join(f" times `{row.codec}` |" for row in exact)
    lines = [
        f"| | us a call | ns per KV head and token | GB/s | of bandwidth |{columns} times torch best |",
        "|---|---|---|---|---|---|" + len(exact) * "---|",
    ]
    for row in rows:
        took, tokens = row.microseconds.median, row.context * row.kv_heads * row.batch
        name = row.codec if row.codec in STOCK else f"`{row.codec}`"
        against = "".join(f" {one.microseconds.median / took:.2f} |" for one in exact)
        lines.append(
            f"| {name} | {took:.0f} [{row.microseconds.low:.0f}, {row.microseconds.high:.0f}] "
            f"| {1e3 * took / tokens:.1f} | {row.gigabytes_per_second:.1f} "
            f"| {row.gigabytes_per_second * 1e9 / memory:.0%} |{against} {best.microseconds.median / took:.2f} |"
        )
    return "\n".join(lines)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--codecs",
        default="",
        help="codecs, KEY/VALUE, or exact@DTYPE [default: exact@float16, every codec, and a centred one]",
    )
    add("--contexts", default="256,4096,16384,65536")
    add("--dims", default="128,64")
    add("--threads", default="1,2")
    add("--levels", default="", help="ISA levels; of those after the first, one table each [default: the active one]")
    add(
        "--dtype",
        default="bfloat16",
        help="of torch's keys and values, of `exact` and of queries; exact@DTYPE has its own",
    )
    add("--kv-heads", type=int, default=8)
    add("--group", type=int, default=4, help="query heads of a KV head")
    add("--batch", type=int, default=1)
    add("--queries", default="1", help="numbers of query tokens; with more than one, they have a mask")
    add("--rounds", type=int, default=9)
    add(
        "--doc",
        help="written between its markers; empty: none [default: speed.md or history.md in docs; other heads: none]",
    )
    options = parser.parse_args()
    queries = [int(x) for x in options.queries.split(",")]
    doc = options.doc
    if doc is None and (options.kv_heads, options.group, options.batch) != (8, 4, 1):
        doc = ""
    elif doc is None:
        doc = str(ROOT / ("docs/speed.md" if queries == [1] else "docs/history.md"))
    second = ["exact@float16"] if options.dtype != "float16" else []
    codecs = options.codecs.split(",") if options.codecs else [*second, *kvpack.codecs(), CENTRED]
    contexts, dims, threads = (
        [int(x) for x in text.split(",")] for text in (options.contexts, options.dims, options.threads)
    )
    levels = options.levels.split(",") if options.levels else [isa.active()]
    parts = [f"{processor()}, ISA {levels[0]}, torch {torch.__version__}, {options.dtype}, {options.rounds} rounds."]
    runs = [(levels[0], count, dims, contexts if count == threads[0] else contexts[-2:]) for count in threads]
    runs += [(level, threads[0], dims[:1], contexts[-2:][:1]) for level in levels[1:]]
    for level, count, sizes, lengths in runs:
        isa.use(level)
        torch.set_num_threads(count)
        for dim, context, query in itertools.product(sizes, lengths, queries):
            heads = (options.kv_heads, options.group)
            shape = BenchShape(context, *heads, dim, options.batch, options.dtype, query)
            memory = bandwidth()
            rows = bench_attend(codecs, shape, rounds=options.rounds)
            memory = max(memory, bandwidth())
            head = f"**{context} tokens, d = {dim}, threads: {count}**, bandwidth {memory / 1e9:.1f} GB/s"
            if (*heads, options.batch) != (8, 4, 1):
                head += f", {heads[0]} KV heads with {heads[1]} query heads each, batch {options.batch}"
            if level != levels[0]:
                head += f", ISA {level}"
            if query > 1:
                head = f"**{query} query tokens over** {head}"
            parts.append(f"{head}\n\n{table(rows, memory)}")
            print(parts[-1] + "\n", flush=True)
    if doc:
        write_doc(Path(doc), "\n\n".join(parts))


if __name__ == "__main__":
    main()
