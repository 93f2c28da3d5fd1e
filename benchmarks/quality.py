"""The quality of every codec beside the quantized caches of transformers: measures, and writes docs/quality.md.

    python benchmarks/quality.py                            about an hour on two cores
    python benchmarks/quality.py --windows 4 --places 4 --codecs tq4,tq3 --peers none        a few minutes
    python benchmarks/quality.py --long 4096,8192 --needle tq4,tq3,tq2
    python benchmarks/quality.py --defaults tq3,tcq3 --codecs tq3 --peers none --anchor none
    python benchmarks/quality.py --render                   the tables and the picture again, nothing is measured

Texts are looked for below $KVPACK_DATA. Every finished measurement is a line of --out; a run that was stopped, or that
--minutes ended, goes on where it was. ``pip install 'kvpack[peers]'`` adds quanto and hqq.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import kvpack
from kvpack.cli.common import codec_list, int_list
from kvpack.eval import grid, load_model, load_text
from kvpack.eval.cachespec import CacheSpec
from kvpack.eval.needle import DEPTHS, needles
from kvpack.eval.peers import PEERS, peer
from kvpack.eval.quality import DEFAULTS, FAKE, LONG, PEER, SHORT, OutOfTimeError, Sample, Study, available, samples
from kvpack.eval.quality_defaults import variants
from kvpack.eval.quality_report import Report, write_doc
from kvpack.eval.quality_store import Store

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="default")
    add("--texts", default="wikitext-2,pride-and-prejudice", help="texts, the first with the larger share")
    add("--codecs", default="", help="codecs, KEY/VALUE pairs or policies [default: every codec, both sides]")
    add("--fake", default="tcq4,tq4,tcq3,tq3,tcq2,tq2", help="codecs to run in mode fake too, or none")
    add("--windows", type=int, default=32, help="windows of text")
    add("--places", type=int, default=10, help="places that they are from: the clusters of the intervals")
    add("--length", type=int, default=1024, help="tokens of a window; the first quarter is not scored")
    add("--window", type=int, default=128, help="newest tokens kept exact")
    add("--sinks", type=int, default=4, help="first tokens kept exact")
    add("--peers", default=",".join(one.name for one in PEERS), help="peers, or none")
    add("--peer-windows", type=int, default=5, help="windows for the peers, which are slow (hqq most)")
    add("--prompt", type=int, default=256, help="peers: tokens of the first call")
    add("--chunk", type=int, default=32, help="peers: tokens of each further call")
    add("--chunked", default="", help="our codecs to run in the peers' own mode too")
    add("--anchor", default="tq4,tq3", help="codecs to run stepwise through the fused kernel, or none")
    add("--anchor-tokens", type=int, default=256, help="scored tokens of a window of the anchor")
    add("--anchor-windows", type=int, default=2)
    add("--long", default="", help="lengths of long windows, like 4096,8192")
    add("--long-windows", type=int, default=2)
    add("--long-codecs", default="tq4,tq3,tq2")
    add("--defaults", default="", help="names of rotated codecs, of which one default after the other is changed")
    add("--defaults-windows", type=int, default=10)
    add("--needle", default="", help="codecs for the passkey test")
    add("--needle-length", type=int, default=4096)
    add("--needle-repeats", type=int, default=4, help="keys at each depth")
    add("--threads", type=int, default=0)
    add("--minutes", type=float, default=None, help="begin no measurement after so long")
    add("--out", type=Path, default=ROOT / "benchmarks/results/quality.jsonl")
    add("--doc", type=Path, default=ROOT / "docs/quality.md")
    add("--picture", type=Path, default=ROOT / "docs/quality.png")
    add("--render", action="store_true", help="measure nothing")
    return parser.parse_args()


def specs(text: str, options: argparse.Namespace) -> list[CacheSpec]:
    """Caches from a list of codecs; "none" and "" are none."""
    return [] if text in ("", "none") else grid(codec_list(text), [options.window], options.sinks)


def measure(study: Study, options: argparse.Namespace) -> None:
    """Everything that is asked for and not in the store."""
    texts = [load_text(name.strip()) for name in options.texts.split(",")]
    tokenizer = study.loaded.tokenizer

    def cut(length: int, windows: int, places: int) -> list[Sample]:
        return samples(texts, tokenizer, length, windows, places)

    every = options.codecs or ",".join(name for name in kvpack.codecs() if name != "exact")
    ours, length = specs(every, options), options.length
    found = cut(length, options.windows, options.places)
    names = [] if options.peers == "none" else options.peers.split(",")
    peers = available([peer(name.strip()) for name in names], study.say)
    also = specs(options.chunked, options)
    feed = {"prompt": options.prompt, "chunk": options.chunk}
    study.held(found[0], [*ours, *also], **feed)
    first = max(length // 4, options.prompt)
    study.windows(SHORT, found, ours, first=first)
    study.windows(FAKE, found, specs(options.fake, options), "fake", first=first)
    study.held(found[0], peers, **feed)
    study.windows(PEER, found[: options.peer_windows], [*peers, *also], "chunked", first=first, **feed)
    anchored = specs(options.anchor, options)
    if anchored:
        study.anchor(found[: options.anchor_windows], anchored, length // 2, options.anchor_tokens)
    for size in int_list(options.long, "length") if options.long else []:
        long = cut(size, options.long_windows, max(len(texts), options.long_windows))
        study.windows(LONG, long, specs(options.long_codecs, options), first=256)
    for name in codec_list(options.defaults) if options.defaults else []:
        tried = list(variants(name, options.window, options.sinks).values())
        study.windows(DEFAULTS, found[: options.defaults_windows], tried, first=first)
        study.held(found[0], tried, **feed)
    wanted = specs(options.needle, options)
    if wanted:
        needles(study, texts[-1], wanted, options.needle_length, DEPTHS, options.needle_repeats)


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    store = Store(options.out)
    study = Study(load_model(options.model, say=say), store, deadline=deadline, say=say)
    if not options.render:
        try:
            measure(study, options)
        except OutOfTimeError:
            say(f"out of time: {len(store.lines)} lines are in {options.out}; the same command goes on from there")
    report = Report(store, study.about, length=options.length, window=options.window, sinks=options.sinks)
    tables = report.markdown()
    print(tables)
    if tables:
        write_doc(options.doc, tables)
        if not report.draw(options.picture):
            say("no picture: pip install matplotlib")


if __name__ == "__main__":
    main()
