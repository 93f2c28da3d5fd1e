"""nbytes is what is there: held against every storage that torch knows, and against the allocator."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import kvpack
from kvpack import ops
from kvpack.hf.memory import KINDS

from . import helpers as h


def storages() -> dict[int, int]:
    """Every tensor storage that Python can reach: address to bytes."""
    gc.collect()
    found: dict[int, int] = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):
            try:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            except RuntimeError:  # left behind by a compiler: a tensor without data has no storage to count
                continue
    return found


def grown(before: dict[int, int]) -> int:
    return sum(size for address, size in storages().items() if address not in before)


SHAPES = [(1, 40), (1, 700), (3, 400)]
COUNTED = [("tq4", *shape) for shape in SHAPES] + [
    (codec, 3, 400) for codec in ("exact", "q8_0", "tq3", "tcq3", "q5_0", "rq4_0:center=mean", "tq2.5", "tqp3", "kivi2")
]


@pytest.mark.parametrize(("codec", "rows", "length"), COUNTED)
def test_against_an_independent_count(codec: str, rows: int, length: int) -> None:
    model = h.llama()
    ids = h.tokens(rows, length)
    h.run(model, h.stock(model), ids[:, :10], [10])  # whatever models keep
    before = storages()
    cache = h.packed(model, key=codec)
    h.run(model, cache, ids, [length - 5])
    assert grown(before) == pytest.approx(cache.nbytes, rel=0.01)


def test_against_the_allocator() -> None:
    """What torch's CPU allocator handed out and did not take back."""
    model = h.llama()
    ids = h.tokens(1, 1500)
    h.run(model, h.packed(model, key="tq4"), ids[:, :300], [200])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cache = h.packed(model, key="tq4")
        h.run(model, cache, ids, [1450])
        gc.collect()
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert held == pytest.approx(cache.nbytes, rel=0.01)


def test_kinds_add_up_and_are_what_they_say() -> None:
    model = h.llama()
    cache = h.packed(model, key="tq4", value="q8_0", window=64, sinks=4)
    h.run(model, cache, h.tokens(1, 64 * 6 + 64 + 4), [64 * 6 + 64 + 4])
    memory = cache.memory()
    assert tuple(memory) == KINDS
    assert sum(memory.values()) == cache.nbytes
    layer = cache.packed_layers[0]
    assert layer.table.tiles == 6
    tile = 64 * 64 * 2 * 2  # values of a tile: tokens, head size, KV heads, layers
    assert memory["codes"] == 6 * tile * (4 + 8) // 8
    assert memory["scales"] == 6 * (2 * 2 * 64 * 2) * (1 + 2)
    assert memory["means"] == 2 * 2 * 6 * (64 + 2)  # keys: a mean for each tile, int8 levels and a scale
    assert memory["workspace"] == memory["other"] == 0
    page = ops.page_bytes(layer.layout)
    assert memory["codes"] + memory["scales"] + memory["means"] + memory["slack"] == 2 * 2 * page
    filling = 2 * 2 * 2 * (320 - 4 * 66)  # of the means to whole lines; layers, pages, heads
    assert memory["slack"] == 2 * 2 * 2 * (ops.record_bytes(layer.layout) + 66) + filling
    assert memory["window"] == 2 * 2 * (64 + 64) * 2 * 64 * 4
    assert memory["sinks"] == 2 * 2 * 4 * 2 * 64 * 4


@pytest.mark.parametrize(
    ("key", "value", "tile", "page"),
    [
        ("tq4:center=tile", "tcq2:center=tile", 66 + 66, 0),
        ("tcq3:center=mean", "tq3", 0, 66 + 66),
        ("rq8_0:center=none", "tq2:center=mean", 0, 66),
        ("tq4:center=none", "q5_0", 0, 0),
        ("tq2.5:center=none", "tq3.5:center=tile", 66, 8 + 8),  # maps
    ],
)
def test_means_are_counted(key: str, value: str, tile: int, page: int) -> None:
    model = h.llama()
    cache = h.packed(model, key=key, value=value, window=0, sinks=4)
    h.run(model, cache, h.tokens(1, 64 * 6 + 4), [64 * 6 + 4])
    memory = cache.memory()
    assert memory["means"] == 2 * 2 * (6 * tile + 2 * page)  # layers, KV heads
    assert sum(memory.values()) == cache.nbytes
    layout = cache.packed_layers[0].layout
    pages = sum(memory[kind] for kind in ("codes", "scales", "means", "slack"))
    assert pages == 2 * 2 * ops.page_bytes(layout)  # layers, pages
    fork = copy.deepcopy(cache)
    assert kvpack.nbytes(cache, fork) < cache.nbytes + memory["window"] + memory["sinks"] + memory["tables"] + 1


def test_shared_pages_count_once() -> None:
    model = h.llama()
    cache = h.packed(model, key="tq4", window=0, sinks=0)
    h.run(model, cache, h.tokens(1, 600), [600])
    alone = cache.memory()
    fork = copy.deepcopy(cache)
    both = kvpack.nbytes(cache, fork)
    own = fork.nbytes - sum(alone[kind] for kind in ("codes", "scales", "slack"))
    assert both == cache.nbytes + own
    cache.batch_repeat_interleave(4)
    assert cache.memory()["codes"] == alone["codes"]
    assert kvpack.nbytes(cache, cache) == cache.nbytes
    cache.reset()
    assert cache.nbytes < 200
    assert cache.memory()["codes"] == 0


def test_cropped_slots_are_slack() -> None:
    model = h.llama()
    cache = h.packed(model, key="tq4", window=0, sinks=0)
    h.run(model, cache, h.tokens(1, 512), [512])
    full = cache.memory()
    assert full["slack"] == 0
    cache.crop(-64 * 3)
    cropped = cache.memory()
    assert cropped["codes"] == full["codes"] * 5 // 8
    assert cropped["slack"] == (full["codes"] + full["scales"]) * 3 // 8


def test_ratio_at_8k() -> None:
    """tq4/tq3 in bf16, window 128, 8k tokens of SmolLM2's shape: 3.7 times smaller, everything included."""
    from transformers import LlamaConfig

    config = LlamaConfig(**{**h.SHAPE, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3})
    cache = kvpack.Cache(config, key="tq4", value="tq3", window=128)
    new = torch.randn(1, 3, 8192, 64, dtype=torch.bfloat16)
    for layer in range(2):
        cache.update(new, new, layer)
    assert 2 * 2 * new.numel() * 2 / cache.nbytes >= 3.7


def test_other_caches_count_too() -> None:
    model: Any = h.llama()
    theirs = h.stock(model)
    h.run(model, theirs, h.tokens(1, 100), [100])
    assert kvpack.nbytes(theirs) == 2 * 2 * 2 * 100 * 64 * 4
    ours = h.packed(model)
    assert kvpack.nbytes(theirs, ours) == kvpack.nbytes(theirs) + ours.nbytes
