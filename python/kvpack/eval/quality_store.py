"""What `benchmarks/quality.py` has measured: a JSONL file, a line per finished measurement, in any order.

A line says all that its figures depend on (`key` is a hash of it), and holds them per token, so that lines from
several runs, and of several windows, can be put together later, and compared token by token:

    kind "window"    one cache on one window: `nll` and `kld` (nats), `same` (top-1), per scored token
    kind "exact"     the exact cache on the same window: `nll`
    kind "bytes"     what a cache holds, in bits per value of a 16-bit model
    kind "needle"    one passkey at one depth: found or not

Arrays are base64 of little-endian float32, or of packed bits.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .measure import summary
from .metrics import TokenScores
from .row_store import append_row

Line = dict[str, Any]


def pack_floats(x: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(x, dtype="<f4").tobytes()).decode("ascii")


def unpack_floats(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


def pack_bits(x: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(x).tobytes()).decode("ascii")


def unpack_bits(text: str, count: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(np.bool_)


class Store:
    """The lines of a JSONL file by key; `add` appends one. A last line that was cut off is ignored."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: dict[str, Line] = {}
        if path is not None and path.is_file():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                    self.lines[str(line["key"])] = line
                except (ValueError, KeyError, TypeError):
                    continue

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def add(self, line: Line) -> None:
        self.lines[line["key"]] = line
        if self.path is not None:
            append_row(self.path, line)

    def find(self, kind: str, **wanted: Any) -> Iterator[Line]:
        """Lines of a kind whose fields have these values."""
        for line in self.lines.values():
            if line.get("kind") == kind and all(line.get(name) == value for name, value in wanted.items()):
                yield line


def scores(lines: list[Line], exact: dict[str, Line]) -> tuple[TokenScores, NDArray[np.int64]]:
    """Window lines of one cache, put together, and every token's position. exact: "exact" lines by sample."""
    lines = sorted(lines, key=lambda line: str(line["sample"]))
    nll, reference, kld, same, window, place, position = [], [], [], [], [], [], []
    for number, line in enumerate(lines):
        a = unpack_floats(line["nll"])
        nll.append(a)
        reference.append(unpack_floats(exact[line["sample"]]["nll"]))
        kld.append(unpack_floats(line["kld"]))
        same.append(unpack_bits(line["same"], len(a)))
        window.append(np.full(len(a), number))
        place.append(np.full(len(a), int(line["place"])))
        position.append(np.arange(line["first"], line["first"] + len(a)))
    return TokenScores(
        nll=np.concatenate(nll),
        nll_exact=np.concatenate(reference),
        kld=np.concatenate(kld),
        same=np.concatenate(same),
        window=np.concatenate(window).astype(np.int64),
        document=np.concatenate(place).astype(np.int64),
    ), np.concatenate(position).astype(np.int64)


def figures(lines: list[Line], exact: dict[str, Line]) -> dict[str, Any]:
    """Intervals (95 %, clustered by place) of window lines of one cache, as `kvpack.eval.measure.summary`."""
    found, _ = scores(lines, exact)
    groups = metrics.clusters(found.document, found.window)
    return {**summary(found, groups), "tokens": len(found), "windows": len(lines), "clusters": groups}


def ratio(lines: list[Line], others: list[Line], exact: dict[str, Line]) -> metrics.Interval | None:
    """Mean KLD of one cache over that of another, on the windows that both ran; None where there are none."""
    both = {line["sample"] for line in lines} & {line["sample"] for line in others}
    if not both:
        return None
    a, b = (scores([line for line in each if line["sample"] in both], exact)[0] for each in (lines, others))
    return metrics.ratio_interval(a.kld, b.kld, metrics.clusters(a.document, a.window))


def by_position(lines: list[Line], exact: dict[str, Line], edges: list[int]) -> list[metrics.Interval | None]:
    """Mean KLD of the scored tokens at positions edges[i] .. edges[i+1]-1; None where there are none."""
    found, position = scores(lines, exact)
    out: list[metrics.Interval | None] = []
    for low, high in pairwise(edges):
        here = (position >= low) & (position < high)
        if not here.any():
            out.append(None)
            continue
        groups = metrics.clusters(found.document[here], found.window[here])
        out.append(metrics.mean_interval(found.kld[here], groups))
    return out
