"""The README's table of model families says what is tested, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from .families import FAMILIES, REFUSED, Family
from .modes import MODES

README = Path(__file__).parents[2] / "README.md"
HEAD = "| family | equal under `exact` | fused by default | notes |"
TICK = "✓"


def row(family: Family) -> str:
    """`test_exact.py` runs every family, and looks whether attention was fused."""
    fused = TICK if family.fused else "after `kvpack.enable(model)`" if family.enables else "no: decoded"
    return f"| {family.title} | {TICK} | {fused} | {family.notes} |"


def test_the_table_of_families() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(HEAD) == 1
    rows = text.partition(HEAD)[2].partition("\n\n")[0].strip().splitlines()[1:]
    reasons = {title: reason.partition(" (layers")[0] for title, (_, reason) in REFUSED.items()}
    expected = [row(family) for family in FAMILIES.values()]
    expected += [f"| {title} | refused | | {reason} |" for title, reason in reasons.items()]
    assert rows == expected


def test_the_modes_that_it_names() -> None:
    text = README.read_text(encoding="utf-8").partition(HEAD)[2]
    named = re.search(r"Modes of\s+generation:\s+(.*?)\.", text, re.DOTALL)
    assert named is not None
    assert " ".join(named[1].split()).split(", ") == [mode.replace(", ", " and ") for mode in MODES]
