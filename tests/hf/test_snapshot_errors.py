"""What a snapshot refuses."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

import kvpack
from kvpack.hf import SnapshotError, container
from kvpack.hf.container import Reader

from . import helpers as h
from .test_snapshot import add, cache, load


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two rows with padding, so that there is one of every kind of tensor."""
    ours = cache("tq3", window=0, attention_mask=torch.tensor([[0] * 9 + [1] * 191, [1] * 200]))
    add(ours, 200, rows=2)
    path = tmp_path_factory.mktemp("snapshot") / "cache.kvpack"
    ours.save(path, token_ids=torch.ones(2, 200, dtype=torch.int64), model=h.llama())
    return path


def read_all(path: Path) -> dict[str, Any]:
    with Reader(path) as reader:
        return reader.read(list(reader.entries))


# Damage.


def test_any_flipped_byte(snapshot: Path, tmp_path: Path) -> None:
    """Every byte of the header, the ends of every tensor and of the checksums, and some between; every bit of one."""
    good = snapshot.read_bytes()
    with Reader(snapshot) as reader:
        edges = {at for entry in reader.entries.values() for at in (entry.begin, entry.end - 1)}
        begin = min(edges)
    rng = random.Random(0)
    places = {*range(begin), *edges, *range(len(good) - 60, len(good)), *rng.sample(range(len(good)), 300)}
    path = tmp_path / "flipped"
    path.write_bytes(good)
    read_all(path)
    with open(path, "r+b", buffering=0) as file:
        for at in sorted(places):
            for mask in [1 << bit for bit in range(8)] if at % 997 == 0 else [1 << rng.randrange(8)]:
                file.seek(at)
                file.write(bytes([good[at] ^ mask]))
                with pytest.raises(SnapshotError, match=r"flipped (is|has) .*(damaged|truncated)"):
                    read_all(path)
                file.seek(at)
                file.write(good[at : at + 1])
    read_all(path)


def test_load_says_where_a_byte_is_wrong(snapshot: Path, tmp_path: Path) -> None:
    good = bytearray(snapshot.read_bytes())
    with Reader(snapshot) as reader:
        entry, window = reader.entries["layers.1.pages"], reader.entries["layers.0.sinks.values"]
    size = (entry.end - entry.begin) // entry.shape[0]
    path = tmp_path / "flipped"
    for at, where in ((entry.begin + size + 5, r"layers.1.pages, row 1"), (window.begin, r"layers.0.sinks.values")):
        bad = bytearray(good)
        bad[at] ^= 4
        path.write_bytes(bad)
        for mmap in (False, True):
            with pytest.raises(SnapshotError, match=rf"is damaged: bytes \d+\.\.\d+ \({where}\) do not match"):
                load(path, mmap=mmap)
    # Token ids are read, and so verified, by inspect alone.
    with Reader(snapshot) as reader:
        good[reader.entries["token_ids"].begin] ^= 1
    path.write_bytes(good)
    with pytest.raises(SnapshotError, match=r"token_ids\) do not match"):
        kvpack.Cache.inspect(path)


def test_truncated(snapshot: Path, tmp_path: Path) -> None:
    good = snapshot.read_bytes()
    path = tmp_path / "short"
    rng = random.Random(0)
    for size in [0, 1, 7, 8, 15, 16, 100, 4096, *rng.sample(range(len(good)), 50), len(good) - 4, len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(SnapshotError, match=r"short (is|has \d+ bytes: it is) truncated"):
            load(path)
        with pytest.raises(SnapshotError, match="truncated"):
            kvpack.Cache.inspect(path)
    path.write_bytes(good + b"\0" * 8)
    with pytest.raises(SnapshotError, match="is longer than it was written"):
        load(path)


def test_truncated_while_it_is_read(snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(snapshot.read_bytes())
    with Reader(path) as reader:
        with open(path, "r+b") as file:
            file.truncate(reader.entries["layers.1.pages"].begin + 10)
        with pytest.raises(SnapshotError, match="was truncated while it was read: it ends at byte"):
            reader.read(["layers.1.pages"])


def test_other_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a"
    path.write_bytes(b"A text of more than sixteen bytes, and nothing else.")
    with pytest.raises(SnapshotError, match="a is truncated or damaged, or no snapshot: its header would take"):
        load(path)
    save_file({"weight": torch.ones(5)}, path)
    with pytest.raises(SnapshotError, match="a is no snapshot, or its header is damaged: it has no checksums"):
        load(path)
    path.write_bytes(struct.pack("<Q", 20) + b"[1, 2, 3]           " + b"\0" * 40)
    with pytest.raises(SnapshotError, match="a is damaged in its header, or no snapshot"):
        load(path)
    container.write(path, {"x": torch.ones(3)}, {"a": "1"})
    with pytest.raises(SnapshotError, match="a is no snapshot of kvpack"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


# Intact, and not to be loaded.


def changed(source: Path, target: Path, metadata: dict[str, Any] | None = None, **tensors: Any) -> None:
    """A copy of a snapshot with other metadata and tensors (None: without), and right checksums."""
    with Reader(source) as reader:
        held = reader.read(list(reader.entries))
        text = {**reader.metadata, **{name: json.dumps(x) for name, x in (metadata or {}).items()}}
    held.update({name.replace("__", "."): x for name, x in tensors.items()})
    container.write(target, {name: x for name, x in held.items() if x is not None}, text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kvpack_snapshot", r"is a snapshot of version 7, written by kvpack .*; this kvpack \(.*\) reads version 1"),
        ("packed_format", r"is in packed format of version 7, written by kvpack .*reads version 1"),
    ],
)
def test_other_versions(snapshot: Path, tmp_path: Path, name: str, message: str) -> None:
    changed(snapshot, tmp_path / "a", {name: 7})
    for read in (load, kvpack.Cache.inspect):
        with pytest.raises(SnapshotError, match=message):
            read(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**{**h.SHAPE, "num_hidden_layers": 3}), "num_hidden_layers is 2 there, 3 here"),
        (LlamaConfig(**{**h.SHAPE, "num_key_value_heads": 4}), "num_key_value_heads is 2 there, 4 here"),
        (LlamaConfig(**h.SHAPE, rope_theta=5e5), "rope_parameters is .*10000.0.* there, .*500000.0.* here"),
        (LlamaConfig(**{**h.SHAPE, "vocab_size": 98}), "vocab_size is 97 there, 98 here"),
        (Qwen3Config(**h.SHAPE), 'model_type is "llama" there, "qwen3" here'),
    ],
)
def test_other_models(snapshot: Path, config: Any, message: str) -> None:
    with pytest.raises(SnapshotError, match="is of another model: .*" + message):
        load(snapshot, config)


def test_what_does_not_make_another_model(snapshot: Path) -> None:
    config = LlamaConfig(**{**h.SHAPE, "eos_token_id": 5}, use_cache=False, attention_dropout=0.1, dtype="bfloat16")
    config._attn_implementation = "eager"
    config.name_or_path = "somewhere/else"
    assert load(snapshot, config).get_seq_length() == 200


def test_other_weights(snapshot: Path, tmp_path: Path) -> None:
    model = h.llama()
    assert load(snapshot, model=model).get_seq_length() == 200
    other = type(model)(model.config)
    with pytest.raises(SnapshotError, match="is of a model with the same config and other weights"):
        load(snapshot, model=other)
    other.load_state_dict(model.state_dict())
    load(snapshot, model=other)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight += 1e-3 * torch.randn(128, 128)
    with pytest.raises(SnapshotError, match="other weights"):
        load(snapshot, model=other)
    with pytest.raises(SnapshotError, match="other weights.*another dtype"):
        load(snapshot, model=type(model)(model.config).half())
    cache().save(tmp_path / "a")
    with pytest.raises(SnapshotError, match="has no hash of its model's weights"):
        load(tmp_path / "a", model=model)
    with pytest.raises(TypeError, match="model is a str; allowed: a transformers model"):
        load(snapshot, model="llama")
    with pytest.raises(TypeError, match="config is a LlamaForCausalLM; allowed: a transformers config"):
        load(snapshot, model)
    with torch.device("meta"):
        nowhere = type(model)(model.config)
    with pytest.raises(ValueError, match="is on the meta device"):
        cache().save(tmp_path / "b", model=nowhere)
    with pytest.raises(ValueError, match="no parameters"):
        cache().save(tmp_path / "b", model=torch.nn.Module())
    assert not (tmp_path / "b").exists()


def layers_of(snapshot: Path) -> list[dict[str, Any]]:
    with Reader(snapshot) as reader:
        found: list[dict[str, Any]] = json.loads(reader.metadata["layers"])
        return found


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"layers__1__table": torch.tensor([[0], [9]], dtype=torch.int32)},
            "names pages that are not there; there are",
        ),
        ({"layers__1__table": torch.tensor([[-1], [0]], dtype=torch.int32)}, "names pages that are not there"),
        ({"layers__1__table": torch.tensor([[0, 0], [1, 1]], dtype=torch.int32)}, "table: .* is needed"),
        ({"layers__1__pages": [torch.zeros(64, dtype=torch.uint8)] * 2}, r"bytes of pages: \{64\}"),
        ({"layers__1__sinks__keys": torch.zeros(2, 2, 3, 64)}, "sinks: .* is needed"),
        ({"layers__1__window__values": torch.zeros(2, 2, 3, 32)}, "window: .* is needed"),
        ({"layers__1__window__values": None}, "KeyError.*window.values"),
        ({"layers__1__rows": torch.zeros(1, 2, dtype=torch.int32)}, "rows: .* is needed"),
        ({"layers__1__pages": None, "layers__1__table": None}, "tokens: .* is needed"),
    ],
)
def test_tensors_that_do_not_fit(snapshot: Path, tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    """Right checksums around nonsense: nothing of it reaches a kernel."""
    changed(snapshot, tmp_path / "a", **tensors)
    with pytest.raises(SnapshotError, match=r"a is not consistent: layer 1: .*" + message):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"tiles": 8}, "table: "),
        ({"cut": [[5, 3]]}, "cut tiles"),
        ({"cut": [[0, 0]]}, "cut tiles"),
        ({"window_count": 65}, "window: "),
        ({"layout": [3, 64, 3, 64, 2]}, "layout: "),
        ({"layout": [3, 61, 3, 64, 2]}, "cannot be packed"),
        ({"dtype": "int32"}, "torch.int32; allowed"),
        ({"key": "q8_0"}, "the codecs of its policy are"),
        ({"length": 3}, "tokens: "),
    ],
)
def test_numbers_that_do_not_fit(snapshot: Path, tmp_path: Path, state: dict[str, Any], message: str) -> None:
    first, second = layers_of(snapshot)
    changed(snapshot, tmp_path / "a", {"layers": [first, {**second, **state}]})
    with pytest.raises(SnapshotError, match=r"a is not consistent: layer 1: .*" + message):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"policy": {"kvpack_policy": 1, "key": "tq9"}}, "unknown codec 'tq9'"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"layers": []}, "it has 0 layers, the model 2"),
    ],
)
def test_metadata_of_another_kvpack(snapshot: Path, tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    changed(snapshot, tmp_path / "a", metadata)
    with pytest.raises(SnapshotError, match=r"a cannot be read by this version of kvpack .*" + message):
        load(tmp_path / "a")


NONSENSE = (None, -1, 2**40, 2**70, float("inf"), "x", [], [[1, 2, 3]], {"a": 1})


def test_nonsense_with_right_checksums(snapshot: Path, tmp_path: Path) -> None:
    """Whatever stands in the metadata: a snapshot error, or a cache of the right length where it does not matter."""
    first, second = layers_of(snapshot)
    with Reader(snapshot) as reader:
        names = list(reader.metadata)
    trials = [{name: value} for name in names for value in NONSENSE]
    trials += [{"layers": [first, {**second, name: value}]} for name in second for value in NONSENSE]
    refused = 0
    for metadata in trials:
        changed(snapshot, tmp_path / "a", metadata)
        try:
            assert load(tmp_path / "a").get_seq_length() == 200, metadata
        except SnapshotError:
            refused += 1
    assert refused > len(trials) // 2
    with Reader(snapshot) as reader:
        container.write(
            tmp_path / "deep",
            {name: x for name, x in reader.read(list(reader.entries)).items()},
            {**reader.metadata, "model": "[" * 100_000 + "]" * 100_000},
        )
    for read in (load, kvpack.Cache.inspect):
        with pytest.raises(SnapshotError, match="no snapshot of kvpack"):
            read(tmp_path / "deep")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(2, 100), "token_ids are torch.float32; allowed: a tensor of whole numbers"),
        ([[1] * 100], "token_ids are list"),
        (
            torch.ones(1, 101, dtype=torch.int64),
            r"shape \[1, 101\]; allowed: \[1, 100\], .*ids\[:, :cache.get_seq_length",
        ),
    ],
)
def test_token_ids(tmp_path: Path, ids: Any, message: str) -> None:
    ours = cache()
    add(ours, 100)
    with pytest.raises(ValueError, match=message):
        ours.save(tmp_path / "a", token_ids=ids)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_no_file_can_hold(tmp_path: Path) -> None:
    from transformers.cache_utils import DynamicLayer

    ours = cache()
    ours.layers[0] = DynamicLayer()
    ours.layers[0].helper = object()
    with pytest.raises(
        ValueError, match=r"layers.0.helper: a DynamicLayer keeps a object there, which a snapshot cannot"
    ):
        ours.save(tmp_path / "a")
    ours.layers[0].helper = torch.zeros(3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"keeps a Tensor of torch.complex64"):
        ours.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
