"""Offloading, on a device that is not there: of limited memory, and strict about what lies where.

The mock stands for the copies between host and device: every page that moves is asked of it, and it knows which of the
pages that it brought to the device are still there. Pages that were taken away have no address, so nobody reads them.
"""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpack
from kvpack.hf import offload
from kvpack.hf.memory import memory
from kvpack.hf.offload import Transfer

from ..families.families import model as family
from ..families.families import packed
from . import helpers as h
from .test_sharing import used_bytes

LAYERS = 5
CPU = torch.device("cpu")


class Mock(Transfer):
    """A device with room for some bytes of pages. `log` has what was asked of it, runs of one kind as one entry."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.log: list[str] = []
        self.lent: dict[int, int] = {}
        self.limit = 1 << 40
        self.loading = False
        self.loaded_bytes = self.stored_bytes = 0

    def _say(self, word: str) -> None:
        if self.log[-1:] != [word]:
            self.log.append(word)

    def store(self, x: Tensor) -> Tensor:
        self._say("store")
        self.stored_bytes += x.numel()
        return x.clone()

    def load(self, x: Tensor) -> Tensor:
        self._say("ahead" if self.loading else "load")
        self.loaded_bytes += x.numel()
        there = x.clone()
        self.lent[there.data_ptr()] = there.numel()
        assert sum(self.lent.values()) <= self.limit, "the device is full"
        weakref.finalize(there, self.lent.pop, there.data_ptr())
        return there

    @contextmanager
    def ahead(self) -> Iterator[None]:
        self.loading = True
        yield
        self.loading = False

    def ready(self) -> None:
        assert not self.loading
        self._say("ready")


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    made = Mock()
    monkeypatch.setattr(offload, "transfer", lambda device: made)
    return made


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**h.SHAPE, "num_hidden_layers": LAYERS})


def deep(attention: str = "sdpa") -> Any:
    from transformers import LlamaForCausalLM

    made = config()
    made._attn_implementation = attention
    return h.build(LlamaForCausalLM, made)


def resident(cache: kvpack.Cache) -> list[int]:
    """Layers whose pages are on the device."""
    return [layer.index for layer in cache.packed_layers if layer.table.rows and not layer.table.evicted]


def step(cache: kvpack.Cache, layer: int, tokens: int = 1) -> None:
    new = torch.randn(1, 2, tokens, 64)
    keys, values = cache.update(new, new, layer)
    torch.nn.functional.scaled_dot_product_attention(torch.randn(1, 4, tokens, 64), keys, values, enable_gqa=True)


def test_order_and_residency(mock: Mock) -> None:
    """The layer at work and the next are there; that one comes while this one works; nothing is stored twice."""
    cache = kvpack.Cache(config(), "tq4", window=64, offloading=True)
    for layer in range(LAYERS):
        step(cache, layer, 1000)
        assert resident(cache) == ([layer] if layer < LAYERS - 1 else [0, layer])  # the next one is empty yet
    assert mock.log == ["store", "ahead"]
    size = sum(page.data.numel() for page in cache.packed_layers[0].table.rows[0])
    assert mock.stored_bytes == (LAYERS - 1) * size
    step(cache, 0)
    step(cache, 1)  # the last one leaves for the first time
    assert mock.stored_bytes == LAYERS * size
    mock.limit = 2 * size
    for layer in (2, 3, 4, 0, 1, 2, 3, 4):
        mock.log.clear()
        mock.loaded_bytes = mock.stored_bytes = 0
        step(cache, layer)
        assert resident(cache) == sorted((layer, (layer + 1) % LAYERS))
        # Only the next one is loaded, beside the work on this one; this one is waited for.
        assert mock.log == ["ahead", "ready"]
        assert mock.loaded_bytes == size
        assert mock.stored_bytes == 0  # a page that was not written has its copy
    assert mock.lent.keys() == {
        page.data.data_ptr() for i in (4, 0) for page in cache.packed_layers[i].table.rows[0]
    }  # fmt: skip


def test_what_was_written_is_stored_again(mock: Mock) -> None:
    cache = kvpack.Cache(config(), "tq4", window=0, sinks=0, offloading=True)
    for layer in range(LAYERS):
        step(cache, layer, 64 * 6)
    for layer in range(LAYERS):
        step(cache, layer, 64)
    page = cache.packed_layers[0].table.rows[0][0].data.numel()
    assert [len(layer.table.rows[0]) for layer in cache.packed_layers] == [2] * LAYERS
    for layer in range(LAYERS):
        mock.stored_bytes = 0
        step(cache, layer)  # one token: no tile
        # At the first, the last one leaves, which was written two times; then those that were written once more.
        assert mock.stored_bytes in (0, page)
    mock.stored_bytes = 0
    for layer in range(LAYERS):
        step(cache, layer)
    assert mock.stored_bytes == 0


def test_tokens_are_those_without_offloading(mock: Mock) -> None:
    it = deep()
    ids = h.tokens(2, 260)
    plain = h.packed(it, key="tq4", window=32)
    ours = h.packed(it, key="tq4", window=32, offloading=True)
    chunks = [150, 3, 80]
    assert torch.equal(h.run(it, ours, ids, chunks), h.run(it, plain, ids, chunks))
    assert len(resident(ours)) == 2
    for change in (
        lambda cache: cache.crop(-100),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([3, 0])),
    ):
        change(plain)
        change(ours)
        rows = plain.packed_layers[0].batch
        ids = torch.cat((h.tokens(rows, plain.get_seq_length(), 1), h.tokens(rows, 70, 2)), dim=1)
        assert torch.equal(h.run(it, ours, ids, [60]), h.run(it, plain, ids, [60]))
    assert "load" not in mock.log  # always ahead
    for a, b in zip(ours.packed_layers, plain.packed_layers, strict=True):
        assert used_bytes(a) == used_bytes(b)


@pytest.mark.filterwarnings(h.DECODED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_wait_for_their_padding(mock: Mock, attention: str) -> None:
    """Padded rows in chunks: tokens of a layer may still be pending when another is at work."""
    it = deep(attention)
    ids, mask = h.padded([90, 10, 200])
    made = [h.packed(it, key="tq4", window=0, offloading=on) for on in (True, False)]
    for cache in made:
        if attention == "eager":
            cache.set_padding(mask)
    got, want = (h.run(it, cache, ids, [50, 60, 70], mask) for cache in made)
    assert torch.equal(got, want)
    assert len(resident(made[0])) == 2
    short = kvpack.Cache(config(), offloading=True)
    for layer in range(LAYERS):
        step(short, layer, 20)
    assert not any(layer.away for layer in short.packed_layers)  # there is nothing to take away


def test_generate_and_other_attentions(mock: Mock) -> None:
    it = deep()
    ids = h.tokens(1, 200)
    want, want_logits = h.generate(it, h.packed(it, key="tq4", window=16), ids, 80)
    got, logits = h.generate(it, h.packed(it, key="tq4", window=16, offloading=True), ids, 80)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(logits, want_logits, strict=True))
    dense = h.packed(it, key="tq4", window=16, offloading=True, fused=False)
    assert h.error(torch.stack(h.generate(it, dense, ids, 8)[1]), torch.stack(want_logits[:8])) < 0.05


def test_the_interface_of_transformers(mock: Mock) -> None:
    """offload and prefetch of single layers, without `offloading=True`; what is needed comes back by itself."""
    cache = h.packed(deep(), key="tq4", window=0)
    for layer in range(LAYERS):
        step(cache, layer, 500)
    before = [layer.keys.clone() for layer in cache.packed_layers]
    nbytes = cache.nbytes
    key, _ = cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 2)
    for layer in (1, 2, 4):
        cache.offload(layer)
        cache.offload(layer)
    assert resident(cache) == [0, 3]
    assert cache.nbytes == nbytes  # where it lies does not matter
    with pytest.raises(RuntimeError, match="keys and values of layer 2 were used after the cache was .*offloaded"):
        key.transpose(1, 2)
    cache.prefetch(4)
    cache.prefetch(LAYERS)  # beyond the last: the first, which is there
    assert resident(cache) == [0, 3, 4]
    page = cache.packed_layers[4].table.rows[0][0]
    assert cache.memory()["host"] == len(cache.packed_layers[4].table.rows[0]) * page.data.numel()
    assert torch.equal(cache.packed_layers[1].keys, before[1])
    assert resident(cache) == [0, 1, 3, 4]
    step(cache, 2)
    assert resident(cache) == [0, 1, 2, 3, 4]
    cache.offload(3)
    cache.reset()
    assert cache.memory()["host"] == 0
    step(cache, 3, 500)


def test_forks_copies_and_files_of_offloaded_caches(mock: Mock, tmp_path: Any) -> None:
    cache = kvpack.Cache(config(), "tq4", window=0, sinks=0, offloading=True)
    for layer in range(LAYERS):
        step(cache, layer, 64 * 6)
    mock.stored_bytes = 0
    forks = cache.fork(3)
    assert memory(cache, *forks)["codes"] == cache.memory()["codes"]  # host memory is shared
    cache.save(tmp_path / "a")
    plain = kvpack.Cache.load(tmp_path / "a", config())
    pickled = pickle.loads(pickle.dumps(cache))
    assert resident(pickled) == resident(cache)
    torch.manual_seed(1)
    new = [torch.randn(1, 2, 64, 64) for _ in range(8)]
    for other in (cache, *forks, pickled):
        other.offloading = other is not forks[0]  # it goes on without
        for tokens in new[:2] if other is forks[1] else new:
            for layer in range(LAYERS):
                other.update(tokens, tokens, layer)
    for tokens in new:
        for layer in range(LAYERS):
            plain.update(tokens, tokens, layer)
    for i in range(LAYERS):
        want = plain.packed_layers[i].keys
        for other in (cache, forks[0], forks[2], pickled):
            assert torch.equal(other.packed_layers[i].keys, want)
        assert torch.equal(forks[1].packed_layers[i].keys, want[:, :, : 64 * 8])


def test_to_from_the_host_does_not_mix_owners(mock: Mock) -> None:
    """Pages in host memory may be those of a fork, too: neither writes into the other's."""
    cache = h.packed(deep(), key="tq4", window=0, sinks=0)
    for layer in range(LAYERS):
        step(cache, layer, 64 * 6)
        cache.offload(layer)
    fork = copy.deepcopy(cache)
    assert cache.to("cpu") is cache
    fork.to("cpu")
    assert resident(cache) == resident(fork) == list(range(LAYERS))
    before = cache.packed_layers[0].keys.clone()
    one, other = (torch.randn(1, 2, 64, 64) for _ in range(2))
    cache.update(one, one, 0)
    fork.update(other, other, 0)
    for layer, new in ((cache.packed_layers[0], one), (fork.packed_layers[0], other)):
        alone = h.packed(deep(), key="tq4", window=0, sinks=0)
        alone.update(new, new, 0)
        assert torch.equal(layer.keys[:, :, : 64 * 6], before)
        assert torch.equal(layer.keys[:, :, 64 * 6 :], alone.packed_layers[0].keys)


@pytest.mark.parametrize("only_non_sliding", [True, False])
def test_stock_layers_move_as_transformers_has_it(mock: Mock, monkeypatch: Any, only_non_sliding: bool) -> None:
    it = family("gemma3")
    calls: list[str] = []
    ids = h.tokens(1, 60)
    cache = packed(it.config, key="tq4", offloading=True, offload_only_non_sliding=only_non_sliding)
    for name in ("offload", "prefetch"):
        monkeypatch.setattr(cache.layers[0], name, lambda name=name: calls.append(name))
    want = h.run(it, packed(it.config, key="tq4"), ids, [50])
    assert torch.equal(h.run(it, cache, ids, [50]), want)
    assert calls == ([] if only_non_sliding else ["prefetch", "offload"] * 11)


def test_on_the_cpu_it_says_that_it_does_nothing() -> None:
    it = h.llama()
    ids = h.tokens(1, 200)
    cache = h.packed(it, key="tq4", offloading=True)
    with pytest.warns(UserWarning, match="offloading=True does nothing where keys and values are on cpu") as told:
        got = h.run(it, cache, ids, [150])
    assert len(told) == 1
    assert torch.equal(got, h.run(it, h.packed(it, key="tq4"), ids, [150]))
    cache.offload(0)
    cache.prefetch(0)
    assert offload.transfer(CPU) is None


def test_transfers_without_a_stream() -> None:
    transfer = Transfer(CPU)
    x = torch.arange(100, dtype=torch.uint8)
    assert transfer.stream is None
    stored = transfer.store(x)
    with transfer.ahead():
        loaded = transfer.load(stored)
    transfer.ready()
    assert stored.data_ptr() != x.data_ptr()
    assert torch.equal(loaded, x)


def test_to() -> None:
    it = family("gemma3")
    ids = h.tokens(2, 100)
    cache, plain = packed(it.config, key="tq4"), packed(it.config, key="tq4")
    h.run(it, cache, ids[:, :80], [80])
    h.run(it, plain, ids[:, :80], [80])
    assert cache.to("cpu").to(CPU) is cache
    assert torch.equal(h.run(it, cache, ids, []), h.run(it, plain, ids, []))
    with pytest.raises(ValueError, match="would lose the tokens"):
        cache.to("meta")
    with pytest.raises(RuntimeError, match="device"):
        cache.to("nowhere")


def test_the_order_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: what is loaded ahead waits for the work before it, and the work after it waits for what was loaded."""
    said: list[str] = []

    class Stream:
        def __init__(self, device: object = None, name: str = "own") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        said.append(f"in {stream.name}")
        yield
        said.append(f"out of {stream.name}")

    current = Stream(name="current")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    transfer = Transfer(torch.device("cuda", 0))
    with transfer.ahead():
        said.append("load")
    transfer.ready()
    assert said == ["own waits for current", "in own", "load", "out of own", "current waits for own"]
