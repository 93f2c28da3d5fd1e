"""Snapshots: whatever state a cache is in, the one that comes back from the file goes on bit-identically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor
from transformers import LlamaConfig

import kvpack
from kvpack.hf import PackedLayer

from ..families.families import FAMILIES, model
from . import helpers as h
from .test_sharing import distinct, used_bytes

CONFIG = LlamaConfig(**{**h.SHAPE, "num_hidden_layers": 2})


def cache(key: str = "tq4", value: str | None = None, **options: Any) -> kvpack.Cache:
    return kvpack.Cache(CONFIG, key, value, **{"window": 20, **options})


def add(to: kvpack.Cache, count: int, rows: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same random tokens into both layers; what attention reads of layer 1, decoded."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, count, 64, generator=generator).to(dtype) for _ in range(2))
    to.update(keys, values, 0)
    out = to.update(keys, values, 1)
    return [x if isinstance(x, Tensor) else x.dense() for x in out]


def placed(to: kvpack.Cache) -> kvpack.Cache:
    for layer in to.packed_layers:
        layer.nothing_to_learn()
    return to


def load(path: Path, config: Any = CONFIG, **options: Any) -> kvpack.Cache:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kvpack: not packed")
        return kvpack.Cache.load(path, config, **options)


# States, by the tokens that the cache then takes: rows, and how it came to be.


def _empty() -> tuple[int, kvpack.Cache]:
    return 1, cache()


def _told() -> tuple[int, kvpack.Cache]:
    return 2, cache(attention_mask=torch.tensor([[0, 0, 1], [1, 1, 1]]))


def _fewer_than_sinks() -> tuple[int, kvpack.Cache]:
    to = cache(sinks=10)
    add(to, 3)
    return 1, placed(to)


def _window_only() -> tuple[int, kvpack.Cache]:
    to = cache()
    add(to, 40)
    return 1, to


def _pages() -> tuple[int, kvpack.Cache]:
    to = cache(sinks=4)
    add(to, 700)
    return 1, to


def _padded() -> tuple[int, kvpack.Cache]:
    to = cache(attention_mask=torch.tensor([[0] * 30 + [1] * 370, [1] * 400]))
    add(to, 400, rows=2)
    return 2, to


def _waiting() -> tuple[int, kvpack.Cache]:
    """Two rows whose padding nobody has told: nothing is placed yet."""
    to = cache()
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        to.update(*(torch.randn(2, 2, 150, 64, generator=generator) for _ in range(2)), layer)
    assert all(layer.pending is not None for layer in to.packed_layers)
    return 2, to


def _cut() -> tuple[int, kvpack.Cache]:
    """Cut tiles, and slots that hold what is no longer there."""
    to = cache(window=0)
    add(to, 600)
    to.crop(-301)
    add(to, 100, seed=1)
    to.crop(-110)
    return 1, to


def _beams() -> tuple[int, kvpack.Cache]:
    """Rows that share pages, and then differ."""
    to = cache(window=0)
    add(to, 450)
    to.batch_repeat_interleave(3)
    add(to, 90, rows=3, seed=1)
    return 3, to


STATES = (_empty, _told, _fewer_than_sinks, _window_only, _pages, _padded, _waiting, _cut, _beams)


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__[1:])
def test_every_state_comes_back(state: Callable[[], tuple[int, kvpack.Cache]], mmap: bool, tmp_path: Path) -> None:
    rows, ours = state()
    path = tmp_path / "cache.kvpack"
    ours.save(path)
    theirs = load(path, mmap=mmap)
    theirs.save(tmp_path / "again.kvpack")
    assert (tmp_path / "again.kvpack").read_bytes() == path.read_bytes()
    for a, b in zip(ours.packed_layers, theirs.packed_layers, strict=True):
        assert (a.length, a.table.tokens, a.window_count, a.sink_count) == (
            b.length,
            b.table.tokens,
            b.window_count,
            b.sink_count,
        )
        assert len(distinct(a)) == len(distinct(b))
    assert theirs.nbytes == pytest.approx(ours.nbytes, abs=600)  # tables have other room
    before = path.read_bytes()
    for seed, count in enumerate((1, 80, 1, 300)):
        a, b = add(ours, count, rows, seed + 5), add(theirs, count, rows, seed + 5)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        if seed == 1:
            ours.crop(-50)
            theirs.crop(-50)
    assert path.read_bytes() == before


CODECS = [
    ("exact", None),
    ("q8_0", "kivi2"),
    ("tq2.5", "tq3.5:center=tile"),
    ("tqp3", "fp8"),
    ("tcq2.5:center=mean", None),
]


@pytest.mark.parametrize(("key", "value"), CODECS)
def test_codecs(key: str, value: str | None, tmp_path: Path) -> None:
    ours = cache(key, value)
    add(ours, 64 * 5 + 30)
    ours.save(tmp_path / "a")
    theirs = load(tmp_path / "a")
    for a, b in zip(ours.packed_layers, theirs.packed_layers, strict=True):
        assert used_bytes(a) == used_bytes(b)
    for a, b in zip(add(ours, 300, seed=1), add(theirs, 300, seed=1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = cache("tq4")
    add(ours, 200, dtype=dtype)
    ours.save(tmp_path / "a")
    theirs = load(tmp_path / "a")
    found = add(theirs, 3, seed=1, dtype=dtype)
    assert found[0].dtype == dtype
    assert torch.equal(found[0], add(ours, 3, seed=1, dtype=dtype)[0])
    with pytest.raises(ValueError, match="do not continue this cache"):
        add(theirs, 3, dtype=torch.float32)


def test_the_options_come_along(tmp_path: Path) -> None:
    policy = kvpack.Policy.uniform("tq4", "tq3", {1: ("q8_0", "tq2")}, window=17, sinks=3, name="mine")
    ours = kvpack.Cache(CONFIG, policy=policy, precision="high", sparse_values=0.01)
    add(ours, 300)
    ours.save(tmp_path / "a")
    theirs = load(tmp_path / "a")
    assert theirs.policy == policy
    assert theirs.policy.name == "mine"
    assert theirs.options == {"fused": True, "precision": "high", "sparse_values": 0.01}
    assert [str(layer.specs) for layer in ours.packed_layers] == [str(layer.specs) for layer in theirs.packed_layers]
    assert theirs.stats()[0].packed_tokens_read == 0  # counts begin anew
    assert theirs.stats()[0].tokens_packed == ours.stats()[0].tokens_packed


DEFAULT = ("gemma3", "qwen3_next", "lfm2", "mimo", "bart")


@pytest.mark.filterwarnings(h.DECODED)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.full) for name in FAMILIES]
)
def test_families_with_stock_layers(name: str, tmp_path: Path) -> None:
    """Sliding, linear and convolving layers are saved as they are; logits go on bit for bit."""
    it = model(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kvpack: not packed")
        whole = FAMILIES[name].is_encoder_decoder
        ours = kvpack.Cache(it.config, "tq4", window=16, encoder_decoder=whole)
    ids = h.tokens(2, 160)
    options: dict[str, Any] = {"encoder_outputs": (torch.randn(2, 5, it.config.hidden_size),)} if whole else {}
    word = "decoder_input_ids" if whole else "input_ids"

    def run(to: kvpack.Cache, begin: int, end: int) -> Tensor:
        both = kvpack.hf.cache.EncoderDecoderCache(to, kvpack.hf.cache.DynamicCache()) if whole else to
        with torch.no_grad():
            return it(**{word: ids[:, begin:end]}, past_key_values=both, **options).logits

    run(ours, 0, 150)
    ours.save(tmp_path / "a")
    theirs = load(tmp_path / "a", it.config)
    assert kvpack.nbytes(theirs) <= kvpack.nbytes(ours)  # sliding layers hold views of more than they use
    for begin in range(150, 160):
        assert torch.equal(run(ours, begin, begin + 1), run(theirs, begin, begin + 1))


def test_generation_goes_on(tmp_path: Path) -> None:
    """A prompt's cache, saved with its token ids, spares another process the prompt."""
    it = h.llama()
    ids = h.tokens(1, 400)
    ours = h.packed(it, key="tq4")
    h.run(it, ours, ids[:, :300], [300])
    ours.save(tmp_path / "a", token_ids=ids[:, :300], model=it)
    info = kvpack.Cache.inspect(tmp_path / "a")
    assert info.token_ids is not None
    assert torch.equal(info.token_ids, ids[:, :300])
    assert (info.rows, info.length, info.weights, info.model_type) == (1, 300, True, "llama")
    assert info.nbytes == os.path.getsize(tmp_path / "a")
    assert "token_ids" not in repr(info)
    with torch.inference_mode():  # buffers are ordinary tensors all the same
        theirs = load(tmp_path / "a", it.config, model=it)
    prompt = torch.cat((info.token_ids, ids[:, 300:340]), dim=1)
    want = h.generate(it, ours, prompt, 70)
    got = h.generate(it, theirs, prompt, 70)
    assert torch.equal(want[0], got[0])
    assert all(torch.equal(a, b) for a, b in zip(want[1], got[1], strict=True))


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    """It is a safetensors file, with canonical bytes in it."""
    ours = cache(attention_mask=torch.tensor([[0] * 9 + [1] * 591, [1] * 600]))
    add(ours, 600, rows=2)
    ours.save(tmp_path / "a.safetensors", token_ids=torch.arange(1200).view(2, 600).int())
    layer = ours.packed_layers[1]
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        pages, table = file.get_tensor("layers.1.pages"), file.get_tensor("layers.1.table")
        assert torch.equal(file.get_tensor("layers.1.window.keys"), layer.window[0][:, :, : layer.window_count])
        assert torch.equal(file.get_tensor("token_ids").flatten(), torch.arange(1200))
        assert set(metadata) == {
            "kvpack_snapshot", "packed_format", "kvpack", "model", "weights", "policy", "options", "rows", "length",
            "layers",
        }  # fmt: skip
        assert metadata["policy"] == ours.policy.to_json()
    assert table.tolist() == [[0, 2, 4], [1, 3, 5]]
    for row, numbers in zip(layer.table.rows, table.tolist(), strict=True):
        assert torch.equal(pages[numbers[0]], row[0].data)
    # The page that is not full: of the slots in use what is there, zeros elsewhere, the means of those slots too.
    heads, record = layer.layout[4], kvpack.ops.record_bytes(layer.layout)
    last = pages[4].view(heads, -1)
    used = layer.table.tiles % 4
    assert 0 < used < 4
    assert torch.equal(last[:, : used * record], row_view(layer, 0, 2)[:, : used * record])
    assert not bool(last[:, used * record : 4 * record].any())
    means = last[:, 4 * record :]
    assert bool(means[:, : used * 64].any())
    assert not bool(means[:, used * 64 : 4 * 64].any())


def row_view(layer: PackedLayer, row: int, page: int) -> Tensor:
    return layer.table.rows[row][page].data.view(layer.layout[4], -1)


def test_a_loaded_cache_needs_its_file_no_more(tmp_path: Path) -> None:
    rows, ours = _pages()
    path = tmp_path / "a"
    ours.save(path)
    theirs = load(path)
    os.truncate(path, 100)
    for a, b in zip(add(ours, 100, rows), add(theirs, 100, rows), strict=True):
        assert torch.equal(a, b)


def test_a_mapped_file_may_be_replaced_and_deleted(tmp_path: Path) -> None:
    _, ours = _pages()
    path = tmp_path / "a"
    ours.save(path)
    theirs = load(path, mmap=True)
    theirs.save(path)  # over the file that it is mapped from
    cache().save(path)
    path.unlink()
    for a, b in zip(add(ours, 100), add(theirs, 100), strict=True):
        assert torch.equal(a, b)


def test_mapped_pages_are_not_written() -> None:
    """What would go on in a page of the file takes a copy, also after a crop and in forks."""
    from tempfile import NamedTemporaryFile

    _, ours = _cut()
    with NamedTemporaryFile() as file:
        ours.save(file.name)
        theirs = load(Path(file.name), mmap=True)
    mapped = {page.data.data_ptr(): page.data.clone() for layer in theirs.packed_layers for page in layer.table.rows[0]}
    kept = [page for layer in theirs.packed_layers for page in layer.table.rows[0]]
    fork = theirs.fork(1)[0]
    add(theirs, 500)
    fork.crop(-200)
    add(fork, 500, seed=9)
    assert all(torch.equal(mapped[page.data.data_ptr()], page.data) for page in kept)
