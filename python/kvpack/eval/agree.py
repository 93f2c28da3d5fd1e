"""How far two modes lie apart on the same tokens, next to how far the codec itself lies from exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .cachespec import CacheSpec
from .measure import check_packed, task
from .metrics import jsonable
from .modes import Feed, Progress, Run, check_mode, log_probs, no_progress, rows


@dataclass(frozen=True)
class Agreement:
    """Means over scored tokens. between: KLD of mode b from mode a. codec: KLD of mode a from exact.

    largest: largest difference of a log-probability between the modes. share: between / codec.
    """

    label: str
    mode_a: str
    mode_b: str
    tokens: int
    between: float
    codec: float
    largest: float
    top1: float

    @property
    def share(self) -> float:
        return self.between / self.codec if self.codec > 0 else float("nan")

    def to_json(self) -> dict[str, Any]:
        return {**jsonable(self), "share": jsonable(self.share)}


@torch.no_grad()
def agreement(
    model: Any,
    ids: Any,
    cache: Any,
    mode_a: str = "emulated",
    mode_b: str = "stepwise",
    *,
    prompt: int = 0,
    chunk: int | None = None,
    skip: int | None = None,
    progress: Progress = no_progress,
) -> Agreement:
    """Compares two modes token by token; arguments and errors as `divergence`. `chunk` counts for every mode."""
    spec = CacheSpec.of(cache)
    work = task(model, ids, prompt=prompt, skip=skip)
    reference = work.reference(budget=0)
    step = check_mode("chunked", chunk or 1)
    for mode in (mode_a, mode_b):
        check_mode(mode, None)
        check_packed(work, spec, mode, step)
    feed = Feed(work.prompt, step, work.first)
    between = codec = largest = same = 0.0
    done = 0
    for index, part in enumerate(work.ids):
        streams = [iter(Run(work.model, part, spec, mode, feed)) for mode in (mode_a, mode_b)]
        takes = [rows(stream) for stream in streams]
        for exact in reference.blocks(index):
            a, b = (log_probs(take(len(exact))) for take in takes)
            between += float((a.exp() * (a - b)).sum())
            codec += float((exact.exp() * (exact - a)).sum())
            largest = max(largest, float((a - b).abs().max()))
            same += float((a.argmax(-1) == b.argmax(-1)).sum())
            done += len(exact)
            progress(f"{mode_a} and {mode_b} {spec.label}", done, work.tokens)
    return Agreement(spec.label, mode_a, mode_b, done, between / done, codec / done, largest, same / done)
