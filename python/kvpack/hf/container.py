"""The file of a snapshot: a safetensors file whose every byte is under a checksum, written atomically.

    | header length, 8 bytes | header, JSON | spaces | tensors ... | checksums |
    0                        8                       a multiple of 4096

This module knows tensors and their names, and nothing of caches; docs/snapshot.md specifies what it writes. A tensor
whose name ends in ".pages" is written row by row from where the rows lie, and has a checksum for each row; it is read
into memory of its own for each row, or as views of a memory map. The library `safetensors` reads these files (a test
does), but does not write them: it would need every tensor whole in memory, and leaves pages unaligned.

Checksums are CRC-32: no error within 32 bits goes by unseen, so no flipped byte does, and zlib computes some gigabytes
of it in a second, without the GIL. They guard against accidents, not against forgery.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pages import normal_mode

Content = Tensor | Sequence[Tensor]
"""A tensor; or, under a name that ends in ".pages", the rows of one, uint8 [n] each, at least one."""

PAGES = ".pages"
CHECKSUMS = "checksums"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_ALIGNMENT = 4096  # of the data: memory maps begin at such addresses, and pages are multiples of 64
_LONGEST_HEADER = 100_000_000  # as the safetensors format has it
_RUN = 8 << 20  # bytes that a thread reads before it takes the next run


class SnapshotError(ValueError):
    """A file that is no snapshot, or is damaged, or does not fit; the message says which."""


class Entry(NamedTuple):
    """Where a tensor lies: bytes `begin` to `end` of the file, its checksums from number `first` on."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int
    first: int

    def bounds(self, name: str) -> list[int]:
        """The bytes at which the rows begin, and the end; a tensor without rows is one."""
        rows = self.shape[0] if name.endswith(PAGES) else 1
        return [self.begin + (self.end - self.begin) // rows * i for i in range(rows + 1)]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> None:
    """Write a file, all of it or nothing: whoever opens `path` finds what was there before, or this.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    order = sorted(tensors, key=lambda name: _order(tensors[name]))
    contents = [(name, _rows(tensors[name])) for name in order]
    header = _header(tensors, order, metadata)
    path = Path(path).expanduser()
    with _replacing(path) as file, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sums = pool.map(lambda row: zlib.crc32(_bytes(row)), [row for _, rows in contents for row in rows])
        file.write(header)
        for _, rows in contents:
            for row in rows:
                file.write(_bytes(row))
        file.write(b"".join(struct.pack("<I", crc) for crc in [*sums, zlib.crc32(header)]))


def _order(content: Content) -> int:
    """Pages first, which are multiples of 64 bytes, then by size of elements: so all tensors are aligned."""
    return -content.element_size() if isinstance(content, Tensor) else -(1 << 6)


def _rows(content: Content) -> Sequence[Tensor]:
    return [content] if isinstance(content, Tensor) else content


def _bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor, wherever it lies."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Content], order: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of the file, up to the first tensor."""
    out: dict[str, Any] = {"__metadata__": dict(metadata)}
    at, sums = 0, 1
    for name in order:
        rows = _rows(tensors[name])
        shape = list(rows[0].shape) if isinstance(tensors[name], Tensor) else [len(rows), *rows[0].shape]
        end = at + math.prod(shape) * rows[0].element_size()
        out[name] = {"dtype": DTYPES[rows[0].dtype], "shape": shape, "data_offsets": [at, end]}
        at, sums = end, sums + len(rows)
    out[CHECKSUMS] = {"dtype": "U8", "shape": [sums, 4], "data_offsets": [at, at + 4 * sums]}
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A new file that takes the place of `path` once all of it is on the disk; after an error it is gone."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; allowed: the path of a file, which need not exist")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".kvpack-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the new name, too, is to survive a loss of power, where the file system can do that
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Reader:
    """An open file. Opening it reads the header and the checksums, and verifies the header.

    metadata: what was given to `write`. entries: the tensors by name. nbytes: of the file.

    Raises:
        OSError: it cannot be opened or read.
        SnapshotError: it is not of this kind, truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._file = open(self.path, "rb", buffering=0)
        try:
            self.nbytes = os.fstat(self._file.fileno()).st_size
            self.metadata, self.entries, self._sums = self._open()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def error(self, text: str) -> SnapshotError:
        return SnapshotError(f"{self.path} {text}")

    def _open(self) -> tuple[dict[str, str], dict[str, Entry], list[int]]:
        if self.nbytes < 16:
            raise self.error(f"has {self.nbytes} bytes: it is truncated, or no snapshot")
        (length,) = struct.unpack("<Q", self._read(0, 8))
        if length > min(self.nbytes - 12, _LONGEST_HEADER):
            raise self.error(
                f"is truncated or damaged, or no snapshot: its header would take {length} bytes, the file has "
                f"{self.nbytes}"
            )
        header = self._read(0, 8 + length)
        intact = zlib.crc32(header) == struct.unpack("<I", self._read(self.nbytes - 4, 4))[0]
        try:
            found = json.loads(header[8:])
            metadata = dict(found.pop("__metadata__", {}))
            entries, first = {}, 0
            for name, line in found.items():
                begin, end = (8 + length + int(at) for at in line["data_offsets"])
                shape = [int(size) for size in line["shape"]]
                entries[name] = Entry(_BY_NAME[line["dtype"]], shape, begin, end, first)
                first += shape[0] if name.endswith(PAGES) else 1
            expected = max((entry.end for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise self.error("is damaged in its header, or no snapshot") from error
        if CHECKSUMS not in entries:
            raise self.error("is no snapshot, or its header is damaged: it has no checksums")
        if not intact and self.nbytes != expected:
            what = "is truncated" if self.nbytes < expected else "is longer than it was written"
            raise self.error(
                f"{what}, or its header is damaged: it has {self.nbytes} bytes, the header says {expected}"
            )
        if not intact:
            raise self.error("is damaged: its header does not match its checksum")
        sums = entries.pop(CHECKSUMS)
        self._check(entries, sums, 8 + length)
        return (
            metadata,
            entries,
            [crc for (crc,) in struct.iter_unpack("<I", self._read(sums.begin, 4 * sums.shape[0]))],
        )

    def _check(self, entries: Mapping[str, Entry], sums: Entry, begin: int) -> None:
        """SnapshotError unless the tensors fill the file, one after the other, each as large as its shape."""
        ends = [begin, *(entry.end for entry in entries.values()), self.nbytes]
        begins = [*(entry.begin for entry in entries.values()), sums.begin]
        fits = all(
            entry.end - entry.begin == math.prod(entry.shape) * entry.dtype.itemsize
            and all(size >= 0 for size in entry.shape)
            and (not name.endswith(PAGES) or (len(entry.shape) == 2 and entry.end > entry.begin))
            for name, entry in entries.items()
        )
        count = 1 + sum(entry.shape[0] if name.endswith(PAGES) else 1 for name, entry in entries.items())
        if not fits or begins != ends[:-1] or sums.shape != [count, 4] or sums.end != self.nbytes:
            raise self.error(f"is damaged: the tensors of its header do not fill its {self.nbytes} bytes")

    def _read(self, begin: int, count: int) -> bytes:
        out = bytearray(count)
        self._read_into(memoryview(out), begin)
        return bytes(out)

    def _read_into(self, target: memoryview, begin: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], begin + done)
            if count == 0:
                raise self.error(f"was truncated while it was read: it ends at byte {begin + done}")
            done += count

    def read(self, names: Sequence[str], mapped: bool = False) -> dict[str, Any]:
        """Tensors by name, verified; of those in rows, lists of uint8 [row] tensors.

        mapped: rows are views of a private memory map of the file, which lives as long as any of them; other tensors,
        and without it the rows, have memory of their own. Reads in as many threads as torch uses.

        Raises:
            SnapshotError: a checksum does not match.
        """
        shared = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None
        out: dict[str, Any] = {}
        tasks: list[tuple[list[Tensor], Callable[[], Sequence[Tensor]]]] = []
        for name in names:
            entry, rows = self.entries[name], out.setdefault(name, [])
            bounds = entry.bounds(name)
            each = max(1, _RUN // max(1, bounds[1] - bounds[0]))
            for at in range(0, len(bounds) - 1, each):
                run = (name, entry.first + at, bounds[at : at + each + 1])
                tasks.append((rows, self._task(*run, shared if name.endswith(PAGES) else None)))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for (rows, _), part in zip(tasks, pool.map(lambda task: task[1](), tasks), strict=True):
                rows.extend(part)
        return {
            name: rows if name.endswith(PAGES) else rows[0].view(entry.dtype).view(entry.shape)
            for name, rows in out.items()
            for entry in (self.entries[name],)
        }

    def _task(self, name: str, number: int, bounds: list[int], shared: mmap.mmap | None) -> Callable[[], list[Tensor]]:
        """What reads and verifies the rows between the bounds; the first has checksum `number`."""

        def run() -> list[Tensor]:
            out = []
            with normal_mode():
                for i, (begin, end) in enumerate(pairwise(bounds)):
                    if shared is None:
                        row = torch.empty(end - begin, dtype=torch.uint8)
                        view = row.numpy().data
                        self._read_into(view, begin)
                    else:
                        row = torch.frombuffer(shared, dtype=torch.uint8, count=end - begin, offset=begin)
                        view = row.numpy().data
                    if zlib.crc32(view) != self._sums[number + i]:
                        where = f"{name}, row {number + i - self.entries[name].first}" if name.endswith(PAGES) else name
                        raise self.error(f"is damaged: bytes {begin}..{end - 1} ({where}) do not match their checksum")
                    out.append(row)
            return out

        return run
