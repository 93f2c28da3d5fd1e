"""What the documentation claims: its commands exist, its options exist, its bits are the program's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import kvpack
from kvpack.spec import SIDES

from .paths import ROOT, files, name

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *files(ROOT / "docs", ".md")]
FENCE = re.compile(r"^```(?:sh|console|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:kvpack|make) [^`]+)`|<!-- numbers: ([^>]*?) -->")


def command_lines(path: Path) -> list[str]:
    """Commands in shell fences, in backticks, and behind the figures."""
    text = path.read_text(encoding="utf-8")
    found = [part for block in FENCE.findall(text) for line in block.splitlines() for part in line.split("&&")]
    found += [a or b for a, b in INLINE.findall(text)]
    lines = (line.strip().removeprefix("$ ").partition("  #")[0].strip() for line in found)
    return sorted({line for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*(?:kvpack|make)(?: |$)", line)})


CASES = [pytest.param(path, line, id=f"{name(path)}: {line}") for path in DOCS for line in command_lines(path)]


@pytest.mark.parametrize(("path", "line"), CASES)
def test_commands_exist(path: Path, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    typer = pytest.importorskip("typer")
    from kvpack.cli.app import app

    program: Any = typer.main.get_command(app)
    options = {option for parameter in program.params for option in parameter.opts} | {"--help", "-h"}
    if len(words) > 1 and not words[1].startswith("-"):
        for one in words[1].split("|"):  # `kvpack demo|ppl`
            assert one in program.commands, f"{one} is not a command of kvpack"
            command = program.commands[one]
            for parameter in command.params:
                options |= {*parameter.opts, *parameter.secondary_opts}
    for word in words[1:]:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{word} is not an option of {' '.join(words[:2])}"


def test_the_codec_table_is_what_the_program_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    told = {codec: (float(d64), float(d128)) for codec, d64, d128 in rows}
    # `exact` has the bits of the model's dtype.
    own = {codec for codec in kvpack.codecs() if codec != "exact"}
    assert set(told) - {"exact"} == own
    for codec in own:
        for side in SIDES:
            bits = tuple(kvpack.codec(codec, head_dim=d, side=side).bits for d in (64, 128))
            assert told[codec] == pytest.approx(bits, abs=5e-4), codec


def test_the_python_example_runs() -> None:
    """The NumPy example of the README; the one for a model is in the notebook."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    numpy_only = [block for block in blocks if "import numpy" in block and "torch" not in block]
    assert numpy_only
    for block in numpy_only:
        exec(compile(block, "README.md", "exec"), {})
