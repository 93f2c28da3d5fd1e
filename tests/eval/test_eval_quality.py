"""The quality study: resumable lines, tables between markers, peers at the bytes that they hold."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from kvpack.eval import CacheSpec, divergence
from kvpack.eval.metrics import Interval
from kvpack.eval.models import LoadedModel
from kvpack.eval.needle import haystack, needles
from kvpack.eval.peers import PEERS, Peer, fill_peer, held_bytes, peer
from kvpack.eval.quality import DEFAULTS, FAKE, SHORT, OutOfTimeError, Sample, Study, available, samples
from kvpack.eval.quality_defaults import variants
from kvpack.eval.quality_report import BEGIN, END, Report, write_doc
from kvpack.eval.quality_store import Store, figures, pack_bits, pack_floats, unpack_bits, unpack_floats
from kvpack.eval.texts import Text, cut_places

FP8 = peer("transformers fp8")
needs_fp8 = pytest.mark.skipif(bool(FP8.missing), reason=FP8.missing)  # newer versions of transformers have it
SPECS = [CacheSpec("tq4", window=20), CacheSpec("tq2", window=20)]


@pytest.fixture
def study(tiny: LoadedModel, tmp_path: Path) -> Study:
    return Study(tiny, Store(tmp_path / "q.jsonl"))


@pytest.fixture
def found(ids: Tensor) -> list[Sample]:
    return [Sample("some", place, row) for place, row in enumerate(ids)]


def report(study: Study) -> Report:
    return Report(study.store, study.about, length=260, window=20, sinks=4)


def test_arrays_there_and_back() -> None:
    x = np.random.default_rng(0).random(100).astype(np.float32)
    assert (unpack_floats(pack_floats(x)) == x).all()
    bits = x > 0.5
    assert (unpack_bits(pack_bits(bits), 100) == bits).all()


def test_trellis_codes_beside_plain_ones(study: Study, found: list[Sample]) -> None:
    specs = [CacheSpec("tq2", window=20), CacheSpec("tcq2", window=20)]
    study.windows(SHORT, found, specs, first=100)
    study.windows(FAKE, found[:1], specs, "fake", first=100)
    lines = {study_name: report(study).lines(study_name) for study_name in (SHORT, FAKE)}
    table = report(study).markdown()
    row = next(line for line in table.splitlines() if line.startswith("| `tcq2` / `tq2`"))
    for name, cell in zip((SHORT, FAKE), row.split("|")[2:4], strict=True):
        samples = {line["sample"] for line in lines[name]["tq2"]}
        means = [np.mean([line["mean"] for line in lines[name][label]]) for label in ("tcq2", "tq2")]
        assert len(samples) == (len(found) if name == SHORT else 1)
        assert float(cell.split("±")[0]) == pytest.approx(means[0] / means[1], abs=0.006)


def test_a_line_says_what_divergence_says(study: Study, found: list[Sample], ids: Tensor, tiny: LoadedModel) -> None:
    study.windows(SHORT, found, SPECS, first=100)
    lines = report(study).lines(SHORT)
    for spec in SPECS:
        ours = figures(lines[spec.label], report(study).exact)
        want = divergence(tiny, ids, spec, skip=100)
        assert ours["kld"].value == pytest.approx(want.kld.value, rel=1e-3)
        assert ours["ppl"].value == pytest.approx(want.ppl.value, rel=1e-4)
        assert ours["ppl_ratio"].value == pytest.approx(want.ppl_ratio.value, rel=1e-4)
        assert ours["top1"].value == pytest.approx(want.top1.value)
        assert (ours["tokens"], ours["windows"]) == (want.tokens, 2)


def test_a_run_goes_on_where_it_was(study: Study, found: list[Sample], tiny: LoadedModel) -> None:
    study.windows(SHORT, found[:1], SPECS[:1], first=100)
    assert study.store.path is not None
    text = study.store.path.read_text()
    study.store.path.write_text(text + '{"key": "cut')
    said: list[str] = []
    again = Study(tiny, Store(study.store.path), say=said.append)
    again.windows(SHORT, found, SPECS, first=100)
    assert len(said) == 3
    assert len(list(Store(study.store.path).find("window"))) == 4
    assert len(list(Store(study.store.path).find("exact"))) == 2
    late = Study(tiny, again.store, deadline=time.monotonic() - 1)
    late.windows(SHORT, found, SPECS, first=100)  # nothing is left to do
    with pytest.raises(OutOfTimeError):
        late.windows(SHORT, found, [CacheSpec("tq3", window=20)], first=100)


@needs_fp8
def test_tables_and_picture(study: Study, found: list[Sample], tmp_path: Path) -> None:
    feed = {"prompt": 100, "chunk": 16}
    study.held(found[0], [*SPECS, FP8], **feed)
    study.windows(SHORT, found, [*SPECS, CacheSpec("tq3", window=60)], first=100)
    study.windows("peers", found[:1], [FP8, SPECS[1]], "chunked", first=100, **feed)
    study.anchor(found[:1], SPECS[:1], 150, 40)
    study.windows("long", found[:1], SPECS[:1], first=64)
    needles(study, Text("t", ("some text " * 100,)), SPECS[:1], 400, (0.2, 0.6), 1)
    tables = report(study).markdown()
    for part in ("**Every codec**", "**Beside transformers'", "**Anchor**", "**Long windows**", "**Passkey**"):
        assert part in tables
    assert "| `tq4` | 4.331 |" in tables
    assert "`tq3`" not in tables  # another window
    assert "| transformers fp8 | chunked | 8.00 |" in tables
    assert "| `tq2` | chunked |" in tables
    assert "64 to 127 | 128 to 255 | 256 to 259" in tables
    for table in tables.split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1
    doc = tmp_path / "q.md"
    doc.write_text(f"head\n{BEGIN}\nold\n{END}\ntail\n")
    write_doc(doc, tables)
    write_doc(doc, tables)
    assert doc.read_text() == f"head\n{BEGIN}\n\n{tables}\n\n{END}\ntail\n"
    doc.write_text("nothing")
    with pytest.raises(ValueError, match="no lines"):
        write_doc(doc, tables)
    pytest.importorskip("matplotlib")
    assert report(study).draw(tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    assert Report(Store(), study.about, length=260, window=20, sinks=4).markdown() == ""


def test_defaults_are_changed_one_at_a_time(study: Study, found: list[Sample]) -> None:
    tried = variants("tq3", 20, 4)
    assert [what for what in tried if what.startswith("window")] == [f"window {n}" for n in (0, 32, 64, 256)]
    assert tried["nothing"] == CacheSpec("tq3", value="tq3", window=20)
    assert tried["keys `center=none`"] == CacheSpec("tq3:center=none", value="tq3", window=20)
    rule, sinkless = tried["`scale=stored`"], tried["no sinks"]
    chosen = [tried["nothing"], rule, sinkless]
    study.windows(DEFAULTS, found, chosen, first=100)
    study.held(found[0], chosen[:1], prompt=100, chunk=16)
    table = report(study).markdown()
    assert "**Every codec**" not in table
    rows = {row.split(" |")[0]: row for row in table.splitlines() if row.startswith("| ")}
    assert list(rows) == ["| changed", "| nothing", "| `scale=stored`", "| no sinks"]
    assert rows["| nothing"].endswith("| 1 |")
    means = [
        np.mean([line["mean"] for line in study.store.find("window", label=one.label, sinks=one.sinks)])
        for one in chosen
    ]
    for row, mean in zip(list(rows.values())[2:], means[1:], strict=True):
        assert float(row.split("|")[5].split("±")[0]) == pytest.approx(mean / means[0], rel=0.02)
    # What was measured for this table is not measured again for another.
    count = len(study.store.lines)
    study.windows(SHORT, found, [rule], first=100)
    assert len(study.store.lines) == count
    assert "| `tq3:scale=stored` |" in report(study).markdown()


def test_anchor_agrees_with_emulation(study: Study, found: list[Sample]) -> None:
    study.anchor(found[:1], SPECS[:1], 150, 40)
    modes = {mode: report(study).lines("anchor", mode=mode)["tq4"] for mode in ("stepwise", "emulated")}
    a, b = (figures(lines, report(study).exact)["kld"] for lines in modes.values())
    assert isinstance(a, Interval)
    assert a.value == pytest.approx(b.value, rel=0.2)


@needs_fp8
def test_what_peers_hold_is_counted(tiny: LoadedModel) -> None:
    dense = transformers.DynamicCache(config=tiny.model.config)
    for layer in range(2):
        dense.update(*(torch.randn(1, 1, 200, 64, dtype=torch.bfloat16) for _ in "kv"), layer)
    cache = fill_peer(FP8, dense, tiny.model.config, 100, 30)
    assert cache.get_seq_length() == 200
    # One byte a value, and a float32 scale for each of the four tensors.
    assert held_bytes(cache) == 2 * 2 * (200 * 64 + 4)
    assert held_bytes(dense) == 2 * 2 * 200 * 64 * 2
    shared = torch.zeros(8)
    assert held_bytes({"a": shared, "b": [shared[:4], (shared,)], "c": "x"}) == 32


@pytest.mark.parametrize("one", PEERS, ids=lambda one: one.name)
def test_peers_run_or_say_what_is_missing(one: Peer, study: Study, found: list[Sample]) -> None:
    said: list[str] = []
    if not available([one], said.append):
        assert "pip install 'kvpack[peers]'" in said[0] or "this transformers has no" in said[0]
        pytest.skip(said[0])
    study.windows("peers", found[:1], [one], first=100, prompt=100, chunk=32)
    line = next(study.store.find("window"))
    assert (line["mode"], line["label"], line["peer"]) == ("chunked", one.name, True)
    assert line["mean"] > 0


def test_unknown_peers() -> None:
    with pytest.raises(ValueError, match="peer 'kivi' is not one of quanto int4, "):
        peer("kivi")


def test_places_are_spread_and_do_not_overlap(tiny: LoadedModel) -> None:
    text = Text("t", tuple("".join(f"{i * 30 + j:05}" for j in range(30)) for i in range(100)))
    cut = cut_places(text, tiny.tokenizer, 100, [3, 2, 2])
    assert cut.clusters == (0, 0, 0, 1, 1, 2, 2)
    stream = "".join(text.documents)
    starts = [stream.find(tiny.tokenizer.decode(ids.tolist())) for ids in cut.ids]
    assert starts[0] % 150 == starts[3] % 150 == starts[5] % 150 == 0
    assert np.diff(starts).min() >= 100
    assert starts[-1] > 14000
    with pytest.raises(Exception, match="too few for 3 places"):
        cut_places(text, tiny.tokenizer, 3000, [3, 2, 2])
    with pytest.raises(ValueError, match="at least 1 place"):
        cut_places(text, tiny.tokenizer, 100, [])


def test_samples_begin_with_one_of_every_place(tiny: LoadedModel) -> None:
    texts = [Text("a", ("x" * 20000,)), Text("b", ("y" * 20000,))]
    made = samples(texts, tiny.tokenizer, 100, 9, 4)
    assert [sample.place for sample in made] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert [sample.text for sample in made[:4]] == ["a", "a", "a", "b"]
    with pytest.raises(ValueError, match="texts <= places <= windows"):
        samples(texts, tiny.tokenizer, 100, 3, 4)


def test_a_haystack_holds_its_needle(tiny: LoadedModel) -> None:
    ids, key = haystack(Text("t", ("abc " * 500,)), tiny.tokenizer, 600, 0.5, 7)
    said = tiny.tokenizer.decode(ids.tolist())
    assert len(ids) == 600
    assert said.count(key) == 2
    assert 200 < said.find(key) < 300
    assert said.endswith("The pass key is")
    with pytest.raises(ValueError, match="too few"):
        haystack(Text("t", ("abc",)), tiny.tokenizer, 600, 0.5, 7)


@needs_fp8
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    doc = tmp_path / "q.md"
    doc.write_text(f"{BEGIN}\n{END}\n")
    words = [
        *("--model", "random", "--texts", "topics", "--codecs", "tq3,tq4:scale=mse", "--windows", "2", "--places", "1"),
        *("--length", "300", "--window", "20", "--prompt", "80", "--peers", "transformers fp8", "--peer-windows", "1"),
        *(
            "--anchor",
            "none",
            "--out",
            str(tmp_path / "q.jsonl"),
            "--doc",
            str(doc),
            "--picture",
            str(tmp_path / "q.png"),
        ),
    ]
    for more in ([], ["--render"]):
        monkeypatch.setattr(sys, "argv", ["quality.py", *words, *more])
        runpy.run_path(str(root / "benchmarks" / "quality.py"), run_name="__main__")
        assert "| `tq4:scale=mse` | 4.331 |" in doc.read_text()
        assert "transformers fp8" in doc.read_text()
