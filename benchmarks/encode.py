"""How long encoding takes: every codec, both sides, beside faiss-cpu's scalar quantizers where they are installed.

    python benchmarks/encode.py [--dim 128] [--rounds 15] [--codecs tq4,tcq3]

One thread, rounds that alternate between all contenders, on vectors that fit in the second-level cache: what is
measured is the encoder, not memory. Printed are medians with the 10th and 90th percentile, and the squared error on
Gaussian vectors, so that equal work is compared. faiss: ``pip install faiss-cpu``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import kvpack
from kvpack import isa, ops
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--codecs", default=",".join(name for name in kvpack.codecs() if name != "exact"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, VECTORS, arguments.dim, generator=torch.Generator().manual_seed(0))
    every = contenders(x, arguments.codecs.split(","))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in every}
    for _ in range(arguments.rounds + 1):
        for key, (run, _) in every.items():
            run()  # the vectors are in the cache again, whatever ran before
            began = time.perf_counter()
            for _ in range(CALLS):
                run()
            times[key].append((time.perf_counter() - began) / (CALLS * VECTORS) * 1e9)
    print(f"ISA {isa.active()}, one thread, vectors of {arguments.dim}, {VECTORS} at a time, {CALLS} calls a sample\n")
    print("| codec | side | ns per vector | vectors per second | squared error |")
    print("|---|---|---|---|---|")
    for (name, side), found in times.items():
        low, median, high = np.percentile(found[1:], (10, 50, 90))
        error = every[name, side][1]
        print(f"| {name} | {side} | {median:.0f} [{low:.0f}, {high:.0f}] | {1e9 / median:,.0f} | {error:.5f} |")


if __name__ == "__main__":
    main()
