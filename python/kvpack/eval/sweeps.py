"""`sweep`: many codecs and windows on one text, one after the other or side by side; finished rows are kept on disk
and skipped on a rerun.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import farm as farms
from .cachespec import CacheSpec
from .errors import IncompleteSweepError
from .measure import Task, check_packed, divergence, task
from .modes import Progress, Reference, check_mode, no_progress
from .results import Divergence
from .row_store import RowStore


def row_key(work: Task, spec: CacheSpec, mode: str, chunk: int, confidence: float) -> str:
    """What makes a row the same row: everything that its figures depend on, in 16 hex digits."""
    import kvpack
    from kvpack.hf.fingerprint import of_weights

    digest = hashlib.sha256(f"{kvpack.__version__} {kvpack.spec.FORMAT_VERSION}".encode())
    said = [
        work.name,
        str(next(work.model.parameters()).dtype),
        mode,
        chunk,
        work.prompt,
        work.first,
        work.documents,
        confidence,
    ]
    digest.update(json.dumps([said, spec.to_json()], default=str).encode())
    for ids in work.ids:
        digest.update(ids.numpy().tobytes() + b"|")
    digest.update(of_weights(work.model).encode())
    return digest.hexdigest()[:16]


def fingerprint(model: Any) -> bytes:
    """A few of a model's weights: a local path may hold another model tomorrow."""
    parameters = list(model.parameters())
    chosen = parameters[:: max(1, len(parameters) // 8)]
    return b"".join(p.detach().flatten()[:16].float().cpu().numpy().tobytes() for p in chosen)


def grid(codecs: Iterable[str], windows: Iterable[int], sinks: int = 4, **options: Any) -> list[CacheSpec]:
    """Every codec ("tq4" or "tq4/tq3") with every window, in this order; a policy (a preset's name, or the path of a
    .json file) once, with its own window and sinks.
    """
    sizes, out = list(windows), []
    for codec in codecs:
        if CacheSpec.names_policy(codec):
            out.append(CacheSpec.parse(codec, **options))
        else:
            out += [CacheSpec.parse(codec, window=window, sinks=sinks, **options) for window in sizes]
    return out


@dataclass(frozen=True)
class Measuring:
    """What the rows of a sweep have in common. Called, it gives the function that measures a cache: the exact model's
    results are computed once for all that it measures. A worker process is sent this, and calls it.
    """

    model: Any
    ids: Any
    mode: str
    prompt: int
    chunk: int
    skip: int | None
    confidence: float
    shared: int  # tokens of `Task.common_start`
    progress: Progress = no_progress

    def __call__(self) -> Callable[[CacheSpec], Divergence]:
        reference: Reference | None = None

        def measure(spec: CacheSpec) -> Divergence:
            nonlocal reference
            if reference is None:
                work = task(self.model, self.ids, prompt=self.prompt, skip=self.skip)
                reference = work.reference(shared=self.shared)
            return divergence(
                self.model,
                self.ids,
                spec,
                self.mode,
                prompt=self.prompt,
                chunk=self.chunk,
                skip=self.skip,
                confidence=self.confidence,
                reference=reference,
                progress=self.progress,
            )

        return measure


def sweep(
    model: Any,
    ids: Any,
    caches: Sequence[Any],
    mode: str = "emulated",
    *,
    prompt: int = 0,
    chunk: int | None = None,
    skip: int | None = None,
    confidence: float = 0.95,
    path: str | Path | None = None,
    farm: farms.Farm | None = None,
    progress: Progress = no_progress,
    on_row: Callable[[Divergence, bool], None] | None = None,
) -> list[Divergence]:
    """`divergence` of every cache (see CacheSpec.of) on the same windows; the exact model is computed once.

    path: a directory, which gets a file for each row, or a file that ends in .jsonl, which gets a line. Rows found
    there under the same `row_key` are taken over, new ones are written as they finish. farm: workers that measure side
    by side, each with a copy of model and windows (`kvpack.eval.ray_farm.RayFarm`); without one, rows are measured
    here, one after the other. on_row(result, taken over) is called for every row: those that are taken over first, the
    others as they finish.

    Arguments and errors otherwise as `divergence`; with a farm, IncompleteSweepError when all that could be measured
    is, and some rows could not.
    """
    chunk = check_mode(mode, chunk)
    work = task(model, ids, prompt=prompt, skip=skip)
    specs = [CacheSpec.of(cache) for cache in caches]
    keys = [row_key(work, spec, mode, chunk, confidence) for spec in specs]
    store = RowStore(Path(path)) if path is not None else None
    rows = store.read() if store else {}
    if on_row:
        for key in keys:
            if key in rows:
                on_row(rows[key], True)
    # Of two equal rows, one is measured.
    left = {key: spec for key, spec in zip(keys, specs, strict=True) if key not in rows}
    for spec in left.values():  # before any work
        check_packed(work, spec, mode, chunk)

    def finished(key: str, row: Divergence) -> None:
        rows[key] = row
        if store:
            store.add(key, row)
        if on_row:
            on_row(row, False)

    shared = work.common_start(specs, mode)
    measuring = Measuring(model, ids, mode, prompt, chunk, skip, confidence, shared, no_progress if farm else progress)
    if farm is None:
        measure = measuring()
        for key, spec in left.items():
            finished(key, measure(spec))
    elif left:
        failed = _side_by_side(farm, measuring, left, finished, progress)
        if failed:
            raise _incomplete(failed, len(left), [rows[key] for key in keys if key in rows], path)
    return [rows[key] for key in keys]


def _side_by_side(
    farm: farms.Farm,
    measuring: Measuring,
    left: dict[str, CacheSpec],
    finished: Callable[[str, Divergence], None],
    progress: Progress,
) -> dict[str, Exception]:
    """Measures what is left; returns what stood in the way of rows that failed, by label and window."""
    keys, specs = list(left), list(left.values())
    what = f"sweep on {min(farm.workers, len(specs))} workers"
    done = 0

    def on_result(index: int, row: Divergence) -> None:
        nonlocal done
        done += 1
        progress(what, done, len(specs))
        finished(keys[index], row)

    progress(what, 0, len(specs))
    failed = farms.run(farm, measuring, specs, on_result)
    return {f"{specs[i].label} with window {specs[i].window}": failed[i] for i in sorted(failed)}


def _incomplete(
    failed: dict[str, Exception], left: int, rows: list[Divergence], path: str | Path | None
) -> IncompleteSweepError:
    """Rows that failed alike are named together."""
    alike: dict[str, list[str]] = {}
    for label, error in failed.items():
        alike.setdefault(str(error) or type(error).__name__, []).append(label)
    said = "; ".join(f"{', '.join(labels)}: {error}" for error, labels in alike.items())
    kept = "in this error's `rows`" if path is None else f"in {path}: run the sweep again to try these once more"
    return IncompleteSweepError(
        f"{len(failed)} of {left} rows were not measured. {said}. The others are {kept}", rows, failed
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other point betters in both, by growing cost."""
    best, front = float("inf"), []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            front.append(i)
    return front
