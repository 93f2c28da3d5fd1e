"""The speed table of README: attend per codec against torch and against our own exact kernel, cold caches.

    python benchmarks/attend.py [--quick] [--threads N]

Everything runs interleaved in one process; printed are medians with the 10th and 90th percentile of the per-round
ratios. The contenders are those of ``kvpack bench``.
"""

from __future__ import annotations

import argparse

import torch

from kvpack import isa
from kvpack.eval.bench import BenchRow, BenchShape, bench_attend

CODECS = ["exact", "q8_0", "q4_0", "tq4", "tq4/tq3", "tq3", "tq2"]


def line(row: BenchRow, exact: BenchRow) -> str:
    """One row of the table."""
    per_token = row.microseconds.median * 1e3 / (row.context * row.kv_heads * row.batch)
    against_exact = exact.microseconds.median / row.microseconds.median
    ratio = row.ratio
    return (
        f"| {row.context} | {row.head_dim} | {row.codec} | {per_token:.1f} | {ratio.median:.1f} "
        f"[{ratio.low:.1f}, {ratio.high:.1f}] | {against_exact:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = (
        [BenchShape(context=1024)]
        if arguments.quick
        else [
            BenchShape(context=context, head_dim=head_dim) for head_dim in (128, 64) for context in (1024, 4096, 16384)
        ]
    )
    print(f"ISA {isa.active()}, {arguments.threads} thread(s), 8 KV heads x 4 query heads, torch in bfloat16\n")
    print("| tokens | d | codec | ns per KV head and token | times torch SDPA bf16 | times our exact |")
    print("|---|---|---|---|---|---|")
    for shape in shapes:
        rows = bench_attend(CODECS, shape, rounds=3 if arguments.quick else 9)
        exact = next(row for row in rows if row.codec == "exact")
        for row in rows:
            print(line(row, exact), flush=True)


if __name__ == "__main__":
    main()
