"""How a snapshot is written, and what is left when that fails."""

from __future__ import annotations

import errno
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.hf import container
from kvpack.hf.container import Reader

from .test_snapshot import add, cache, load


class FullDisk:
    """zlib.crc32, and no room after some calls."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.calls, self.error = calls, error

    def __call__(self, data: Any) -> int:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return zlib.crc32(data)


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException
) -> None:
    ours, path = cache(), tmp_path / "a"
    add(ours, 200)
    ours.save(path)
    before = path.read_bytes()
    add(ours, 200)
    monkeypatch.setattr(container.zlib, "crc32", FullDisk(calls, error))
    for target in (path, tmp_path / "b"):
        with pytest.raises(type(error)):
            ours.save(target)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    assert load(path).get_seq_length() == 200


def test_the_name_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written beside, brought to the disk, renamed, and the folder brought to the disk."""
    seen: list[str] = []
    real = {name: getattr(container.os, name) for name in ("fsync", "replace")}

    def fsync(number: int) -> None:
        seen.append("fsync")
        real["fsync"](number)

    def replace(source: Any, target: Any) -> None:
        assert not Path(target).exists()
        with Reader(source) as reader:
            reader.read(list(reader.entries))
        seen.append("replace")
        real["replace"](source, target)

    monkeypatch.setattr(container.os, "fsync", fsync)
    monkeypatch.setattr(container.os, "replace", replace)
    cache().save(tmp_path / "a")
    assert seen == ["fsync", "replace", "fsync"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask")).split()[1], 8)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; allowed: the path of a file"):
        cache().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot be written: there is no folder"):
        cache().save(tmp_path / "no" / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_same_cache_gives_the_same_bytes(tmp_path: Path) -> None:
    """Also where memory held something else before: unused parts of pages are zeros."""
    files = []
    for fill in (0xAA, 0x55):
        keep = [torch.full((size,), fill, dtype=torch.uint8) for size in range(1000, 40000, 500)]
        del keep
        ours = cache("tq4:center=tile", "tq2.5:center=mean")
        add(ours, 400)
        ours.crop(-150)
        ours.save(tmp_path / "a")
        files.append((tmp_path / "a").read_bytes())
    assert files[0] == files[1]


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    """What stock layers may hold: every dtype, views, scalars, nothing."""
    tensors: dict[str, Tensor] = {str(dtype): torch.ones(3, 5).to(dtype) for dtype in container.DTYPES}
    tensors |= {"view": torch.randn(4, 6)[1:, ::2].T, "scalar": torch.tensor(3.5), "none": torch.empty(0, 7)}
    container.write(tmp_path / "a", tensors, {})
    with Reader(tmp_path / "a") as reader:
        found = reader.read(list(reader.entries))
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        assert torch.equal(found[name].to(torch.float64), x.to(torch.float64))
