"""Where things are in the repository, and what is checked there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "kvpack"
TESTS = ROOT / "tests"


def files(root: Path, *suffixes: str) -> list[Path]:
    """Files below `root` with one of the suffixes, sorted; caches left out."""
    found = (path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name(path: Path) -> str:
    """Relative to the repository, for messages and test ids."""
    return path.relative_to(ROOT).as_posix()
