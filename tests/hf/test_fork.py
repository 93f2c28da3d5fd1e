"""fork: continuations that share packed pages, and know nothing of each other."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import kvpack
from kvpack.hf.pages import PageTable

from ..families.families import model, packed
from . import helpers as h
from .test_memory import grown, storages
from .test_sharing import distinct, used_bytes


def prefix(tokens: int, codec: str = "tq4") -> kvpack.Cache:
    """A cache of two layers with random tokens, without a model."""
    cache = h.packed(h.llama(), key=codec, window=128)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.update(*(torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(2)), layer)
    return cache


def exact_bytes(cache: kvpack.Cache) -> int:
    memory = cache.memory()
    return memory["window"] + memory["sinks"]


def test_sixteen_forks_weigh_little_more_than_one() -> None:
    cache = prefix(8192)
    before = storages()
    forks = cache.fork(16)
    assert len(forks) == 16
    limit = 1.1 * cache.nbytes + 16 * exact_bytes(cache)
    assert kvpack.nbytes(cache, *forks) <= limit
    assert cache.nbytes + grown(before) == pytest.approx(kvpack.nbytes(cache, *forks), rel=0.01)
    assert grown(before) <= 0.1 * cache.nbytes + 16 * exact_bytes(cache)
    shared = distinct(*cache.packed_layers)
    # Each goes on by a tile: a copy of the page that is not full, not of any other.
    for seed, fork in enumerate(forks):
        generator = torch.Generator().manual_seed(seed)
        for layer in range(2):
            new = torch.randn(1, 2, 64, 64, generator=generator)
            fork.update(new, new, layer)
    new_pages = distinct(*(layer for fork in forks for layer in fork.packed_layers)) - shared
    assert len(new_pages) <= 2 * 16
    assert kvpack.nbytes(cache, *forks) == pytest.approx(cache.nbytes + grown(before), rel=0.01)


def test_each_fork_is_the_cache_alone() -> None:
    """Different texts after one prefix, in turns: logits as without the others."""
    it = h.llama()
    text = h.tokens(1, 300)
    cache = h.packed(it, key="tq4", window=32)
    h.run(it, cache, text, [300])
    forks = cache.fork(3)
    texts = [torch.cat((text, h.tokens(1, 150, seed)), dim=1) for seed in (1, 2, 3)]
    for fork, ids in zip(forks, texts, strict=True):
        h.run(it, fork, ids[:, :390], [90])
    for fork, ids in zip(forks, texts, strict=True):
        alone = h.packed(it, key="tq4", window=32)
        h.run(it, alone, ids[:, :390], [300, 90])
        assert torch.equal(h.run(it, fork, ids, [20]), h.run(it, alone, ids, [20]))
    assert cache.get_seq_length() == 300


def test_a_crop_leaves_the_others() -> None:
    cache = prefix(1000)
    first, second = cache.fork(2)
    before = [used_bytes(layer) for layer in cache.packed_layers]
    keys = [layer.keys.clone() for layer in cache.packed_layers]
    first.crop(-600)
    new = torch.randn(1, 2, 500, 64)
    for layer in range(2):
        first.update(new, new, layer)
    second.reset()
    assert [used_bytes(layer) for layer in cache.packed_layers] == before
    for layer, held in zip(cache.packed_layers, keys, strict=True):
        assert torch.equal(layer.keys, held)
    assert torch.equal(first.packed_layers[0].keys[:, :, :400], keys[0][:, :, :400])
    assert second.get_seq_length() == 0
    del cache  # pages live as long as anyone holds them
    assert first.packed_layers[0].keys.shape[2] == 900


def test_forks_go_on_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All begin in the page that they share, at the same time: one writes it, the others copy."""
    make = PageTable._new

    def slow(self: PageTable, *args: Any) -> Any:
        time.sleep(0.02)
        return make(self, *args)

    monkeypatch.setattr(PageTable, "_new", slow)
    cache = h.packed(h.small(), key="tq4", window=0, sinks=0)
    text, *more = (torch.randn(1, 2, 64 * 6, 64, generator=torch.Generator().manual_seed(i)) for i in range(4))
    cache.update(text, text, 0)
    forks = cache.fork(3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda fork, new: fork.update(new, new, 0), forks, more))
    for fork, new in zip(forks, more, strict=True):
        alone = h.packed(h.small(), key="tq4", window=0, sinks=0)
        for tokens in (text, new):
            alone.update(tokens, tokens, 0)
        assert used_bytes(fork.packed_layers[0]) == used_bytes(alone.packed_layers[0])


@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_layers_that_are_not_packed_fork_too(name: str) -> None:
    it = model(name)
    ids = h.tokens(1, 120)
    cache = packed(it.config, key="tq4")
    h.run(it, cache, ids[:, :100], [100])
    one, other = cache.fork(2)
    h.run(it, one, torch.cat((ids[:, :100], h.tokens(1, 30, 5)), dim=1), [])
    assert torch.equal(h.run(it, other, ids, []), h.run(it, cache, ids, []))


def test_forks_of_rows_forks_and_empty_caches() -> None:
    it = h.llama()
    ids = h.tokens(1, 200)
    (empty,) = h.packed(it).fork(1)
    h.run(it, empty, ids, [200])
    cache = prefix(500)
    cache.batch_repeat_interleave(2)
    (fork,) = cache.fork(1)[0].fork(1)
    assert distinct(*fork.packed_layers) == distinct(*cache.packed_layers)
    assert fork.policy == cache.policy
    assert fork.packed_layers[0].batch == 2


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_bad_counts(count: Any) -> None:
    with pytest.raises(ValueError, match=r"fork\(.*\) is not allowed: a whole number of caches, 1 or more"):
        h.packed(h.llama()).fork(count)
