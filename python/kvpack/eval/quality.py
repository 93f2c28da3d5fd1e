"""The quality of every codec and of transformers' own quantized caches, on one model and the same tokens.

Window by window: the exact model's log-probabilities are computed once and serve every cache; the tokens before the
first packed tile are run once for all. A measurement is one cache on one window, and a line of the store
(`kvpack.eval.quality_store`), so a run may be stopped anywhere and goes on where it was. `quality_report` makes the
tables.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cachespec import CacheSpec, dense_bytes, fill, full_layers, head_size
from .emulation import TILE
from .measure import Task, _check_read, _paired, _score, check_packed, task
from .models import LoadedModel, Tokenizer, quiet
from .modes import EXACT, Feed, Reference, Run
from .peers import Peer, PeerRun, fill_peer, held_bytes
from .quality_store import Line, Store, pack_bits, pack_floats
from .speed import prefill
from .sweeps import fingerprint
from .texts import Text, cut_places

SHORT, FAKE, LONG, ANCHOR, PEER, DEFAULTS = "short", "fake", "long", "anchor", "peers", "defaults"
"""Studies: the main table, the same windows in mode `fake`, long windows, the stepwise anchor, the peers' own mode, the
defaults one by one.
"""


class OutOfTimeError(Exception):
    """The time that the run was given is over; what is finished is in the store."""


@dataclass(frozen=True)
class Sample:
    """A window of tokens, where it is from, and the cluster that it belongs to."""

    text: str
    place: int
    ids: Tensor

    @property
    def name(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]


def samples(texts: Sequence[Text], tokenizer: Tokenizer, length: int, windows: int, places: int) -> list[Sample]:
    """`windows` windows from `places` places, spread over the texts: the first text gets the larger share (three
    quarters where there are two). The first window of every place comes first, then the second, ...
    """
    if not 1 <= len(texts) <= places <= windows:
        raise ValueError(
            f"{windows} windows from {places} places of {len(texts)} texts: allowed are texts <= places <= windows"
        )
    later = max(1, places // (2 * len(texts))) if len(texts) > 1 else 0
    shares = [places - later * (len(texts) - 1), *[later] * (len(texts) - 1)]
    counts = [windows // places + (i < windows % places) for i in range(places)]
    found: list[tuple[int, Sample]] = []
    begin = 0
    for text, share in zip(texts, shares, strict=True):
        cut = cut_places(text, tokenizer, length, counts[begin : begin + share])
        seen: dict[int, int] = {}
        for ids, place in zip(cut.ids, cut.clusters, strict=True):
            found.append((seen.get(place, 0), Sample(text.name, begin + place, ids)))
            seen[place] = seen.get(place, 0) + 1
        begin += share
    return [sample for _, sample in sorted(found, key=lambda pair: pair[0])]


class Study:
    """Measures into a store, and leaves out what is there.

    deadline: `time.monotonic()` after which no measurement is begun (OutOfTimeError).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store: Store,
        *,
        deadline: float | None = None,
        say: Callable[[str], None] = quiet,
    ) -> None:
        import kvpack

        self.loaded, self.model, self.store = loaded, loaded.model, store
        self.deadline, self.say = deadline, say
        self.version = f"{kvpack.__version__}, format {kvpack.spec.FORMAT_VERSION}"
        self.about = {"model": loaded.label, "version": self.version}
        self._weights = fingerprint(loaded.model)
        self._dense: tuple[int, Any] | None = None

    def key(self, *said: Any) -> str:
        """A hash of the model and of everything that a measurement depends on."""
        digest = hashlib.sha256(self._weights)
        digest.update(json.dumps([self.about, *said], sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def identity(self, cache: CacheSpec | Peer) -> Line:
        """What makes a cache the same cache: its options, and what its codecs make of a fixed tile, or the versions
        of a peer's packages. A codec that was changed is measured anew.
        """
        if isinstance(cache, Peer):
            return {**cache.to_json(), "versions": cache.versions}
        config = self.model.config
        pairs = {cache.codecs(layer) for layer in full_layers(config)}
        print_of = {codec: _tile_print(codec, head_size(config)) for pair in pairs for codec in pair}
        return {**cache.to_json(), "codecs": print_of}

    def check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTimeError

    # Windows.

    def windows(
        self,
        study: str,
        found: Sequence[Sample],
        caches: Sequence[CacheSpec | Peer],
        mode: str = "emulated",
        *,
        first: int,
        prompt: int = 0,
        chunk: int = 1,
    ) -> None:
        """Every cache on every window, positions `first` on scored. Peers run chunked, whatever the mode."""
        for number, sample in enumerate(found):
            wanted = []
            for cache in caches:
                own = "chunked" if isinstance(cache, Peer) else mode
                key = self.key("window", own, first, prompt, chunk, self.identity(cache), sample.name)
                if key not in self.store:
                    wanted.append((cache, own, key))
                elif self.store.lines[key]["study"] == DEFAULTS != study:  # measured for that table, wanted in this too
                    self.store.add({**self.store.lines[key], "study": study})
            if not wanted:
                continue
            work = task(self.loaded, [sample.ids], prompt=prompt, skip=first)
            ours = [cache for cache in caches if isinstance(cache, CacheSpec)]
            reference = work.reference(shared=work.common_start(ours, mode))
            for cache, own, key in wanted:
                self.check_time()
                began = time.perf_counter()
                line = self._window(work, cache, own, Feed(prompt, chunk, first), reference)
                self._exact(sample, work, reference, first)
                where = {"text": sample.text, "place": sample.place, "sample": f"{sample.name}-{first}"}
                setting = {"mode": own, "length": len(sample.ids), "first": first, "prompt": prompt, "chunk": chunk}
                seconds = round(time.perf_counter() - began, 2)
                said = {"kind": "window", "study": study, **self.about, **describe(cache), **setting, **where}
                self.store.add({"key": key, **said, **line, "seconds": seconds})
                self.say(f"{study} {number + 1}/{len(found)} {own} {said['label']}: "
                         f"KLD {line['mean']:.5f}, {seconds:.1f} s")  # fmt: skip

    @torch.no_grad()
    def _window(self, work: Task, cache: CacheSpec | Peer, mode: str, feed: Feed, reference: Reference) -> Line:
        ids = work.ids[0]
        if isinstance(cache, Peer):
            run: Any = PeerRun(work.model, ids, cache, feed)
        else:
            check_packed(work, cache, mode, feed.chunk)
            prefix = reference.prefix(0) if mode == "emulated" else None
            run = Run(work.model, ids, cache, mode, feed, prefix=prefix)
        columns: list[list[Tensor]] = [[], [], [], []]
        at = feed.first
        for exact, logits in _paired(run, reference, 0):
            for column, x in zip(columns, _score(logits, exact, ids[at + 1 : at + 1 + len(logits)]), strict=True):
                column.append(x.cpu())
            at += len(logits)
        if isinstance(cache, CacheSpec):
            _check_read(run.coded_queries, cache, mode)
        nll, _, kld, same = (torch.cat(column).double().numpy() for column in columns)
        packed = {"nll": pack_floats(nll), "kld": pack_floats(kld), "same": pack_bits(same.astype(bool))}
        return {"tokens": len(nll), "mean": float(kld.mean()), **packed}

    def _exact(self, sample: Sample, work: Task, reference: Reference, first: int) -> None:
        name = f"{sample.name}-{first}"
        key = self.key(EXACT, name)
        if key in self.store:
            return
        targets = work.ids[0][first + 1 :]
        nll, at = [], 0
        for block in reference.blocks(0):
            nll.append(-block.gather(1, targets[at : at + len(block), None].to(block.device))[:, 0].cpu())
            at += len(block)
        line = {"key": key, "kind": EXACT, **self.about, "sample": name, "text": sample.text, "place": sample.place}
        self.store.add({**line, "nll": pack_floats(torch.cat(nll).numpy())})

    # The stepwise anchor.

    def anchor(self, found: Sequence[Sample], specs: Sequence[CacheSpec], prompt: int, tokens: int) -> None:
        """The same tokens, `prompt` of them in a first call and `tokens` scored, token by token through the fused
        kernel (mode stepwise) and in mode emulated.
        """
        cut = [replace(sample, ids=sample.ids[: prompt + tokens + 1]) for sample in found]
        for mode in ("stepwise", "emulated"):
            self.windows(ANCHOR, cut, specs, mode, first=prompt, prompt=prompt)

    # Bytes.

    def held(self, sample: Sample, caches: Sequence[CacheSpec | Peer], *, prompt: int, chunk: int) -> None:
        """Bits per value that every cache holds after a window, everything included, of a model in 16 bits."""
        for cache in caches:
            tokens = len(sample.ids) - 1
            key = self.key("bytes", tokens, prompt, chunk, self.identity(cache))
            if key in self.store:
                continue
            self.check_time()
            self.say(f"bytes of {cache.name if isinstance(cache, Peer) else cache.label}")
            dense = self._sixteen(sample)
            if isinstance(cache, Peer):
                size = held_bytes(fill_peer(cache, dense, self.model.config, prompt, chunk))
            else:
                size = int(fill(cache, dense, self.model.config).nbytes)
            bits = 16 * size / dense_bytes(dense)
            said = {"kind": "bytes", **self.about, **describe(cache), "length": len(sample.ids)}
            self.store.add({"key": key, **said, "held": bits, "bits": self.bits(cache)})

    def _sixteen(self, sample: Sample) -> Any:
        from .showcase import cast_cache

        if self._dense is None or self._dense[0] != len(sample.ids):
            self._dense = (len(sample.ids), cast_cache(prefill(self.model, sample.ids), torch.bfloat16))
        return self._dense[1]

    def bits(self, cache: CacheSpec | Peer) -> float | None:
        """Honest bits per value of full tiles (codes, scales, all metadata); None for a peer."""
        if isinstance(cache, Peer):
            return None
        config = self.model.config
        return cache.bits(head_size(config), layers=full_layers(config))


@lru_cache
def _tile_print(codec: str, head_dim: int) -> str:
    """A hash of what a codec makes of one fixed tile of keys."""
    import kvpack

    x = np.random.default_rng(0).standard_normal((TILE, head_dim)).astype(np.float32)
    coder = kvpack.codec(codec, head_dim=head_dim, side="key")
    return hashlib.sha256(np.asarray(coder.encode(x).data).tobytes()).hexdigest()[:16]


def describe(cache: CacheSpec | Peer) -> Line:
    """How a line names its cache."""
    if isinstance(cache, Peer):
        return {"label": cache.name, "peer": True, "window": None, "sinks": None}
    return {"label": cache.label, "peer": False, "window": cache.window, "sinks": cache.sinks}


def available(peers: Sequence[Peer], say: Callable[[str], None]) -> list[Peer]:
    """The peers that can be run here; says why another cannot."""
    out = []
    for one in peers:
        if one.missing:
            say(f"skipped: {one.missing}")
        else:
            out.append(one)
    return out
