"""`perplexity` and `divergence`: one cache on some windows of text, in one of the four modes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .attach import check_model
from .cachespec import CacheSpec, full_layers
from .emulation import TILE, packed_tokens
from .errors import NothingPackedError
from .metrics import TokenScores
from .models import LoadedModel
from .modes import EXACT, Feed, Progress, Reference, Run, check_mode, log_probs, no_progress, rows
from .results import Divergence, Perplexity
from .texts import Windows


@dataclass(frozen=True)
class Task:
    """Windows to score with a model, checked: what perplexity, divergence and sweep share."""

    model: Any
    name: str
    text: str
    ids: tuple[Tensor, ...]
    documents: tuple[int, ...]
    prompt: int
    first: int

    @property
    def context(self) -> int:
        return max(map(len, self.ids))

    @property
    def tokens(self) -> int:
        return sum(len(ids) - 1 - self.first for ids in self.ids)

    def reference(self, budget: int = 2 << 30, *, shared: int = 0) -> Reference:
        """The exact model on these windows; pass it to several `divergence` calls to compute it once.

        shared: so many first tokens are run once for all emulated caches, see `common_start`.
        """
        return Reference(self.model, self.ids, self.prompt, self.first, budget, shared)

    def common_start(self, specs: Iterable[CacheSpec], mode: str) -> int:
        """Tokens before which none of these caches has packed anything, and none are scored; 0 unless emulated."""
        if mode != "emulated" or self.prompt:
            return 0
        return min([self.first, *(spec.sinks + spec.window + TILE for spec in specs)])


def task(
    model: Any,
    ids: Tensor | Windows | Sequence[Tensor],
    *,
    prompt: int = 0,
    skip: int | None = None,
    text: str = "",
) -> Task:
    """Checks and gathers what to score.

    model: a causal language model of transformers, or a LoadedModel. ids: int64 [length], [windows, length],
    a sequence of [length], or Windows (which also say which document each is from). prompt: tokens of the
    first call. skip: positions before it are not scored, at least `prompt`; default: a quarter of the
    shortest window, where little is packed yet.
    """
    name = getattr(model, "name", "")
    if isinstance(model, LoadedModel):
        name, model = model.label, model.model
    documents: tuple[int, ...] | None = None
    if isinstance(ids, Windows):
        text, documents = text or ids.name, ids.clusters
    parts: Iterable[Tensor] = [ids] if isinstance(ids, Tensor) and ids.dim() == 1 else ids
    windows = tuple(part.reshape(-1).to("cpu", torch.int64) for part in parts)
    if not windows:
        raise ValueError("no windows of tokens to score: at least one is needed")
    shortest = min(map(len, windows))
    if prompt < 0:
        raise ValueError(f"prompt={prompt} is not allowed: 0 or more tokens")
    first = max(prompt, shortest // 4 if skip is None else skip)
    if not 0 <= first < shortest - 1:
        raise ValueError(f"scoring from position {first} leaves nothing of a window of {shortest} tokens")
    name = str(name or getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Task(model, name, text, windows, documents or tuple(range(len(windows))), prompt, first)


def check_packed(work: Task, spec: CacheSpec, mode: str, chunk: int) -> None:
    """Raises before any work where the model cannot be emulated, or the window rule alone says that nothing
    will be packed.
    """
    if mode in ("fake", "emulated"):
        check_model(work.model)
    if spec.policy is not None:
        config = work.model.config
        spec.policy.check(int(config.get_text_config(decoder=True).num_hidden_layers), full_layers(config))
    if mode == "fake":
        return
    last = max(Feed(work.prompt, chunk, work.first).calls(work.context - 1))[0]
    if packed_tokens(last, spec.window, spec.sinks) == 0:
        raise NothingPackedError(
            f"nothing would be packed: the last call starts at position {last}, and the first tile of 64 tokens "
            f"is packed at {spec.sinks + spec.window + 64} (sinks {spec.sinks} + window {spec.window} + 64). "
            "Use longer windows of text, a smaller window, or smaller chunks"
        )


def _check_read(coded: int, spec: CacheSpec, mode: str) -> None:
    if coded == 0:
        raise NothingPackedError(
            f"no query attended to a token that went through {spec.label} (mode {mode}, window "
            f"{spec.window}): the run measured nothing about the codec"
        )


@torch.no_grad()
def _score(logits: Tensor, exact: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    """nll, nll of the exact model, kld and top-1 agreement, each [n]; `exact` log-probabilities [n,
    vocabulary].
    """
    q = log_probs(logits)
    at = targets.to(q.device)[:, None]
    nll = -q.gather(1, at)[:, 0]
    if exact is None:
        return (nll,)
    p = exact.to(q.device)
    same = p.argmax(-1) == q.argmax(-1)
    kld = (p.exp() * (p - q)).sum(-1)
    return nll, -p.gather(1, at)[:, 0], kld, same


def _paired(run: Run, reference: Reference | None, index: int) -> Iterator[tuple[Tensor | None, Tensor]]:
    """(exact log-probabilities or None, logits) of the same positions, to the end of the run."""
    blocks = iter(run)
    if reference is None:
        for logits in blocks:
            yield None, logits
        return
    take = rows(blocks)
    for exact in reference.blocks(index):
        yield exact, take(len(exact))
    for _ in blocks:  # lets the run come to its end, where it says what it read
        raise AssertionError("a run yielded more positions than its reference")


def score(
    work: Task,
    spec: CacheSpec | None,
    mode: str = "emulated",
    *,
    chunk: int = 1,
    reference: Reference | None = None,
    progress: Progress = no_progress,
) -> tuple[TokenScores, Run]:
    """Per-token scores of a cache (None: the stock one), and the last window's run."""
    columns: list[list[Tensor]] = [[], [], [], []]
    window: list[int] = []
    coded = 0
    what = f"{mode} {spec.label}" if spec is not None else EXACT
    feed = Feed(0 if mode == "fake" else work.prompt, chunk, work.first)
    run: Run | None = None
    for index, ids in enumerate(work.ids):
        # What is exact up to the end of the first call need not be computed for every codec.
        shared = reference is not None and mode in (EXACT, "emulated")
        prefix = reference.prefix(index) if reference is not None and shared else None
        run = Run(work.model, ids, spec, mode, feed, prefix=prefix, measure=index == len(work.ids) - 1)
        at = work.first
        for exact, logits in _paired(run, reference, index):
            targets = ids[at + 1 : at + 1 + len(logits)]
            for column, x in zip(columns, _score(logits, exact, targets), strict=False):
                column.append(x.cpu())
            at += len(logits)
            window += [index] * len(logits)
            progress(what, len(window), work.tokens)
        coded += run.coded_queries
    if spec is not None:
        _check_read(coded, spec, mode)
    assert run is not None
    joined = [torch.cat(column).double().numpy() if column else np.zeros(0) for column in columns]
    windows = np.array(window, dtype=np.int64)
    scores = TokenScores(
        nll=joined[0],
        nll_exact=joined[1],
        kld=joined[2],
        same=joined[3].astype(bool),
        window=windows,
        document=np.array(work.documents, dtype=np.int64)[windows],
    )
    run.coded_queries = coded
    return scores, run


def _setting(
    work: Task, spec: CacheSpec | None, mode: str, chunk: int, run: Run, scores: TokenScores, started: float
) -> tuple[dict[str, Any], metrics.Clusters]:
    groups = metrics.clusters(scores.document, scores.window)
    parameter = next(work.model.parameters())
    return {
        "mode": mode,
        "key": spec.key if spec else "",
        "value": spec.value_codec if spec else "",
        "window": 0 if spec is None or mode == "fake" else spec.window,
        "sinks": spec.sinks if spec else 0,
        "policy": spec.policy.label if spec is not None and spec.policy is not None else "",
        "fused": spec.fused if spec is not None and mode in ("chunked", "stepwise") else False,
        "prompt": 0 if mode == "fake" else work.prompt,
        "chunk": chunk,
        "model": work.name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "text": work.text,
        "windows": len(work.ids),
        "context": work.context,
        "tokens": len(scores),
        "coded_queries": run.coded_queries,
        "clusters": groups.count,
        "cluster_kind": groups.kind,
        "cache_bytes": run.cache_bytes,
        "dense_bytes": run.dense_bytes,
        "seconds": time.perf_counter() - started,
    }, groups


def perplexity(
    model: Any,
    ids: Any,
    cache: Any = None,
    mode: str = "emulated",
    *,
    prompt: int = 0,
    chunk: int | None = None,
    skip: int | None = None,
    confidence: float = 0.95,
    progress: Progress = no_progress,
) -> Perplexity:
    """Perplexity of a model on windows of tokens, under a cache.

    model, ids, prompt, skip: see `task`. cache: a dict of kvpack.Cache arguments, a kvpack.Policy, a
    CacheSpec, "tq4/tq3", a function from config to cache, or None for the exact stock cache. mode, chunk: see
    `kvpack.eval.modes`.

    Raises NothingPackedError if no query attended to a token that went through the codec, EmulationError if
    the model's attention cannot be emulated, ValueError for what is not allowed.
    """
    started = time.perf_counter()
    chunk = check_mode(mode, chunk)
    work = task(model, ids, prompt=prompt, skip=skip)
    spec = None if cache is None else CacheSpec.of(cache)
    if spec is None:
        mode = EXACT
    else:
        check_packed(work, spec, mode, chunk)
    scores, run = score(work, spec, mode, chunk=chunk, progress=progress)
    fields, groups = _setting(work, spec, mode, chunk, run, scores, started)
    interval = metrics.perplexity_interval(scores.nll, groups, confidence)
    return Perplexity(**fields, confidence=confidence, ppl=interval)


def divergence(
    model: Any,
    ids: Any,
    cache: Any,
    mode: str = "emulated",
    *,
    prompt: int = 0,
    chunk: int | None = None,
    skip: int | None = None,
    confidence: float = 0.95,
    reference: Reference | None = None,
    progress: Progress = no_progress,
) -> Divergence:
    """Divergence of a model under a cache from the same model with the exact stock cache, on the same tokens.

    Arguments and errors as `perplexity`. reference: from `task(...).reference()` with the same model, ids,
    prompt and skip, so that several caches share the exact model's work.
    """
    started = time.perf_counter()
    chunk = check_mode(mode, chunk)
    work = task(model, ids, prompt=prompt, skip=skip)
    spec = CacheSpec.of(cache)
    check_packed(work, spec, mode, chunk)
    if reference is None:
        reference = work.reference(budget=0)
    elif (reference.feed.prompt, reference.feed.first) != (work.prompt, work.first):
        raise ValueError("this reference was made with another prompt or skip: make it from the same task")
    scores, run = score(work, spec, mode, chunk=chunk, reference=reference, progress=progress)
    fields, groups = _setting(work, spec, mode, chunk, run, scores, started)
    fields["dense_bytes"] = reference.dense_bytes
    return Divergence(**fields, confidence=confidence, **summary(scores, groups, confidence))


def summary(scores: TokenScores, groups: metrics.Clusters, confidence: float = 0.95) -> dict[str, Any]:
    """The figures of a Divergence from its per-token scores."""
    median, p90, p99 = metrics.percentile_intervals(scores.kld, groups, (50, 90, 99), confidence)
    return {
        "kld": metrics.mean_interval(scores.kld, groups, confidence),
        "kld_median": median,
        "kld_p90": p90,
        "kld_p99": p99,
        "kld_max": float(scores.kld.max()),
        "top1": metrics.share_interval(scores.same, groups, confidence),
        "ppl": metrics.perplexity_interval(scores.nll, groups, confidence),
        "ppl_exact": metrics.perplexity_interval(scores.nll_exact, groups, confidence),
        "ppl_ratio": metrics.perplexity_interval(scores.nll - scores.nll_exact, groups, confidence),
    }
