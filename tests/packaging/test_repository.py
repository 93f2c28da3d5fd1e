"""Rules of the repository: one version, small files, no dangerous flags, docs that match the program."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from .paths import CSRC, PYTHON, ROOT, TESTS, files, name

LINES = 400


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    python = re.search(r'__version__ = "(.+)"', (PYTHON / "_version.py").read_text(encoding="utf-8"))
    cmake = re.search(r"project\(kvpack VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    changelog = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert python is not None
    assert cmake is not None
    assert changelog is not None
    assert {project, python[1], cmake[1], changelog[1]} == {project}


def test_the_oldest_transformers_is_the_same_everywhere() -> None:
    """What the package asks for, what is tested, what the code looks for, and what the README says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [line for line in project["optional-dependencies"]["hf"] if line.startswith("transformers")]
    pinned = re.search(
        r"^transformers==(\d+)\.(\d+)", (ROOT / "requirements/oldest.txt").read_text("utf-8"), re.MULTILINE
    )
    code = re.search(r"^OLDEST = \((\d+), (\d+)\)", (PYTHON / "_extras.py").read_text("utf-8"), re.MULTILINE)
    readme = re.search(
        r"^\| transformers \| (\d+)\.(\d+) and newer", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert pinned is not None
    assert code is not None
    assert readme is not None
    assert asked == ["transformers>=" + ".".join(pinned.groups())]
    assert pinned.groups() == code.groups() == readme.groups()


def test_torch_is_no_build_requirement() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert not [line for line in build if line.startswith("torch")]


SOURCES = [*files(CSRC, ".h", ".cpp", ".def", ".cu", ".cuh"), *files(PYTHON, ".py"), *files(TESTS, ".py", ".h", ".cpp")]


def test_files_are_small() -> None:
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in sizes.items() if lines > LINES} == {}


def test_no_flag_that_breaks_the_promises() -> None:
    """The build machine's own ISA in a wheel, or arithmetic that is not the format's."""
    forbidden = re.compile(r"march=native|mtune=native|mcpu=native|-Ofast|ffast-math|funsafe-math|fassociative-math")
    build = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*"), *TESTS.rglob("CMakeLists.txt")]
    build += [
        path for path in [ROOT / "CMakePresets.json", ROOT / "pyproject.toml", ROOT / "Makefile"] if path.exists()
    ]
    for path in build:
        assert not forbidden.search(path.read_text(encoding="utf-8")), name(path)


def test_notebooks_have_no_outputs() -> None:
    for path in files(ROOT / "notebooks", ".ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None), name(
                path
            )


MARKDOWN = [*ROOT.glob("*.md"), *files(ROOT / "docs", ".md")]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{name(path)} links to {target}"


MENTIONED = re.compile(r"`((?:csrc|python/kvpack|tests|docs|tools|requirements|notebooks)/[\w./-]+)`")


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_files_that_are_named_exist(path: Path) -> None:
    for target in MENTIONED.findall(path.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{name(path)} names {target}"
