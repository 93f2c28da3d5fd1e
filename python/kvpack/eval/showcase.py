"""What `kvpack demo` measures: one model, the stock cache and a few codecs, in minutes on two cores.

Quality is measured in float32 on short windows (mode `emulated`, one `stepwise` anchor through the fused kernel).
Text and speed come from a long prompt: the stock cache is prefilled once, in float32, and every packed cache is
filled from its dense keys and values, which is what the model would have handed it. Bytes are those of 16-bit
keys and values, so that the compression is not flattered by a float32 model; speed is measured in float32 and
also in bfloat16 where the machine computes in it, because the stock cache is sometimes much faster in one of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cachespec import CacheSpec, dense_bytes, fill
from .measure import divergence, task
from .metrics import jsonable
from .models import LoadedModel, Tokenizer, cast_parameters, quiet, torch_dtype
from .modes import Progress, no_progress
from .results import Divergence
from .speed import STOCK, DecodeSpeed, continue_text, decode_speed, prefill
from .texts import Text, cut_windows

CODECS = ("q8_0", "q4_0", "tq4", "tq4/tq3", "tq3", "tcq3", "tq2", "tcq2")
ANCHOR = "tq4"
QUESTION = "In one paragraph, explain what the try statement does in Python."
PLAIN_QUESTION = "Summarise the text above in one paragraph."


@dataclass(frozen=True)
class Sizes:
    """prompt: tokens of the long prompt. Quality: `count` windows of `length` tokens, `first` of them in the
    first call; the anchor scores `anchor` tokens. Speed: rounds x tokens. text: tokens to generate.
    """

    prompt: int = 4096
    count: int = 4
    length: int = 1024
    first: int = 512
    anchor: int = 320
    rounds: int = 5
    tokens: int = 4
    text: int = 32
    window: int = 128
    sinks: int = 4

    def within(self, positions: int) -> Sizes:
        """Shortened to a model with so many positions."""
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
class Held:
    """Everything a cache holds after the long prompt, in bytes; compression: against the stock cache."""

    label: str
    context: int
    dtype: str
    cache_bytes: int
    compression: float


@dataclass(frozen=True)
class Showcase:
    """Everything the demo shows. `anchor` and `anchored` are the same tokens in modes stepwise and emulated;
    `speed` is by dtype.
    """

    model: str
    random: bool
    question: str
    quality: tuple[Divergence, ...]
    anchor: Divergence
    anchored: Divergence
    held: tuple[Held, ...]
    speed: dict[str, tuple[DecodeSpeed, ...]]
    written: tuple[Written, ...]
    threads: int
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = jsonable(self)
        return out


def computes_in(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies in `dtype` at a bearable speed, half of float32's or more: tried out."""
    best = []
    for kind in (torch.float32, dtype):
        x, weight = torch.ones(1, 1024, dtype=kind), torch.ones(4096, 1024, dtype=kind)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - began)
        best.append(min(times[1:]))
    return best[1] < 2 * best[0]


def cast_cache(cache: Any, dtype: torch.dtype) -> Any:
    """A copy of a stock cache with keys and values in another dtype."""
    out = copy.deepcopy(cache)
    for layer in out.layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).to(dtype))
        layer.dtype = dtype
    return out


def held_in(context: Any, specs: Sequence[CacheSpec], config: Any) -> tuple[Held, ...]:
    """What the stock cache `context` weighs, and every packed cache filled from it."""
    stock = dense_bytes(context)
    dtype = str(context.layers[0].keys.dtype).removeprefix("torch.")
    sizes = [(STOCK, stock), *((spec.label, int(fill(spec, context, config).nbytes)) for spec in specs)]
    tokens = int(context.get_seq_length())
    return tuple(Held(label, tokens, dtype, size, stock / size) for label, size in sizes)


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
        cache = copy.deepcopy(context) if spec is None else fill(spec, context, loaded.model.config)
        made = continue_text(loaded.model, ids, cache, tokens, loaded.tokenizer.eos)
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
    """Runs the whole demo. loaded: a float32 model; its parameters are cast on the way.

    dtype: to measure speed in: "float32", "bfloat16", "float16", or "auto": float32, and bfloat16 where
    `computes_in` says that the machine does.
    """
    if loaded.dtype != "float32":
        raise ValueError(f"the demo needs a float32 model, not {loaded.dtype}")
    model = loaded.model
    sizes = sizes.within(int(getattr(model.config, "max_position_embeddings", 1 << 30)))
    specs = [CacheSpec.parse(codec, window=sizes.window, sinks=sizes.sinks) for codec in codecs]
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = now - began, now

    say("quality")
    quality, anchor, anchored = _quality(loaded, text, sizes, specs, progress)
    lap("quality")
    ids, question = long_prompt(text, loaded.tokenizer, sizes.prompt)
    say(f"text, bytes and speed after a prompt of {len(ids)} tokens")
    context = prefill(model, ids, progress=progress)
    lap("prefill")
    written = _written(loaded, ids, context, specs, sizes.text, progress)
    lap("generate")
    held = held_in(cast_cache(context, torch.bfloat16), specs, model.config)
    names = [dtype]
    if dtype == "auto":
        names = ["float32", *(["bfloat16"] if computes_in(torch.bfloat16) else [])]
    speed: dict[str, tuple[DecodeSpeed, ...]] = {}
    for name in names:
        cast_parameters(model, torch_dtype(name))
        speed[name] = tuple(
            decode_speed(
                model,
                cast_cache(context, torch_dtype(name)),
                specs,
                int(ids[-1]),
                rounds=sizes.rounds,
                tokens_per_round=sizes.tokens,
                progress=progress,
            )
        )
    lap("speed")
    return Showcase(
        model=loaded.name,
        random=loaded.random,
        question=question,
        quality=tuple(quality),
        anchor=anchor,
        anchored=anchored,
        held=held,
        speed=speed,
        written=tuple(written),
        threads=torch.get_num_threads(),
        seconds=seconds,
    )
