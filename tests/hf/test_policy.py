"""kvpack.Policy: its table, its JSON form, its errors; caches whose layers have different codecs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

import kvpack
from kvpack import Policy
from kvpack.policy import PRESETS

from .helpers import error, llama, packed, run, stock, tokens

MIXED = Policy.uniform("tq4", "tq3", layers={1: ("q8_0", "tq2:scale=mse")}, window=64)


def test_codecs_of_layers() -> None:
    assert MIXED.codecs(0) == ("tq4", "tq3")
    assert MIXED.codecs(1) == ("q8_0", "tq2:scale=mse")
    assert MIXED.codec(1, "value") == "tq2:scale=mse"
    assert Policy.uniform("tq3").codecs(7) == ("tq3", "tq3")
    assert (MIXED.window, MIXED.sinks) == (64, 4)
    assert MIXED.label == "tq4/tq3 +1 layer"
    assert not MIXED.is_uniform


def test_equal_policies_are_equal() -> None:
    said = Policy("tq4", layers={3: ("tq4:scale=norm", "tq4"), 2: ("tq3", "tq3")}, name="mine")
    assert said == Policy("tq4", "tq4", {2: ("tq3", "tq3")})
    assert hash(said) == hash(Policy("tq4", "tq4", {2: ("tq3", "tq3")}))
    assert said.table == {2: ("tq3", "tq3")}
    assert said != MIXED
    with pytest.raises(AttributeError):
        said.key = "tq2"  # type: ignore[misc]


def test_bits_are_the_mean_over_layers_and_sides() -> None:
    key, value = 8 * 66 / (64 * 64), 8 * 66 / (256 * 64)  # means: of each tile, of each page
    assert Policy.uniform("tq4", "tq3").bits(64, 30) == 3.75 + (key + value) / 2
    assert Policy.uniform("tq4", "tq3", sinks=0).bits(64, 30) == 3.75
    assert Policy.uniform("tq4:center=none", "tq3:center=none").bits(64, 30) == 3.75
    policy = Policy.uniform("tq4", "tq4", layers={0: ("tq2", "tq2")})
    assert policy.bits(64, 2) == (4.25 + 2.25 + key + value) / 2
    assert policy.bits(64, [1, 2]) == 4.25 + (key + value) / 2
    wide = 2.125 + 8 * 130 / (256 * 128)
    assert Policy("tq4", "tq2").bits(64, 1, value_dim=128) == (64 * (4.25 + key) + 128 * wide) / 192
    with pytest.raises(ValueError, match="no layers"):
        policy.bits(64, [])


def test_json_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    MIXED.save(path)
    assert json.loads(path.read_text())["kvpack_policy"] == 1
    for again in (Policy.load(path), Policy.of(path), Policy.of(str(path)), Policy.from_json(path.read_text())):
        assert again == MIXED
    assert Policy.from_json(MIXED.to_json()) == Policy.of(MIXED.to_json()) == Policy.of(MIXED) == MIXED
    for name, preset in PRESETS.items():
        assert Policy.of(name) is preset
        assert Policy.from_json(preset.to_json()).name == preset.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kvpack_policy": 2}, "kvpack_policy=2 is no version .* allowed: 1"),
        ({"kvpack_policy": None}, "kvpack_policy=None"),
        ({"codec": "tq4"}, "unknown field 'codec'; allowed: .*window"),
        ({"key": "tq9"}, "unknown codec 'tq9'; known: .*tq4"),
        ({"key": 3}, "key=3"),
        ({"window": -1}, "window=-1 is not allowed"),
        ({"sinks": 1.5}, "sinks=1.5 is not allowed"),
        ({"layers": [1]}, "'layers' of a policy is a list"),
        ({"layers": {"x": {"key": "tq4", "value": "tq4"}}}, "layer 'x' of a policy: allowed are whole numbers"),
        ({"layers": {"1": {"key": "tq4"}}}, "layer '1' of a policy needs the fields 'key' and 'value'"),
        ({"layers": {"1": {"key": "tq4", "value": "no"}}}, "unknown codec 'no'"),
        ({"layers": {"1": {"key": "tq4", "value": "tq4", "why": 1}}}, "unknown field 'why'; allowed: key, value"),
        ({"layers": {"1": {"key": "tq4", "value": "tq4"}, "01": {"key": "tq4", "value": "tq4"}}}, "given twice"),
    ],
)
def test_bad_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_json({**MIXED.to_json(), **change})


def test_bad_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bad.json: .* no JSON"):
        Policy.load(path)
    path.write_text('{"kvpack_policy": 1, "key": "tq4", "key": "tq3"}')
    with pytest.raises(ValueError, match="names 'key' twice"):
        Policy.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="JSON object, not a list"):
        Policy.load(path)
    path.write_text('{"kvpack_policy": 1}')
    with pytest.raises(ValueError, match="needs the field 'key'"):
        Policy.load(path)
    with pytest.raises(ValueError, match=r"'tiny' is neither a preset \(quality, balanced, small\) nor a JSON file"):
        Policy.of("tiny")
    with pytest.raises(TypeError, match="policy is a int"):
        Policy.of(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({-1: ("tq4", "tq4")}, "layer -1 of a policy is not allowed"),
        ({True: ("tq4", "tq4")}, "layer True of a policy"),
        ({0: "tq4"}, "needs a pair"),
        ({0: ("tq4",)}, "needs a pair"),
        (((0, "tq4", "tq4"), (0, "tq3", "tq3")), "layer 0 of a policy is given twice"),
    ],
)
def test_bad_tables(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy("tq4", layers=layers)


def test_the_cache_gives_every_layer_its_codecs() -> None:
    cache = kvpack.Cache(llama().config, policy=MIXED)
    centred = [("tq4:center=tile", "tq3:center=mean"), ("q8_0", "tq2:scale=mse,center=mean")]
    assert [tuple(map(str, layer.specs)) for layer in cache.packed_layers] == centred
    assert {layer.window_size for layer in cache.packed_layers} == {64}
    assert cache.policy is MIXED
    said = [f"{key}/{value} (1 layer)" for key, value in centred]
    assert f"{', '.join(said)}, 2 of 2 layers packed" in repr(cache)
    assert [(line.key, line.value) for line in cache.stats()] == centred
    assert kvpack.Cache(llama().config, policy="balanced").policy == PRESETS["balanced"]
    assert kvpack.Cache(llama().config, "tq3", window=5).policy == Policy.uniform("tq3", window=5)
    assert kvpack.Cache(llama().config).policy == Policy()


def test_a_json_file_as_policy(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "p.json")
    assert kvpack.Cache(llama().config, policy=tmp_path / "p.json").policy == MIXED


@pytest.mark.parametrize("option", [{"key": "tq4"}, {"value": "tq4"}, {"window": 128}, {"sinks": 4}])
def test_a_policy_excludes_what_it_decides(option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name}=.* and policy='balanced' exclude each other"):
        kvpack.Cache(llama().config, policy="balanced", **option)


def test_layers_that_the_model_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"names layer 2, but the model has 2: allowed are 0..1"):
        kvpack.Cache(llama().config, policy=Policy("tq4", layers={2: ("tq3", "tq3")}))
    gemma = Gemma3TextConfig(num_hidden_layers=6, head_dim=64, sliding_window=64)
    with pytest.raises(ValueError, match="names layer 0, which is not packed; allowed: 5"):
        kvpack.Cache(gemma, policy=Policy("tq4", layers={0: ("tq3", "tq3")}))
    with pytest.warns(UserWarning, match="not packed"):
        kvpack.Cache(gemma, policy=Policy("tq4", layers={5: ("tq3", "tq3")}))


def test_different_layouts_in_one_cache_stay_apart() -> None:
    """What the layers hold is what caches of their own would: bytes, memory, logits, through copies and crops."""
    model, ids = llama(), tokens(2, 400)
    exact = Policy.uniform("exact", layers={1: ("q8_0", "q8_0")}, window=64)
    caches = [packed(model, key=None, window=None, policy=policy) for policy in (MIXED, exact)]
    want = run(model, stock(model), ids, [300])
    coarse, close = (run(model, cache, ids, [300]) for cache in caches)
    assert error(close, want) < 0.02 < error(coarse, want)
    mixed = caches[0]
    assert mixed.nbytes == sum(mixed.memory().values())
    layers = [packed(model, key=key, value=value) for key, value in (MIXED.codecs(0), MIXED.codecs(1))]
    for cache in layers:
        run(model, cache, ids, [300])
    sizes = [kvpack.hf.memory.memory(cache) for cache in layers]
    assert mixed.memory()["codes"] * 2 == sum(size["codes"] for size in sizes)
    assert mixed.memory()["scales"] * 2 == sum(size["scales"] for size in sizes)

    fork = copy.deepcopy(mixed)
    assert kvpack.nbytes(mixed, fork) < 2 * mixed.nbytes
    fork.reorder_cache(torch.tensor([1, 0]))
    more = tokens(2, 30, seed=5)
    a, b = run(model, mixed, torch.cat([ids, more], 1), [30]), None
    swapped = torch.cat([ids, more], 1)[[1, 0]]
    b = run(model, fork, swapped, [30])
    assert torch.allclose(a, b[[1, 0]], atol=1e-5)
    fork.crop(-200)
    fork.batch_select_indices(torch.tensor([0]))
    assert fork.get_seq_length() == 230
    assert fork.policy == MIXED
    mixed.reset()
    assert mixed.get_seq_length() == 0
