"""What `kvpack demo` measures: one model, the stock cache and a few codecs, in minutes on two cores.

Quality is measured in float32 on short windows (mode `emulated`, one `stepwise` anchor through the fused
kernel); bytes, speed and text come from a long prompt in the dtype the machine is good at. The stock cache is
prefilled once; every packed cache is filled from its dense keys and values, which is what the model would
have handed it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cachespec import CacheSpec, fill
from .measure import divergence, task
from .metrics import jsonable
from .models import LoadedModel, Tokenizer, cast_parameters, quiet, torch_dtype
from .modes import Progress, no_progress
from .results import Divergence
from .speed import STOCK, DecodeSpeed, continue_text, decode_speed, prefill
from .texts import Text, cut_windows

CODECS = ("q8_0", "q4_0", "tq4", "tq4/tq3", "tq3", "tq2")
ANCHOR = "tq4"
QUESTION = "In one paragraph, explain what the try statement does in Python."
PLAIN_QUESTION = "Summarise the text above in one paragraph."


@dataclass(frozen=True)
class Sizes:
    """prompt: tokens of the long prompt. Quality: `count` windows of `length` tokens, `first` of them in the
    first call; the anchor scores `anchor` tokens. Speed: rounds x tokens. text: tokens to generate.
    """

    prompt: int = 4096
    count: int = 6
    length: int = 1024
    first: int = 512
    anchor: int = 320
    rounds: int = 8
    tokens: int = 4
    text: int = 48
    window: int = 128
    sinks: int = 4

    def within(self, positions: int) -> Sizes:
        """Shortened to a model with so many positions."""
        from dataclasses import replace

        room = positions - self.text - (self.rounds + 1) * self.tokens - 1
        return replace(self, prompt=min(self.prompt, room), length=min(self.length, positions))


QUICK = Sizes(prompt=600, count=2, length=400, first=200, anchor=40, rounds=2, tokens=2, text=8, window=64)


@dataclass(frozen=True)
class Written:
    """What the model wrote under one cache, and how many tokens agree with the stock cache's from the start."""

    label: str
    text: str
    tokens: int
    same: int


@dataclass(frozen=True)
class Showcase:
    """Everything the demo shows. `anchor` and `anchored` are the same tokens in modes stepwise and emulated."""

    model: str
    random: bool
    question: str
    quality: tuple[Divergence, ...]
    anchor: Divergence
    anchored: Divergence
    speed: tuple[DecodeSpeed, ...]
    written: tuple[Written, ...]
    threads: int
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = jsonable(self)
        return out


def prefers_bfloat16() -> bool:
    """Whether this machine multiplies matrices in bfloat16 about as fast as in float32, or faster: tried out."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        best[dtype] = min(times[1:])
    return best[torch.bfloat16] < 1.25 * best[torch.float32]


def long_prompt(text: Text, tokenizer: Tokenizer, length: int) -> tuple[Tensor, str]:
    """A chat prompt of at most `length` tokens, and hardly fewer: an excerpt of the text, then a question.
    Also returns the question.
    """
    found = [i for i, document in enumerate(text.documents) if document.startswith("Compound statements")]
    question = QUESTION if found else PLAIN_QUESTION
    start = found[0] if found else 0
    stream: list[int] = []
    for i in range(len(text.documents)):
        if len(stream) >= length:
            break
        stream += tokenizer.encode(text.documents[(start + i) % len(text.documents)])

    def build(body: int) -> list[int]:
        return tokenizer.chat(tokenizer.decode(stream[:body]).rstrip() + "\n\n" + question)

    ids = build(length)
    # Decoding and encoding again need not give the same number of tokens: shorten until it fits.
    body = length
    while len(ids) > length and body > 0:
        body -= len(ids) - length
        ids = build(max(body, 0))
    return torch.tensor(ids[-length:]), question


def _quality(
    loaded: LoadedModel, text: Text, sizes: Sizes, specs: list[CacheSpec], progress: Progress
) -> tuple[list[Divergence], Divergence, Divergence]:
    windows = cut_windows(text, loaded.tokenizer, sizes.length, sizes.count)
    work = task(loaded, windows, prompt=sizes.first, skip=sizes.first)
    reference = work.reference()
    results = [
        divergence(
            loaded,
            windows,
            spec,
            prompt=sizes.first,
            skip=sizes.first,
            reference=reference,
            progress=progress,
        )
        for spec in specs
    ]
    anchor = next(spec for spec in specs if spec.label == ANCHOR)
    part = windows.ids[0][: sizes.first + sizes.anchor + 1]
    shared = task(loaded, part, prompt=sizes.first, skip=sizes.first).reference()
    both = [
        divergence(
            loaded,
            part,
            anchor,
            mode,
            prompt=sizes.first,
            skip=sizes.first,
            reference=shared,
            progress=progress,
        )
        for mode in ("stepwise", "emulated")
    ]
    return results, both[0], both[1]


def _written(
    loaded: LoadedModel, ids: Tensor, context: Any, specs: list[CacheSpec], tokens: int, progress: Progress
) -> list[Written]:
    out: list[Written] = []
    exact: list[int] = []
    for number, spec in enumerate([None, *specs]):
        model = loaded.model
        cache = copy.deepcopy(context) if spec is None else fill(spec, context, model.config)
        made = continue_text(model, ids, cache, tokens, loaded.tokenizer.eos)
        exact = made if spec is None else exact
        same = next(
            (i for i, (a, b) in enumerate(zip(made, exact, strict=False)) if a != b),
            min(len(made), len(exact)),
        )
        label = STOCK if spec is None else spec.label
        out.append(Written(label, loaded.tokenizer.decode(made).strip(), len(made), same))
        progress("generate", number + 1, len(specs) + 1)
    return out


def showcase(
    loaded: LoadedModel,
    text: Text,
    sizes: Sizes,
    *,
    codecs: tuple[str, ...] = CODECS,
    dtype: str = "auto",
    say: Callable[[str], None] = quiet,
    progress: Progress = no_progress,
) -> Showcase:
    """Runs the whole demo. loaded: a float32 model; its parameters are cast to `dtype` on the way ("auto":
    see `prefers_bfloat16`).
    """
    sizes = sizes.within(int(getattr(loaded.model.config, "max_position_embeddings", 1 << 30)))
    specs = [CacheSpec.parse(codec, window=sizes.window, sinks=sizes.sinks) for codec in codecs]
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = now - began, now

    say("quality, in float32")
    quality, anchor, anchored = _quality(loaded, text, sizes, specs, progress)
    lap("quality")
    name = ("bfloat16" if prefers_bfloat16() else "float32") if dtype == "auto" else dtype
    cast_parameters(loaded.model, torch_dtype(name))
    ids, question = long_prompt(text, loaded.tokenizer, sizes.prompt)
    say(f"bytes, speed and text after a prompt of {len(ids)} tokens, in {name}")
    context = prefill(loaded.model, ids, progress=progress)
    lap("prefill")
    written = _written(loaded, ids, context, specs, sizes.text, progress)
    lap("generate")
    speed = decode_speed(
        loaded.model,
        context,
        specs,
        int(ids[-1]),
        rounds=sizes.rounds,
        tokens_per_round=sizes.tokens,
        progress=progress,
    )
    lap("speed")
    return Showcase(
        model=loaded.name,
        random=loaded.random,
        question=question,
        quality=tuple(quality),
        anchor=anchor,
        anchored=anchored,
        speed=tuple(speed),
        written=tuple(written),
        threads=torch.get_num_threads(),
        seconds=seconds,
    )
