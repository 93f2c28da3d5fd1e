"""`kvpack bench`: attend and encode against torch, in one process, interleaved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import DebugOption, JsonOption, Reporter, codec_list, int_list, output, print_json

if TYPE_CHECKING:
    from kvpack.eval.bench import BenchRow

_WHAT = ("all", "attend", "encode")


def bench(
    codecs: Annotated[
        str, typer.Option("--codecs", "-c", help="CODEC or KEY/VALUE, separated by commas.")
    ] = "exact,q8_0,q4_0,tq4,tq4/tq3,tq3,tq2",
    contexts: Annotated[
        str, typer.Option("--contexts", help="Packed tokens, separated by commas.")
    ] = "1024,4096,16384",
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1)] = 2,
    group: Annotated[int, typer.Option("--group", min=1, help="Query heads per KV head.")] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim", "-d", help="64, 80, 96, 112, 128, 160, 192 or 256.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="Of torch's keys and values, and of the query.")] = "bfloat16",
    precision: Annotated[str, typer.Option("--precision", help="default or high.")] = "default",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="torch's threads [default: as torch]")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 10,
    what: Annotated[str, typer.Option("--what", help="all, attend or encode.")] = "all",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time attention over packed tokens, and encoding, against torch on the same data."""
    if what not in _WHAT:
        raise ValueError(f"--what {what!r} is not one of {', '.join(_WHAT)}")
    if precision not in ("default", "high"):
        raise ValueError(f"--precision {precision!r} is not one of default, high")
    names, sizes = codec_list(codecs), int_list(contexts, "context")
    if 0 in sizes:
        raise ValueError("a context of 0 tokens cannot be timed: at least 1")
    import torch

    from kvpack import ops
    from kvpack.eval import CacheSpec
    from kvpack.eval import bench as benches

    for name in names:
        CacheSpec.parse(name)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[BenchRow] = []
    try:
        with Reporter() as report:
            for context in sizes:
                shape = benches.BenchShape(context, kv_heads, group, head_dim, batch, dtype)
                if what != "encode":
                    rows += benches.bench_attend(
                        names, shape, rounds=rounds, precision=precision == "high", progress=report.progress
                    )
                if what != "attend":
                    rows += benches.bench_encode(names, shape, rounds=rounds, progress=report.progress)
    finally:
        torch.set_num_threads(before)
    if json:
        print_json({"native": ops.native, "rows": rows})
        return
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{kv_heads} KV heads x {group}, d={head_dim}, batch {batch}, {dtype}, "
        f"{first.threads} threads, precision {precision}" + ("" if ops.native else "; NATIVE OPERATORS MISSING"),
        caption="median of rounds [10th .. 90th percentile]; against torch: its time over this one's, "
        "in the same round",
    )
    for name in ("what", "tokens", "codec", "us per call", "GB/s read", "against torch"):
        table.add_column(name, justify="left" if name in ("what", "codec") else "right")
    for row in rows:
        us, ratio = row.microseconds, row.ratio
        table.add_row(
            row.what,
            str(row.context),
            f"torch {row.against}" if row.codec == benches.TORCH else row.codec,
            f"{us.median:.0f} [{us.low:.0f} .. {us.high:.0f}]",
            f"{row.gigabytes_per_second:.1f}",
            f"{ratio.median:.2f}x [{ratio.low:.2f} .. {ratio.high:.2f}]",
            end_section=row.codec == names[-1],
        )
    output().print(table)
