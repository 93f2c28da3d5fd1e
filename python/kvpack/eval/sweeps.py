"""`sweep`: many codecs and windows on one text; finished rows are kept in a JSONL file and skipped on a
rerun.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .cachespec import CacheSpec
from .measure import Task, divergence, task
from .modes import Progress, check_mode, no_progress
from .results import Divergence, divergence_from


def row_key(work: Task, spec: CacheSpec, mode: str, chunk: int) -> str:
    """What makes a row the same row: everything that its figures depend on, in 16 hex digits."""
    import kvpack

    digest = hashlib.sha256(f"{kvpack.__version__} {kvpack.spec.FORMAT_VERSION}".encode())
    said = [
        work.name,
        str(next(work.model.parameters()).dtype),
        mode,
        chunk,
        work.prompt,
        work.first,
        work.documents,
    ]
    digest.update(json.dumps([said, spec.to_json()], default=str).encode())
    for ids in work.ids:
        digest.update(ids.numpy().tobytes() + b"|")
    digest.update(fingerprint(work.model))
    return digest.hexdigest()[:16]


def fingerprint(model: Any) -> bytes:
    """A few of a model's weights: a local path may hold another model tomorrow."""
    parameters = list(model.parameters())
    chosen = parameters[:: max(1, len(parameters) // 8)]
    return b"".join(p.detach().flatten()[:16].float().cpu().numpy().tobytes() for p in chosen)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Finished rows by key; a last line that was cut off is ignored."""
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                divergence_from(row)
                found[str(row["row"])] = row
            except (ValueError, KeyError, TypeError):
                continue
    return found


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(row, allow_nan=False) + "\n")


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
    progress: Progress = no_progress,
    on_row: Callable[[Divergence, bool], None] | None = None,
) -> list[Divergence]:
    """`divergence` of every cache (see CacheSpec.of) on the same windows; the exact model is computed once.

    path: a JSONL file; rows found there under the same `row_key` are taken over, new ones are appended as
    they finish. on_row(result, taken over) is called for every row. Arguments and errors otherwise as
    `divergence`.
    """
    chunk = check_mode(mode, chunk)
    work = task(model, ids, prompt=prompt, skip=skip)
    specs = [CacheSpec.of(cache) for cache in caches]
    file = Path(path) if path is not None else None
    done = read_rows(file) if file else {}
    reference = None
    results: list[Divergence] = []
    for spec in specs:
        key = row_key(work, spec, mode, chunk)
        if key in done:
            result, taken = divergence_from(done[key]), True
        else:
            reference = reference or work.reference(shared=work.common_start(specs, mode))
            taken = False
            result = divergence(
                model,
                ids,
                spec,
                mode,
                prompt=prompt,
                chunk=chunk,
                skip=skip,
                confidence=confidence,
                reference=reference,
                progress=progress,
            )
            if file:
                append_row(file, {"row": key, **result.to_json()})
        results.append(result)
        if on_row:
            on_row(result, taken)
    return results


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other point betters in both, by growing cost."""
    best, front = float("inf"), []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            front.append(i)
    return front
