"""`allocate`: which codec each (layer, side) should get, so that a number of bits does the least harm.

1. *Sensitivity* of a (layer, side): the mean KLD from the exact cache with that one alone in a coarse codec, the
   probe, measured on a text.
2. *Distortion* D of a codec: |x - decoded|^2 / |x|^2 of Gaussian vectors. In the working range a divergence grows in
   proportion to the squared error, so a codec c is predicted to cost sensitivity * D(c) / D(probe), and a policy
   the sum over all (layer, side).
3. *Choice*: the policy of least predicted divergence whose bytes stay within the budget, exactly, by dynamic
   programming over bytes (a knapsack with one codec per item).

The sum ignores how errors of different layers meet: what a policy is worth is measured on another text (`verify`).
Source: the idea of bits by measured sensitivity is that of mixed-precision quantization (HAWQ, arXiv 1905.03696).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack import spec as specs
from kvpack.policy import SINKS, WINDOW, Policy
from kvpack.spec import SIDES, Side

from . import metrics
from .cachespec import CacheSpec, full_layers, head_size
from .measure import check_packed, score, task
from .metrics import Interval, jsonable
from .models import LoadedModel
from .modes import Progress, check_mode, no_progress
from .sweeps import sweep

Item = tuple[int, Side]
"""A (layer, side)."""

LADDER = ("tq2", "tq3", "tq4")


@dataclass(frozen=True)
class Allocation:
    """A policy and what is known of it.

    bits, uniform_bits: honest bits per value, of the policy and of the best uniform pair of the ladder within the
    same budget. predicted, uniform_predicted: mean KLD, nats per token. sensitivity: (layer, side, mean KLD with
    the probe there). distortion: by codec.
    """

    policy: Policy
    uniform: Policy
    bits: float
    uniform_bits: float
    predicted: float
    uniform_predicted: float
    probe: str
    mode: str
    text: str
    tokens: int
    sensitivity: tuple[tuple[int, Side, float], ...]
    distortion: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = jsonable({name: getattr(self, name) for name in self.__dataclass_fields__})
        return {**out, "policy": self.policy.to_json(), "uniform": self.uniform.to_json()}


@dataclass(frozen=True)
class Verified:
    """Measured on a text: mean KLD of the policy and of the uniform one, and their ratio, paired by token."""

    text: str
    tokens: int
    cluster_kind: str
    policy: Interval
    uniform: Interval
    ratio: Interval

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = jsonable(self)
        return out


def _inner(model: Any) -> Any:
    return model.model if isinstance(model, LoadedModel) else model


def distortion(codec: str, head_dim: int, side: Side = "key", vectors: int = 4096) -> float:
    """Mean squared error over mean square of `vectors` Gaussian vectors [head_dim], in float64, with a fixed seed."""
    import kvpack

    x = np.random.default_rng(0).standard_normal((vectors, head_dim)).astype(np.float32)
    coder = kvpack.codec(codec, head_dim=head_dim, side=side)
    wide = x.astype(np.float64)
    error = np.asarray(coder.decode(coder.encode(x)), dtype=np.float64) - wide
    return float((error**2).sum() / (wide**2).sum())


def sensitivities(
    model: Any,
    ids: Any,
    probe: str = LADDER[0],
    mode: str = "emulated",
    *,
    window: int = WINDOW,
    sinks: int = SINKS,
    skip: int | None = None,
    path: str | Path | None = None,
    progress: Progress = no_progress,
) -> dict[Item, float]:
    """Mean KLD, nats per token, with one (layer, side) alone in the codec `probe`, for each of the model.

    model, ids, skip: as `kvpack.eval.task`. path: a JSONL file, in which finished ones are kept and found again.
    """
    layers = full_layers(_inner(model).config)
    items: list[Item] = [(layer, side) for layer in layers for side in SIDES]
    caches = []
    for layer, side in items:
        pair = (probe, "exact") if side == "key" else ("exact", probe)
        caches.append(
            CacheSpec(policy=Policy("exact", layers={layer: pair}, window=window, sinks=sinks, name=f"{layer} {side}"))
        )
    done = 0

    def on_row(_: Any, __: bool) -> None:
        nonlocal done
        done += 1
        progress("sensitivity of (layer, side)", done, len(items))

    rows = sweep(model, ids, caches, mode, skip=skip, path=path, on_row=on_row)
    # KLD of two nearly equal distributions may come out below zero by rounding.
    return {item: max(0.0, row.kld.value) for item, row in zip(items, rows, strict=True)}


def choose(cost: Sequence[Sequence[float]], size: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For every item one choice, so that the sizes' sum is at most `budget` and the costs' sum least.

    cost, size: by item and choice; sizes are positive. Exact: dynamic programming over sizes in units of their
    greatest common divisor. ValueError if even the smallest choices exceed the budget.
    """
    least = sum(map(min, size))
    if least > budget:
        raise ValueError(f"a budget of {budget} bytes is below {least}, what the smallest choices take")
    unit = math.gcd(*(x for row in size for x in row))
    room = budget // unit
    best = np.zeros(room + 1)
    picked = np.zeros((len(cost), room + 1), dtype=np.int16)
    for item, (costs, sizes) in enumerate(zip(cost, size, strict=True)):
        options = np.full((len(costs), room + 1), np.inf)
        for choice, (c, s) in enumerate(zip(costs, sizes, strict=True)):
            step = s // unit
            if step <= room:
                options[choice, step:] = best[: room + 1 - step] + c
        picked[item] = options.argmin(0)
        best = options.min(0)
    out: list[int] = []
    at = room
    for item in reversed(range(len(cost))):
        choice = int(picked[item, at])
        out.append(choice)
        at -= size[item][choice] // unit
    return out[::-1]


def allocate(
    model: Any,
    ids: Any,
    bits: float,
    *,
    ladder: Sequence[str] = LADDER,
    probe: str | None = None,
    mode: str = "emulated",
    window: int = WINDOW,
    sinks: int = SINKS,
    skip: int | None = None,
    name: str = "",
    path: str | Path | None = None,
    progress: Progress = no_progress,
) -> Allocation:
    """The policy of least predicted divergence at `bits` honest bits per value, on average over all (layer, side).

    model, ids, skip: as `kvpack.eval.task`. ladder: the codecs to choose from. probe: the codec that sensitivities
    are measured with; None: the coarsest of the ladder. path: see `sensitivities`.

    Raises ValueError if `bits` is below the ladder's smallest codec, or the ladder holds fewer than two codecs.
    """
    check_mode(mode, None)
    names = list(dict.fromkeys(str(specs.parse(codec)) for codec in ladder))
    if len(names) < 2:
        raise ValueError(f"the ladder {', '.join(names) or '()'} leaves nothing to choose: two codecs or more")
    inner = _inner(model)
    size = head_size(inner.config)
    layers = full_layers(inner.config)
    if not layers:
        raise ValueError(f"{type(inner).__name__} has no full-attention layer to pack")
    bytes_of = {(c, side): _tile_bytes(c, side, size, sinks) for c in names for side in SIDES}
    width = {codec: specs.of_cache(codec, "value", sinks).bits(size, "value") for codec in names}
    least = sum(min(bytes_of[codec, side] for codec in names) for side in SIDES)
    smallest = 8 * least / (len(SIDES) * specs.TILE * size)
    if bits < smallest:
        raise ValueError(f"bits={bits} is below the smallest codec of the ladder, which takes {smallest:.3f}")
    probe = min(names, key=lambda codec: width[codec]) if probe is None else str(specs.parse(probe))
    errors = {codec: distortion(codec, size) for codec in dict.fromkeys([*names, probe])}
    if errors[probe] == 0:
        raise ValueError(f"the probe {probe} loses nothing: take a coarse codec")
    found = sensitivities(model, ids, probe, mode, window=window, sinks=sinks, skip=skip, path=path, progress=progress)
    items = list(found)
    costs = [[found[item] * errors[codec] / errors[probe] for codec in names] for item in items]
    sizes = [[bytes_of[codec, side] for codec in names] for _, side in items]
    budget = int(bits * len(items) * specs.TILE * size / 8)
    picked = dict(zip(items, (names[i] for i in choose(costs, sizes, budget)), strict=True))
    policy = _policy(picked, layers, window, sinks, name)
    uniform = _uniform(found, errors, names, bytes_of, budget // len(layers), window, sinks)
    work = task(model, ids, skip=skip)

    def predicted(of: Policy) -> float:
        return sum(found[layer, side] * errors[of.codec(layer, side)] / errors[probe] for layer, side in items)

    return Allocation(
        policy=policy,
        uniform=uniform,
        bits=policy.bits(size, layers),
        uniform_bits=uniform.bits(size, layers),
        predicted=predicted(policy),
        uniform_predicted=predicted(uniform),
        probe=probe,
        mode=mode,
        text=work.text,
        tokens=work.tokens,
        sensitivity=tuple((layer, side, value) for (layer, side), value in found.items()),
        distortion=errors,
    )


def _tile_bytes(codec: str, side: Side, head_size: int, sinks: int) -> int:
    """Bytes of one side of a tile with its share of the means, as a cache has it; rounded up."""
    return math.ceil(specs.of_cache(codec, side, sinks).bits(head_size, side) * specs.TILE * head_size / 8)


def _policy(picked: Mapping[Item, str], layers: Iterable[int], window: int, sinks: int, name: str) -> Policy:
    """A policy whose default is the commonest pair."""
    table = {layer: (picked[layer, "key"], picked[layer, "value"]) for layer in layers}
    (key, value), _ = Counter(table.values()).most_common(1)[0]
    return Policy(key, value, table, window, sinks, name)


def _uniform(
    found: Mapping[Item, float],
    errors: Mapping[str, float],
    names: Sequence[str],
    bytes_of: Mapping[tuple[str, Side], int],
    budget: int,
    window: int,
    sinks: int,
) -> Policy:
    """The pair of codecs, the same in every layer, of least predicted divergence within `budget` bytes a layer."""
    total = {side: sum(value for (_, own), value in found.items() if own == side) for side in SIDES}
    pairs = [
        (total["key"] * errors[key] + total["value"] * errors[value], key, value)
        for key in names
        for value in names
        if bytes_of[key, "key"] + bytes_of[value, "value"] <= budget
    ]
    _, key, value = min(pairs)
    return Policy(key, value, window=window, sinks=sinks)


@torch.no_grad()
def verify(
    model: Any,
    ids: Any,
    allocation: Allocation,
    mode: str = "emulated",
    *,
    skip: int | None = None,
    progress: Progress = no_progress,
) -> Verified:
    """Mean KLD of the allocation's policy and of the uniform one, on a text that it should not have been made on."""
    work = task(model, ids, skip=skip)
    caches = [CacheSpec(policy=allocation.policy), CacheSpec(policy=allocation.uniform)]
    reference = work.reference(shared=work.common_start(caches, mode))
    chunk = check_mode(mode, None)
    both = []
    for cache in caches:
        check_packed(work, cache, mode, chunk)
        both.append(score(work, cache, mode, chunk=chunk, reference=reference, progress=progress)[0])
    ours, flat = both
    groups = metrics.clusters(ours.document, ours.window)
    return Verified(
        text=work.text,
        tokens=len(ours),
        cluster_kind=groups.kind,
        policy=metrics.mean_interval(ours.kld, groups),
        uniform=metrics.mean_interval(flat.kld, groups),
        ratio=metrics.ratio_interval(ours.kld, flat.kld, groups),
    )
