"""`kvpack ppl`: perplexity and divergence of one cache."""

from __future__ import annotations

from typing import Annotated

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
    WindowOption,
    figure,
    kld,
    number,
    output,
    percent,
    print_json,
    size,
)


def ppl(
    codec: Annotated[
        str | None,
        typer.Argument(
            help="Codec, KEY/VALUE codecs like tq4/tq3, a preset or a policy.json; without: the exact cache alone."
        ),
    ] = None,
    model: ModelOption = "default",
    text: TextOption = "topics",
    mode: ModeOption = "emulated",
    window: WindowOption = 128,
    sinks: SinksOption = 4,
    length: LengthOption = 1024,
    count: CountOption = 8,
    prompt: PromptOption = 0,
    skip: SkipOption = None,
    chunk: ChunkOption = None,
    fused: Annotated[bool, typer.Option(help="Modes chunked, stepwise: read the cache with the fused kernel.")] = True,
    dtype: DtypeOption = "float32",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Perplexity under a codec, and its divergence from the same model with the exact cache."""
    from kvpack import eval as measure
    from kvpack.eval.modes import check_mode

    check_mode(mode, chunk)
    spec = None
    if codec is not None:
        spec = measure.CacheSpec.parse(codec, window=window, sinks=sinks, fused=fused)
    source = measure.load_text(text)
    with Reporter() as report:
        loaded = measure.load_model(model, dtype, say=report.say)
        windows = measure.cut_windows(source, loaded.tokenizer, length, count)
        if spec is None:
            plain = measure.perplexity(loaded, windows, prompt=prompt, skip=skip, progress=report.progress)
        else:
            result = measure.divergence(
                loaded, windows, spec, mode, prompt=prompt, chunk=chunk, skip=skip, progress=report.progress
            )
    if json:
        print_json(plain if spec is None else result)
        return
    console = output()
    if spec is None:
        console.print(f"{plain.model}; {plain.text}, {plain.windows} windows of {plain.context} tokens", markup=False)
        console.print(f"PPL {number(plain.ppl)}  (exact cache, {plain.tokens} tokens scored)")
        return
    r = result
    console.print(f"{r.model}; {r.text}, {r.windows} windows of {r.context} tokens", markup=False)
    console.print(
        f"{r.label}, window {r.window}, sinks {r.sinks}; mode {r.mode}; {r.tokens} tokens scored; "
        f"95 % intervals, clustered by {r.cluster_kind}"
    )
    console.print(
        f"KLD          mean {kld(r.kld)}   median {kld(r.kld_median)}   p99 {kld(r.kld_p99)}   max {figure(r.kld_max)}"
    )
    console.print(f"same top-1   {percent(r.top1)} %")
    console.print(f"PPL          {number(r.ppl)}   exact {number(r.ppl_exact)}   ratio {number(r.ppl_ratio, 4)}")
    if r.compression is not None:
        console.print(
            f"cache        {size(r.cache_bytes)} for {r.context - 1} tokens, everything included: "
            f"{r.compression:.2f}x smaller than DynamicCache in {r.dtype} ({size(r.dense_bytes)})"
        )
