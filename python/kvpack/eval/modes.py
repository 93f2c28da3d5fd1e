"""The four modes, as runs that yield the logits of a document block by block: memory stays bounded.

    fake       one pass; every token but the sinks quantized and dequantized, the query's own included
    chunked    the real cache; the model is fed `chunk` tokens a call, history coded, own chunk exact
    stepwise   the real cache; token by token: the oracle
    emulated   one pass that sees at every position what `stepwise` (or `chunked`) would have seen

`exact` is the run over the stock cache that they are compared with. All start with a first call of `prompt`
tokens (0: none), which sees its own tokens exactly, as a real prefill does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attach import emulating
from .cachespec import CacheSpec, dense_bytes, dense_cache, fill, full_layers, tokens_read
from .emulation import Emulator, Rule
from .errors import NothingPackedError

MODES = ("fake", "chunked", "stepwise", "emulated")
EXACT = "exact"
#: Positions whose logits are held at once: 256 x 49152 float32 are 50 MB.
BLOCK = 256

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing. `what` is being done, `done` of `total` tokens are."""


@dataclass(frozen=True)
class Feed:
    """How a document's tokens are fed: a first call of `prompt`, then calls of `chunk`; scored from `first`
    on.

    A scored position p is a query position: its logits predict token p + 1.
    """

    prompt: int
    chunk: int
    first: int

    def calls(self, length: int) -> list[tuple[int, int]]:
        """The (begin, end) of every call that feeds `length` tokens."""
        cuts = [0, self.prompt] if self.prompt else [0]
        cuts += range(self.prompt + self.chunk, length, self.chunk)
        return list(zip(cuts, [*cuts[1:], length], strict=True))


def check_mode(mode: str, chunk: int | None) -> int:
    """The tokens per call of a mode. ValueError names what is allowed."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if mode == "chunked" and chunk is None:
        return 32
    if mode in ("stepwise", "fake") and chunk not in (None, 1):
        raise ValueError(f"chunk={chunk} is not allowed in mode {mode}; use mode chunked")
    chunk = 1 if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed: at least 1 token")
    return chunk


class Run:
    """One document under one cache. Iterating yields logits [n, vocabulary] of the scored positions, in
    order.

    After the last block `coded_queries` says how many queries attended to coded tokens, in the layer where
    most did, and `cache_bytes` what the cache then held.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        spec: CacheSpec | None,
        mode: str,
        feed: Feed,
        *,
        prefix: Any = None,
        measure: bool = False,
    ) -> None:
        self.model, self.ids, self.spec, self.mode, self.feed = model, ids, spec, mode, feed
        self.prefix, self.measure = prefix, measure
        self.coded_queries = 0
        self.cache_bytes: int | None = None
        self.dense_bytes: int | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self.mode in ("chunked", "stepwise"):
            yield from self._real()
        else:
            yield from self._one_pass()

    def _one_pass(self) -> Iterator[Tensor]:
        config, emulator = self.model.config, None
        dense = dense_cache(config)
        begin = self.feed.prompt
        if self.prefix is not None:
            dense = copy.deepcopy(self.prefix)
            begin = dense.get_seq_length()
        feed = Feed(begin, BLOCK, self.feed.first)
        if self.mode != EXACT:
            assert self.spec is not None
            rule = Rule(self.spec, self.mode == "fake", self.feed.prompt, self.feed.chunk)
            full = full_layers(config)
            if not full:
                raise NothingPackedError(f"{type(self.model).__name__} has no full-attention layer to pack")
            # Where a policy keeps a layer exact on both sides, the stock attention is as good, and faster.
            coded = tuple(layer for layer in full if self.spec.codecs(layer) != ("exact", "exact"))
            emulator = Emulator(rule, coded or full)
        yield from self._feed(dense, feed, start=dense.get_seq_length(), emulator=emulator)
        self.dense_bytes = dense_bytes(dense)
        if emulator is not None:
            self.coded_queries = max(emulator.reads.values(), default=0)
            if self.measure and self.spec is not None:
                self.cache_bytes = int(fill(self.spec, dense, config).nbytes)

    def _real(self) -> Iterator[Tensor]:
        assert self.spec is not None
        cache = self.spec.build(self.model.config)
        yield from self._feed(cache, self.feed, start=0)
        self.cache_bytes = int(cache.nbytes)

    def _feed(self, cache: Any, feed: Feed, start: int, emulator: Emulator | None = None) -> Iterator[Tensor]:
        length = len(self.ids) - 1  # the last token is only a target
        read = 0
        for begin, end in feed.calls(length):
            if begin < start:
                continue
            scored = max(0, end - max(begin, feed.first))
            # Entered anew for every call: between two blocks the same model makes the exact ones.
            with emulating(self.model, emulator) if emulator is not None else nullcontext():
                logits = forward(self.model, self.ids[begin:end], cache, keep=max(1, scored))
            if self.mode in ("chunked", "stepwise"):
                before, read = read, tokens_read(cache)
                self.coded_queries += (end - begin) * (read > before)
            if scored:
                yield logits[-scored:]


@torch.no_grad()
def forward(model: Any, ids: Tensor, cache: Any, keep: int) -> Tensor:
    """One call of the model with a cache: logits [keep or more, vocabulary] of the last positions."""
    extra = {"logits_to_keep": keep} if "logits_to_keep" in _parameters(type(model)) else {}
    device = next(model.parameters()).device
    out = model(input_ids=ids[None].to(device), past_key_values=cache, use_cache=True, **extra)
    logits: Tensor = out.logits[0]
    return logits


def _parameters(kind: type) -> frozenset[str]:
    if kind not in _PARAMETERS:
        _PARAMETERS[kind] = frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return _PARAMETERS[kind]


_PARAMETERS: dict[type, frozenset[str]] = {}


def log_probs(logits: Tensor) -> Tensor:
    """Natural log-probabilities, at least float32."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def rows(blocks: Iterator[Tensor]) -> Callable[[int], Tensor]:
    """A function that hands out the next n rows of a stream of blocks."""
    held: list[Tensor] = []

    def take(n: int) -> Tensor:
        while sum(map(len, held)) < n:
            held.append(next(blocks))
        joined = held[0] if len(held) == 1 else torch.cat(held)
        held[:] = [joined[n:]]
        return joined[:n]

    return take


class Reference:
    """The exact model's log-probabilities on some documents, computed once and kept while they fit `budget`.

    Also keeps the stock cache after the first call of `prompt` tokens: the one-pass modes go on from there. Without
    a prompt, `shared` tokens are kept so: those before which no measured cache has packed anything.
    """

    def __init__(
        self, model: Any, ids: tuple[Tensor, ...], prompt: int, first: int, budget: int = 2 << 30, shared: int = 0
    ) -> None:
        if not 0 <= shared <= first:
            raise ValueError(f"shared={shared} is not allowed: 0 to {first}, the first scored position")
        self.model, self.ids, self.shared = model, ids, prompt or shared
        self.feed = Feed(prompt, BLOCK, first)
        self._left = budget
        self._kept: dict[int, list[Tensor]] = {}
        self._prefix: dict[int, Any] = {}
        self.dense_bytes: int | None = None

    def prefix(self, index: int) -> Any:
        """The stock cache after the first call of a document, or None; not to be changed."""
        if not self.shared:
            return None
        if index not in self._prefix:
            cache = dense_cache(self.model.config)
            forward(self.model, self.ids[index][: self.shared], cache, keep=1)
            size = dense_bytes(cache)
            if self._left < size:  # keep the newest only
                for old in [i for i in self._prefix if i not in self._kept]:
                    del self._prefix[old]
            else:
                self._left -= size
            self._prefix[index] = cache
        return self._prefix[index]

    def blocks(self, index: int) -> Iterator[Tensor]:
        """Log-probabilities [n, vocabulary] of the document's scored positions."""
        if index in self._kept:
            yield from self._kept[index]
            return
        kept: list[Tensor] | None = []
        run = Run(self.model, self.ids[index], None, EXACT, self.feed, prefix=self.prefix(index))
        for logits in run:
            block = log_probs(logits)
            size = block.numel() * block.element_size()
            if kept is not None and self._left >= size:
                kept.append(block)
                self._left -= size
            elif kept is not None:
                self._left += sum(b.numel() * b.element_size() for b in kept)
                kept = None
            yield block
        self.dense_bytes = run.dense_bytes
        if kept is not None:
            self._kept[index] = kept
