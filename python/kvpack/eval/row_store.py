"""Finished rows of a sweep on disk, by their key: what a rerun need not measure again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .results import Divergence, divergence_from


class RowStore:
    """Rows in a directory, one file each (KEY.json), or in one file that ends in .jsonl, a line each.

    A file or line that was cut off counts as not there. Beside a directory DIR, the rows of a file DIR.jsonl are
    read too: kvpack 0.1.0 wrote those.

    Raises:
        ValueError: the path is a file where a directory is needed, or the other way about.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = path.suffix == ".jsonl"
        if path.is_dir() if self._lines else path.is_file():
            kind, other = ("directory", "file") if self._lines else ("file", "directory")
            raise ValueError(f"rows cannot be kept in {path}: it is a {kind}; allowed: a {other}, which need not exist")

    def read(self) -> dict[str, Divergence]:
        """All finished rows by key."""
        lines = self.path if self._lines else self.path.parent / f"{self.path.name}.jsonl"
        texts = _text(lines).splitlines() if lines.is_file() else []
        if not self._lines and self.path.is_dir():
            texts += [_text(file) for file in sorted(self.path.glob("*.json"))]
        found: dict[str, Divergence] = {}
        for text in texts:
            try:
                row = json.loads(text)
                found[str(row["row"])] = divergence_from(row)
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def add(self, key: str, result: Divergence) -> None:
        """Write a finished row: it is there as a whole or not at all."""
        row = {"row": key, **result.to_json()}
        if self._lines:
            append_row(self.path, row)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        whole = self.path / f"{key}.json"
        part = self.path / f".{key}.{os.getpid()}"
        part.write_text(json.dumps(row, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(whole)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")  # a damaged file is no row, and no error


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line to a JSONL file, whose last line may have been cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(row, allow_nan=False) + "\n")
