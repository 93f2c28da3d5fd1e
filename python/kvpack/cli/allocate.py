"""`kvpack allocate`: a policy from measured sensitivities, at a number of bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    DebugOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ModeOption,
    Reporter,
    SinksOption,
    SkipOption,
    TextOption,
    WindowOption,
    codec_list,
    figure,
    kld,
    number,
    output,
    print_json,
)

if TYPE_CHECKING:
    from kvpack.eval.allocate import Allocation, Verified


def allocate(
    bits: Annotated[
        float, typer.Option("--bits", "-b", help="Honest bits per value, on average over all (layer, side).")
    ] = 3.25,
    ladder: Annotated[str, typer.Option("--ladder", help="Codecs to choose from, separated by commas.")] = (
        "tq2,tq3,tq4"
    ),
    probe: Annotated[
        str | None,
        typer.Option("--probe", help="Codec to measure sensitivities with [default: the coarsest of the ladder]."),
    ] = None,
    model: ModelOption = "default",
    text: TextOption = "topics",
    mode: ModeOption = "emulated",
    window: WindowOption = 128,
    sinks: SinksOption = 4,
    length: Annotated[int, typer.Option("--length", "-l", min=2, help="Tokens in a window of text.")] = 768,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Windows of text, spread evenly.")] = 2,
    skip: SkipOption = None,
    verify_text: Annotated[
        str | None, typer.Option("--verify-text", help="Another text, to measure the policy on.")
    ] = None,
    verify_length: Annotated[int, typer.Option("--verify-length", min=2, help="Tokens in a window of it.")] = 1024,
    verify_count: Annotated[int, typer.Option("--verify-count", min=1, help="Windows of it.")] = 8,
    name: Annotated[str, typer.Option("--name", help="What reports call the policy.")] = "",
    out: Annotated[
        Path, typer.Option("--output", "-o", help="The policy; beside it, .sensitivity.jsonl lets a rerun go on.")
    ] = Path("policy.json"),
    dtype: DtypeOption = "float32",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Give every (layer, side) a codec, so that a number of bits does the least harm. One pass per (layer, side)."""
    from kvpack import eval as measure
    from kvpack.eval.allocate import allocate as run
    from kvpack.eval.allocate import verify

    codecs = codec_list(ladder)
    source = measure.load_text(text)
    other = None if verify_text is None else measure.load_text(verify_text)
    verified = None
    with Reporter() as report:
        loaded = measure.load_model(model, dtype, say=report.say)
        windows = measure.cut_windows(source, loaded.tokenizer, length, count)
        found = run(
            loaded,
            windows,
            bits,
            ladder=codecs,
            probe=probe,
            mode=mode,
            window=window,
            sinks=sinks,
            skip=skip,
            name=name,
            path=out.with_suffix(".sensitivity.jsonl"),
            progress=report.progress,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        found.policy.save(out)
        if other is not None:
            cut = measure.cut_windows(other, loaded.tokenizer, verify_length, verify_count)
            verified = verify(loaded, cut, found, mode, progress=report.progress)
    if json:
        print_json({**found.to_json(), "verified": verified and verified.to_json(), "output": str(out)})
    else:
        _show(found, verified, out)


def _show(found: Allocation, verified: Verified | None, out: Path) -> None:
    from rich.table import Table

    from kvpack.policy import pair_label

    console = output()
    console.print(
        f"sensitivities: {found.text}, {found.tokens} tokens scored, mode {found.mode}, probe {found.probe}; "
        "distortion " + ", ".join(f"{codec} {figure(value)}" for codec, value in found.distortion.items()),
        markup=False,
    )
    by_layer: dict[int, dict[str, float]] = {}
    for layer, side, value in found.sensitivity:
        by_layer.setdefault(layer, {})[side] = value
    table = Table()
    for column in ("layer", "KLD, key coded", "KLD, value coded", "key", "value"):
        table.add_column(column, justify="right")
    for layer, sides in by_layer.items():
        table.add_row(str(layer), figure(sides["key"]), figure(sides["value"]), *found.policy.codecs(layer))
    console.print(table)
    uniform = pair_label(found.uniform.key, str(found.uniform.value))
    ratio = found.predicted / found.uniform_predicted if found.uniform_predicted else float("nan")
    console.print(
        f"policy     {found.bits:.3f} bits, predicted KLD {figure(found.predicted)}\n"
        f"uniform    {found.uniform_bits:.3f} bits, predicted KLD {figure(found.uniform_predicted)} ({uniform})\n"
        f"predicted  x{ratio:.2f}",
        markup=False,
    )
    if verified is not None:
        console.print(
            f"measured   on {verified.text}, {verified.tokens} tokens, mode {found.mode}: "
            f"policy {kld(verified.policy)}, uniform {kld(verified.uniform)}, ratio x{number(verified.ratio)} "
            f"(95 % intervals, clustered by {verified.cluster_kind})",
            markup=False,
        )
    console.print(f"written: {out}", markup=False)
