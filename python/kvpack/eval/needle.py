"""A passkey in a long text: can the model still say it when what lies far back is packed?

A sentence with a number stands at a certain depth of a text of some thousand tokens; then the model is asked for it,
and generates greedily. The prompt is run once, over the stock cache, and every packed cache is filled from its keys
and values, as one prefill call would have left it; generation goes through the model's own `generate`.

Source: Mohtashami and Jaggi, arXiv 2305.16300, section 4.2 (passkey retrieval).
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cachespec import CacheSpec, fill
from .models import Tokenizer
from .quality import Study, describe
from .speed import continue_text, prefill
from .texts import Text

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


def haystack(text: Text, tokenizer: Tokenizer, length: int, depth: float, seed: int) -> tuple[Tensor, str]:
    """Token ids [length] of a text with a pass key at `depth` (0 to 1) and the question at its end; and the key."""
    draw = random.Random(seed)
    key = str(draw.randrange(10_000, 100_000))
    needle, question = tokenizer.encode(_NEEDLE.format(key=key)), tokenizer.encode(_QUESTION)
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    room = length - len(needle) - len(question) - len(first)
    if room < 1 or not 0 <= depth <= 1:
        raise ValueError(f"a needle at depth {depth} of {length} tokens: allowed are depths 0 to 1, and some room")
    stream: list[int] = []
    start = draw.randrange(max(1, len(text.documents)))
    for i in range(len(text.documents)):
        stream += tokenizer.encode(text.documents[(start + i) % len(text.documents)])
        if len(stream) >= 4 * room:
            break
    if len(stream) < room:
        raise ValueError(f"{text.name} has {len(stream)} tokens: too few for a haystack of {room}")
    begin = draw.randrange(len(stream) - room + 1)
    body = stream[begin : begin + room]
    at = int(depth * room)
    return torch.tensor([*first, *body[:at], *needle, *body[at:], *question]), key


def needles(
    study: Study, text: Text, specs: Sequence[CacheSpec], length: int, depths: Sequence[float], repeats: int
) -> None:
    """Every cache, and the exact one, at every depth, `repeats` keys each; a "needle" line for each."""
    tokenizer = study.loaded.tokenizer
    caches: list[CacheSpec | None] = [None, *specs]
    for seed in range(repeats):
        for depth in depths:
            ids, answer = haystack(text, tokenizer, length, depth, seed)
            wanted = []
            for spec in caches:
                said: Any = "exact" if spec is None else study.identity(spec)
                key = study.key("needle", said, depth, ids.tolist())
                if key not in study.store:
                    wanted.append((spec, key))
            if not wanted:
                continue
            study.check_time()
            dense = prefill(study.model, ids)
            for spec, key in wanted:
                study.check_time()
                began = time.perf_counter()
                cache = copy.deepcopy(dense) if spec is None else fill(spec, dense, study.model.config)
                written = tokenizer.decode(continue_text(study.model, ids, cache, 10, tokenizer.eos))
                named = {"label": "exact", "window": None, "sinks": None} if spec is None else describe(spec)
                line = {"key": key, "kind": "needle", **study.about, **named, "length": length, "depth": depth}
                seconds = round(time.perf_counter() - began, 2)
                study.store.add({**line, "seed": seed, "found": answer in written, "seconds": seconds})
                study.say(f"needle at {depth:.0%} of {length}, {named['label']}: {answer in written}")
