"""`kvpack demo`: an unmodified model on packed caches: what it writes, what it costs, what it gains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    DebugOption,
    JsonOption,
    ModelOption,
    Reporter,
    TextOption,
    kld,
    number,
    output,
    percent,
    print_json,
    size,
)

if TYPE_CHECKING:
    from rich.console import Console

    from kvpack.eval.models import LoadedModel
    from kvpack.eval.showcase import Showcase
    from kvpack.eval.speed import DecodeSpeed


def demo(
    model: ModelOption = "default",
    text: TextOption = "topics",
    prompt: Annotated[int, typer.Option("--prompt", min=64, help="Tokens of the long prompt.")] = 4096,
    dtype: Annotated[
        str, typer.Option("--dtype", help="To measure speed in: auto, float32, bfloat16, float16.")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that it runs, its figures say little.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Generate with packed caches, and show bytes, speed and quality beside the stock cache."""
    from dataclasses import replace

    from kvpack.eval import load_text
    from kvpack.eval.showcase import QUICK, Sizes, showcase

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    sizes = replace(QUICK, prompt=min(prompt, QUICK.prompt)) if quick else replace(Sizes(), prompt=prompt)
    source = load_text(text)
    with Reporter() as report:
        loaded = _load(model, quick, report)
        result = showcase(loaded, source, sizes, dtype=dtype, say=report.say, progress=report.progress)
    if json:
        print_json(result)
    else:
        _show(result, output())


def _load(model: str, quick: bool, report: Reporter) -> LoadedModel:
    """The model; where the default one is not to be had, a random one of its shape, and says so."""
    from kvpack.eval import ModelUnavailableError, load_model, random_model

    try:
        return load_model(model, say=report.say)
    except ModelUnavailableError as error:
        if model != "default":
            raise
        report.say(f"{error}")
        report.say("using RANDOM WEIGHTS instead: bytes and speed are real, text and quality mean nothing")
        if quick:
            return random_model()
        return random_model(
            layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
        )


def _show(result: Showcase, console: Console) -> None:
    from rich.markup import escape

    q = result.quality[0]
    warning = "  [bold red]RANDOM WEIGHTS: text and quality mean nothing[/]" if result.random else ""
    console.print(f"\n[bold]Model[/]  {escape(result.model)}{warning}")
    console.print(f"\n[bold]Text[/]   after {result.held[0].context + 1} tokens of prompt: {escape(result.question)}\n")
    for item in result.written:
        same = "" if item is result.written[0] else f"  [dim](first {item.same} of {item.tokens} tokens as exact)[/]"
        console.print(f"[bold]{item.label}[/]{same}")
        shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in item.text)
        console.print(f"  {escape(shown)}\n")
    console.print(_table(result))
    stock = result.held[0]
    console.print(
        f"bytes: all the cache holds after {stock.context} tokens of {stock.dtype}, window ({q.window}) and sinks "
        f"({q.sinks}) included. tokens/s: decoding from there with {result.threads} threads, paired rounds, median "
        "[10th .. 90th percentile of the ratio]; a ratio is against DynamicCache in the same dtype."
    )
    console.print(
        f"Quality in float32, mode {q.mode}: {q.windows} windows of {q.context} tokens of {escape(q.text)}, "
        f"first call {q.prompt}, {q.tokens} tokens scored; ± half of a 95 % interval, clustered by {q.cluster_kind}."
    )
    a, b = result.anchor, result.anchored
    console.print(
        f"Anchor: {a.label} token by token through the fused kernel (mode {a.mode}), {a.tokens} tokens: "
        f"KLD {kld(a.kld)}, top-1 {percent(a.top1)} %; the same tokens {b.mode}: KLD {kld(b.kld)}, "
        f"top-1 {percent(b.top1)} %."
    )
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    console.print(f"[dim]{spent}; in all {sum(result.seconds.values()):.0f} s[/]")


def _table(result: Showcase) -> Any:
    from rich.table import Table

    table = Table()
    quality = result.quality
    mode = quality[0].mode
    table.add_column("cache")
    for name in ("bytes", "smaller", *(f"tokens/s\n{dtype}" for dtype in result.speed)):
        table.add_column(name, justify="right")
    for name in ("KLD", "top-1 %", "PPL"):
        table.add_column(f"{name}\n{mode}", justify="right")
    for i, held in enumerate(result.held):
        cells = [held.label, size(held.cache_bytes), f"{held.compression:.2f}x"]
        cells += [_speed(rows[i]) for rows in result.speed.values()]
        if i == 0:
            cells += ["0", "100", number(quality[0].ppl_exact)]
        else:
            cells += [kld(quality[i - 1].kld), percent(quality[i - 1].top1), number(quality[i - 1].ppl)]
        table.add_row(*cells, end_section=i == 0)
    return table


def _speed(speed: DecodeSpeed) -> str:
    rate, ratio = speed.tokens_per_second.median, speed.ratio
    if ratio.low == ratio.high == 1:
        return f"{rate:.1f}"
    return f"{rate:.1f}  {ratio.median:.2f}x\n[dim]{ratio.low:.2f} .. {ratio.high:.2f}[/]"
