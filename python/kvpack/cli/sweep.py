"""`kvpack sweep`: codecs x windows, a table and a Pareto picture; resumable, and side by side on Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    ChunkOption,
    CountOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    ModeOption,
    PromptOption,
    Reporter,
    SinksOption,
    SkipOption,
    TextOption,
    codec_list,
    int_list,
    kld,
    number,
    output,
    percent,
    print_json,
)

if TYPE_CHECKING:
    from kvpack.eval import RayFarm
    from kvpack.eval.results import Divergence


def sweep(
    codecs: Annotated[
        str, typer.Option("--codecs", "-c", help="CODEC, KEY/VALUE, preset or policy.json, separated by commas.")
    ] = "q8_0,q4_0,tq4,tq4/tq3,tq3,tq2",
    windows: Annotated[str, typer.Option("--windows", help="Window sizes, separated by commas.")] = "0,128",
    model: ModelOption = "default",
    text: TextOption = "topics",
    mode: ModeOption = "emulated",
    sinks: SinksOption = 4,
    length: LengthOption = 1024,
    count: CountOption = 8,
    prompt: PromptOption = 0,
    skip: SkipOption = None,
    chunk: ChunkOption = None,
    dtype: DtypeOption = "float32",
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for rows/, a file each, and pareto.png.")] = Path(
        "kvpack-sweep"
    ),
    ray: Annotated[
        bool, typer.Option("--ray", help="Side by side, on the Ray cluster at RAY_ADDRESS or on this machine.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="With --ray: processes, each with its model [default: all CPUs]."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="With --ray: threads of each [1].")] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure every codec with every window. Rows are written as they finish; a rerun skips finished ones."""
    from kvpack import eval as measure
    from kvpack.eval.cachespec import full_layers, head_size
    from kvpack.eval.modes import check_mode

    check_mode(mode, chunk)
    for option, wanted in (("--workers", workers), ("--threads", threads)):
        if wanted is not None and not ray:
            raise ValueError(f"{option} {wanted} is for sweeps with --ray only")
    specs = measure.grid(codec_list(codecs), int_list(windows, "window"), sinks=sinks)
    source = measure.load_text(text)
    taken: set[int] = set()
    with Reporter() as report, _farm(ray, workers, threads) as farm:
        loaded = measure.load_model(model, dtype, say=report.say)
        cut = measure.cut_windows(source, loaded.tokenizer, length, count)

        def on_row(row: Divergence, known: bool) -> None:
            if known:
                taken.add(id(row))
            state = "taken over" if known else f"{row.seconds:.0f} s"
            report.say(f"{row.label}, window {row.window}: KLD {kld(row.kld)} ({state})")

        rows = measure.sweep(
            loaded,
            cut,
            specs,
            mode,
            prompt=prompt,
            chunk=chunk,
            skip=skip,
            path=out / "rows",
            farm=farm,
            progress=report.progress,
            on_row=on_row,
        )
    head_dim = head_size(loaded.model.config)
    packed = full_layers(loaded.model.config)
    bits = [spec.bits(head_dim, layers=packed) for spec in specs]
    picture = out / "pareto.png"
    drawn = draw_pareto(rows, bits, picture)
    if json:
        said = [{**row.to_json(), "bits": b, "taken_over": id(row) in taken} for row, b in zip(rows, bits, strict=True)]
        print_json({"rows": said, "directory": str(out / "rows"), "picture": str(picture) if drawn else None})
        return
    console = output()
    console.print(sweep_table(rows, bits))
    console.print(f"rows: {out / 'rows'}" + (f"   picture: {picture}" if drawn else ""), markup=False)
    if not drawn:
        console.print("no picture: pip install matplotlib")


@contextmanager
def _farm(ray: bool, workers: int | None, threads: int | None) -> Iterator[RayFarm | None]:
    """Where rows are measured side by side; None: here, one after the other."""
    if not ray:
        yield None
        return
    from kvpack.eval import RayFarm

    # Ray tells of dead workers on stdout, which is for results.
    with redirect_stdout(sys.stderr), RayFarm(workers, threads or 1) as farm:
        yield farm


def sweep_table(rows: list[Divergence], bits: list[float]) -> object:
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first.model}; {first.text}, {first.windows} x {first.context} tokens; mode {first.mode}; "
        f"exact PPL {number(first.ppl_exact)}",
        caption=f"95 % intervals, clustered by {first.cluster_kind}; bits of full tiles, mean of both sides; "
        f"bytes of the whole cache at {first.context - 1} tokens against DynamicCache in {first.dtype}",
    )
    for name in ("cache", "window", "bits", "smaller", "KLD", "median", "p99", "top-1 %", "PPL", "PPL ratio"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row, width in zip(rows, bits, strict=True):
        table.add_row(
            row.label,
            str(row.window),
            f"{width:.3f}",
            "-" if row.compression is None else f"{row.compression:.2f}x",
            kld(row.kld),
            kld(row.kld_median),
            kld(row.kld_p99),
            percent(row.top1),
            f"{row.ppl.value:.2f}",
            number(row.ppl_ratio, 4),
        )
    return table


def draw_pareto(rows: list[Divergence], bits: list[float], path: Path) -> bool:
    """Bits against KLD, a line per window, the Pareto front ringed. False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kvpack.eval.sweeps import pareto

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for window in sorted({row.window for row in rows}):
        at = sorted((i for i, row in enumerate(rows) if row.window == window), key=lambda i: bits[i])
        mean = [rows[i].kld.value for i in at]
        below = [max(0.0, rows[i].kld.value - max(rows[i].kld.low, 1e-12)) for i in at]
        above = [max(0.0, rows[i].kld.high - rows[i].kld.value) for i in at]
        axes.errorbar([bits[i] for i in at], mean, yerr=[below, above], marker="o", ms=4, capsize=3, lw=1,
                      label=f"window {window}")  # fmt: skip
    for i, row in enumerate(rows):
        axes.annotate(row.label, (bits[i], row.kld.value), textcoords="offset points", xytext=(5, 4), fontsize=8)
    front = pareto([(bits[i], row.kld.value) for i, row in enumerate(rows)])
    ringed = ([bits[i] for i in front], [rows[i].kld.value for i in front])
    axes.plot(*ringed, "o", ms=10, mfc="none", mec="black", label="Pareto front")
    axes.set_yscale("log")
    axes.set_xlabel("bits per value (codes, scales, all metadata)")
    axes.set_ylabel("KLD to the exact cache, nats per token")
    axes.set_title(f"{rows[0].model}\n{rows[0].text}, mode {rows[0].mode}", fontsize=9)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True
