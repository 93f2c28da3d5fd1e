"""Tensor parallelism as transformers does it: every rank packs its own KV heads, and the tokens are those of one
process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import kvpack

from . import helpers as h

pytestmark = pytest.mark.full  # starting the processes alone takes 15 s

RANKS = 2
SHAPE = {**h.SHAPE, "vocab_size": h.VOCABULARY + 1}  # ranks share the vocabulary evenly
MODELS = {
    "grouped": lambda: h.build(LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "mha": lambda: h.build(LlamaForCausalLM, LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})),
    "qwen3": lambda: h.build(Qwen3ForCausalLM, Qwen3Config(**SHAPE)),
}
# name: model, lengths of the rows of the prompt (left-padded), options of the cache.
CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "exact": ("grouped", [150], dict(key="exact", window=16)),
    "dense": ("grouped", [150], dict(key="exact", window=16, fused=False)),
    "tq4": ("grouped", [150], dict(key="tq4", value="tq3", window=16)),
    "padded": ("grouped", [150, 90], dict(key="tq4", window=16)),
    "mha": ("mha", [150, 120], dict(key="q8_0", window=16)),
    "qwen3": ("qwen3", [150], dict(key="exact", window=16)),
}


def prompt(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return h.padded(lengths)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of one run over all cases saw."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no distributed package with gloo")
    folder = tmp_path_factory.mktemp("parallel")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run(
        [*launch, "-m", "tests.hf.rank", str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_generate_the_tokens_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    model_name, lengths, options = CASES[name]
    model = MODELS[model_name]()
    ids, mask = prompt(lengths)
    alone = kvpack.Cache(model.config, **options)
    sequences, logits = h.generate(model, alone, ids, new=60, attention_mask=mask)
    want = torch.stack(logits)
    heads = model.config.num_key_value_heads
    for rank in ranks:
        seen = rank[name]
        assert torch.equal(seen["sequences"], sequences)
        # Ranks add up partial sums in another order; that may flip a code of a quantizing codec.
        assert h.error(seen["logits"], want) <= (1e-4 if options["key"] == "exact" else 2e-2)
        assert seen["kv_heads"] == [heads // RANKS] * 2
        fused = options.get("fused", True)
        assert [calls > 0 for calls in seen["fused"]] == [fused] * 2
        assert [bool(reasons) for reasons in seen["fallback"]] == [not fused] * 2
        assert seen["packed"] == [layer.tokens_packed for layer in alone.stats()]
        for kind in ("codes", "scales", "means", "window", "sinks"):
            assert seen["memory"][kind] * RANKS == alone.memory()[kind], kind


def test_ranks_see_the_same(ranks: list[dict[str, Any]]) -> None:
    for name in CASES:
        first, *others = (rank[name] for rank in ranks)
        assert all(torch.equal(first["logits"], other["logits"]) for other in others)
