"""How long encoding takes: every codec, both sides, beside faiss-cpu's scalar quantizers where they are installed.

    python benchmarks/encode.py [--dim 128] [--rounds 15] [--codecs tq4,tcq3] [--levels avx512_vbmi,avx2]

One thread, rounds that alternate between all contenders, on vectors that fit in the second-level cache: what is
measured is the encoder, not memory. Printed are medians with the 10th and 90th percentile, and the squared error on
Gaussian vectors, so that equal work is compared. faiss: ``pip install faiss-cpu``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attend import processor

import kvpack
from kvpack import isa, ops
from kvpack.eval.quality_report import write_doc
from kvpack.spec import SIDES, parse, side_index

FAISS = ("QT_2bit_eden", "QT_3bit_eden", "QT_4bit_eden", "QT_8bit")
VECTORS, CALLS = 1024, 4


def contenders(x: torch.Tensor, codecs: list[str]) -> dict[tuple[str, str], tuple[Callable[[], Any], float]]:
    """What is timed, by name and side, with its relative squared error."""
    out: dict[tuple[str, str], tuple[Callable[[], Any], float]] = {}
    power = float((x**2).mean())
    for text in codecs:
        for side in SIDES:
            coder = kvpack.codec(text, head_dim=x.shape[-1], side=side)
            error = float(((torch.as_tensor(coder.decode(coder.encode(x))) - x) ** 2).mean()) / power
            number, which = parse(text).code(), side_index(side)

            def run(number: int = number, which: int = which) -> Any:
                return ops.encode(x, number, which)

            out[text, side] = (run, error)
    try:
        import faiss
    except ImportError:
        print("faiss-cpu is not installed: its rows are left out\n")
        return out
    rows = x.reshape(-1, x.shape[-1]).numpy()
    faiss.omp_set_num_threads(1)
    for name in FAISS:
        quantizer = faiss.ScalarQuantizer(rows.shape[1], getattr(faiss.ScalarQuantizer, name))
        quantizer.train(rows)
        error = float(((quantizer.decode(quantizer.compute_codes(rows)) - rows) ** 2).mean()) / power
        out[f"faiss {name}", "-"] = (lambda q=quantizer: q.compute_codes(rows), error)  # type: ignore[misc]
    return out


def table(every: dict[tuple[str, str], tuple[Callable[[], Any], float]], rounds: int) -> str:
    """Times of all contenders, round by round; Markdown."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in every}
    for _ in range(rounds + 1):
        for key, (run, _) in every.items():
            run()  # the vectors are in the cache again, whatever ran before
            began = time.perf_counter()
            for _ in range(CALLS):
                run()
            times[key].append((time.perf_counter() - began) / (CALLS * VECTORS) * 1e9)
    lines = ["| codec | side | ns per vector | vectors per second | squared error |", "|---|---|---|---|---|"]
    for (name, side), found in times.items():
        low, median, high = np.percentile(found[1:], (10, 50, 90))
        error = every[name, side][1]
        nanoseconds = f"{median:.0f} [{low:.0f}, {high:.0f}]"
        lines.append(f"| `{name}` | {side} | {nanoseconds} | {1e9 / median:,.0f} | {error:.5f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dim", type=int, default=128)
    add("--rounds", type=int, default=15)
    add("--codecs", default=",".join(name for name in kvpack.codecs() if name != "exact"))
    add("--levels", default="", help="ISA levels, one table each [default: the active one]")
    add("--doc", default="", help="a Markdown file, written between its markers: docs/encode.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, VECTORS, arguments.dim, generator=torch.Generator().manual_seed(0))
    every = contenders(x, arguments.codecs.split(","))
    parts = []
    for level in arguments.levels.split(",") if arguments.levels else [isa.active()]:
        isa.use(level)
        parts.append(
            f"**ISA {level}**, one thread, vectors of {arguments.dim}, {VECTORS} at a time, {CALLS} calls a sample\n\n"
            + table(every, arguments.rounds)
        )
        print(parts[-1] + "\n", flush=True)
    if arguments.doc:
        write_doc(Path(arguments.doc), "\n\n".join([f"{processor()}, {arguments.rounds} rounds.", *parts]))


if __name__ == "__main__":
    main()
