"""One rank of a tensor-parallel run; test_parallel.py starts it with torchrun.

Loads every model in a folder with `tp_plan="auto"`, generates with the caches of test_parallel.CASES, and writes what
it saw to the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import kvpack

from . import helpers as h
from .test_parallel import CASES, prompt


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for name, (model_name, rows, options) in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(folder / model_name, tp_plan="auto").eval()
        model.requires_grad_(False)
        ids, mask = prompt(rows)
        cache = kvpack.Cache(model.config, **options)
        sequences, logits = h.generate(model, cache, ids, new=60, attention_mask=mask)
        stats = cache.stats()
        seen[name] = {
            "sequences": sequences,
            "logits": torch.stack(logits),
            "kv_heads": [layer.layout[4] for layer in cache.packed_layers],
            "fused": [layer.fused_calls for layer in stats],
            "fallback": [layer.fallback_calls for layer in stats],
            "packed": [layer.tokens_packed for layer in stats],
            "nbytes": cache.nbytes,
            "memory": cache.memory(),
        }
    torch.save(seen, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
