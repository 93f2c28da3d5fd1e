"""Why the defaults are what they are: one of them changed at a time, beside the cache that has them all."""

from __future__ import annotations

from collections.abc import Mapping

from .cachespec import CacheSpec
from .formats import kld, number
from .quality_store import Line, Store, figures, ratio

WINDOWS = (0, 32, 64, 256)
"""Sizes of the window that are tried beside the default."""


def variants(codec: str, window: int, sinks: int) -> dict[str, CacheSpec]:
    """What is changed -> the cache, the unchanged one ("nothing") first. `codec` is the name of a rotated codec."""

    def cache(key: str = "", value: str = "", window: int = window, sinks: int = sinks) -> CacheSpec:
        return CacheSpec(codec + key, value=codec + value, window=window, sinks=sinks)

    rules = {f"`scale={rule}`": cache(f":scale={rule}", f":scale={rule}") for rule in ("stored", "mse", "unbiased")}
    keys = {f"keys `center={center}`": cache(key=f":center={center}") for center in ("none", "mean")}
    values = {f"values `center={center}`": cache(value=f":center={center}") for center in ("none", "tile")}
    sizes = {f"window {size}": cache(window=size) for size in WINDOWS if size != window}
    return {"nothing": cache(), **rules, **keys, **values, "no sinks": cache(sinks=0), **sizes}


def defaults_table(
    store: Store, about: Mapping[str, object], exact: dict[str, Line], *, length: int, window: int, sinks: int
) -> str:
    """A table for every codec of which the unchanged cache and a changed one were measured; ratios of mean KLDs are
    paired by token, on the windows that both ran.
    """
    lines: dict[tuple[str, int, int], dict[str, Line]] = {}
    held: dict[tuple[str, int, int], float] = {}
    for line in store.find("window", mode="emulated", length=length, peer=False, **about):
        if line["sample"] in exact:
            lines.setdefault(_place(line), {})[line["sample"]] = line
    for line in store.find("bytes", length=length, peer=False, **about):
        held[_place(line)] = float(line["held"])
    codecs = dict.fromkeys(label for label, _, _ in lines if label.isidentifier() or label.replace(".", "").isalnum())
    parts = []
    for codec in codecs:
        try:
            tried = variants(codec, window, sinks)
        except ValueError:  # a codec without these options, or the label of a policy
            continue
        places = {what: (cache.label, cache.window, cache.sinks) for what, cache in tried.items()}
        there = {what: list(lines[place].values()) for what, place in places.items() if place in lines}
        if "nothing" not in there or not any(what.startswith(("no sinks", "window")) for what in there):
            continue
        rows = []
        for what, found in there.items():
            times = ratio(found, there["nothing"], exact)
            bits = held.get(places[what])
            if times is not None:
                rows.append(
                    f"| {what} | {'-' if bits is None else f'{bits:.2f}'} | {len(found)} "
                    f"| {kld(figures(found, exact)['kld'])} | {'1' if what == 'nothing' else number(times)} |"
                )
        parts.append(
            f"**Defaults** of `{codec}`, one changed at a time, mode `emulated`. The ratio is that of mean KLDs to the "
            "cache with nothing changed, paired by token on the same windows.\n\n"
            "| changed | held | windows | KLD mean | ratio |\n|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)


def _place(line: Line) -> tuple[str, int, int]:
    return line["label"], line["window"], line["sinks"]
