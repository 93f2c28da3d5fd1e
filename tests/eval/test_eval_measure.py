"""perplexity, divergence, sweep: figures against direct computation, arguments, resumption."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpack
from kvpack.eval import CacheSpec, divergence, grid, perplexity, sweep, sweeps, task
from kvpack.eval.models import LoadedModel
from kvpack.eval.modes import Reference
from kvpack.eval.results import divergence_from
from kvpack.eval.row_store import RowStore
from kvpack.eval.sweeps import pareto
from kvpack.eval.texts import Windows


def test_exact_perplexity_is_the_models_own(tiny: LoadedModel, ids: Tensor) -> None:
    result = perplexity(tiny, ids, skip=50)
    with torch.no_grad():
        logits = tiny.model(ids).logits[:, 50:-1].flatten(0, 1)
        want = torch.nn.functional.cross_entropy(logits, ids[:, 51:].flatten()).exp()
    assert result.ppl.value == pytest.approx(float(want), rel=1e-5)
    assert (result.mode, result.tokens, result.windows, result.context) == ("exact", 2 * 209, 2, 260)
    assert result.label == "exact"
    assert result.compression is None


def test_divergence_of_the_exact_codec_is_nothing(tiny: LoadedModel, ids: Tensor) -> None:
    result = divergence(tiny, ids, dict(key="exact", window=20))
    assert abs(result.kld.value) < 1e-6
    assert result.top1.value == 1.0
    assert result.ppl_ratio.value == pytest.approx(1.0, abs=1e-5)
    assert result.coded_queries == 2 * (259 - 88)


def test_a_reference_changes_nothing(tiny: LoadedModel, ids: Tensor) -> None:
    alone = divergence(tiny, ids, "tq3/tq2", prompt=100)
    shared = task(tiny, ids, prompt=100).reference()
    first = divergence(tiny, ids, "tq3/tq2", prompt=100, reference=shared)
    again = divergence(tiny, ids, "tq3/tq2", prompt=100, reference=shared)
    starved = divergence(tiny, ids, "tq3/tq2", prompt=100, reference=task(tiny, ids, prompt=100).reference(budget=1))
    for other in (first, again, starved):
        assert other.kld.value == pytest.approx(alone.kld.value, rel=1e-4)
        assert other.dense_bytes == alone.dense_bytes
    with pytest.raises(ValueError, match="another prompt or skip"):
        divergence(tiny, ids, "tq3", prompt=90, reference=shared)


def test_perplexity_under_a_cache_is_that_of_divergence(tiny: LoadedModel, ids: Tensor) -> None:
    spec = dict(key="tq2", window=20)
    assert perplexity(tiny, ids, spec).ppl.value == pytest.approx(divergence(tiny, ids, spec).ppl.value, rel=1e-6)


def test_bytes_are_the_caches_own(tiny: LoadedModel, ids: Tensor) -> None:
    spec = CacheSpec("tq4", "tq3", window=20)
    emulated = divergence(tiny, ids, spec)
    real = divergence(tiny, ids, spec, "chunked", chunk=37)
    cache = spec.build(tiny.model.config)
    with torch.no_grad():
        tiny.model(ids[:1, :-1], past_key_values=cache)
    assert emulated.cache_bytes == real.cache_bytes == cache.nbytes
    assert emulated.dense_bytes == 2 * 2 * 259 * 64 * 4  # layers, sides, tokens, head size, float32
    assert emulated.compression == pytest.approx(emulated.dense_bytes / cache.nbytes)


def test_ids_in_every_form(tiny: LoadedModel, ids: Tensor) -> None:
    spec = dict(key="tq3", window=20)
    table = divergence(tiny, ids, spec)
    listed = divergence(tiny.model, [ids[0], ids[1]], spec)
    windows = divergence(tiny, Windows("some text", (ids[0], ids[1]), (7, 9)), spec)
    assert table.kld == listed.kld == windows.kld
    assert windows.text == "some text"
    assert "random" in windows.model
    ragged = divergence(tiny, [ids[0], ids[1, :200]], spec)
    assert ragged.context == 260
    assert ragged.tokens == (259 - 50) + (199 - 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode="steps"), "'steps' is not one of fake, chunked, stepwise, emulated"),
        (dict(mode="chunked", chunk=0), "chunk=0"),
        (dict(mode="stepwise", chunk=4), "use mode chunked"),
        (dict(skip=259), "leaves nothing"),
        (dict(prompt=-1), "prompt=-1"),
    ],
)
def test_bad_arguments(tiny: LoadedModel, ids: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(tiny, ids, "tq4", **arguments)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("tq5", "unknown codec 'tq5'"),
        ("tq4/", "KEYCODEC/VALUECODEC"),
        (dict(key="tq4", windows=3), "'windows' is not one of"),
        (dict(key="tq4", window=-1), "window=-1"),
        (dict(key="tq4", sinks=1.5), "sinks=1.5"),
        (lambda config: None, "a cache factory must say"),
        (7, "cache=7"),
    ],
)
def test_bad_caches(tiny: LoadedModel, ids: Tensor, cache: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(tiny, ids, cache)


def test_cache_in_every_form(tiny: LoadedModel) -> None:
    want = CacheSpec("tq4", "tq3", window=64)
    assert CacheSpec.of(dict(key="tq4", value="tq3", window=64)) == want
    assert CacheSpec.parse("tq4/tq3", window=64) == want
    assert want.label == "tq4/tq3"
    made = CacheSpec.of(functools.partial(kvpack.Cache, key="tq4", value="tq3", window=64))
    assert made.label == "tq4/tq3"
    assert isinstance(made.build(tiny.model.config), kvpack.Cache)
    assert CacheSpec("tq3").value_codec == "tq3"
    assert CacheSpec("tq3").to_json()["value"] == "tq3"
    assert CacheSpec("tq4", "tq3").bits(64) == pytest.approx((4.25 + 3.25) / 2 + 8 * 66 * (1 / 64 + 1 / 256) / 64 / 2)
    assert CacheSpec("tq4", "tq3", sinks=0).bits(64) == pytest.approx((4.25 + 3.25) / 2)


def test_reference_keeps_no_more_than_its_budget(tiny: LoadedModel, ids: Tensor) -> None:
    block = 209 * 256 * 4  # scored positions x vocabulary x float32
    for budget, kept in ((0, 0), (block + 10, 1), (2 * block + 10, 2)):
        reference = Reference(tiny.model, (ids[0], ids[1]), 0, 50, budget)
        for index in range(2):
            list(reference.blocks(index))
        assert len(reference._kept) == kept


def test_results_survive_json(tiny: LoadedModel, ids: Tensor) -> None:
    result = divergence(tiny, ids, "tq3")
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert divergence_from(data) == result
    assert data["label"] == "tq3"
    assert data["mode"] == "emulated"


def test_sweep_resumes(tiny: LoadedModel, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    specs = grid(["tq4", "tq3/tq2"], [10, 60])
    assert [(spec.label, spec.window) for spec in specs] == [
        ("tq4", 10),
        ("tq4", 60),
        ("tq3/tq2", 10),
        ("tq3/tq2", 60),
    ]
    first = sweep(tiny, ids, specs[:3], path=path)
    # A run that was cut off in the middle of a line.
    path.write_text(path.read_text() + '{"row": "12", "mode"')
    seen: list[bool] = []
    again = sweep(tiny, ids, specs, path=path, on_row=lambda _, known: seen.append(known))
    assert seen == [True, True, True, False]
    assert again[:3] == first
    assert len(RowStore(path).read()) == 4

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished row was measured again")

    monkeypatch.setattr(sweeps, "divergence", never)
    assert sweep(tiny, ids, specs, path=path) == again
    with pytest.raises(AssertionError, match="measured again"):
        sweep(tiny, ids, specs, path=path, skip=100)  # another setting is another row


def test_rows_are_files(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    specs = grid(["tq4", "tq2"], [10])
    lines, rows = tmp_path / "rows.jsonl", tmp_path / "rows"
    sweep(tiny, ids, specs[:1], path=lines)  # as kvpack 0.1.0 kept them
    seen: list[bool] = []
    found = sweep(tiny, ids, [*specs, *specs], path=rows, on_row=lambda _, known: seen.append(known))
    assert seen == [True, True, False]  # the first, asked for twice; the second, measured once
    assert found[:2] == found[2:]
    (file,) = rows.iterdir()
    assert json.loads(file.read_text())["label"] == "tq2"
    for damage in (b"", b'{"row": "1"', b"\xff\xfe", b"[]", file.read_bytes()[:-40]):
        file.write_bytes(damage)
        assert len(RowStore(rows).read()) == 1
    assert [row.kld for row in sweep(tiny, ids, specs, path=rows)] == [row.kld for row in found[:2]]
    assert len(list(rows.iterdir())) == 1


def test_pareto() -> None:
    assert pareto([(4.0, 0.1), (3.0, 0.2), (3.5, 0.3), (2.0, 0.9), (5.0, 0.1)]) == [3, 1, 0]
