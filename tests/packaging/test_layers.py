"""The four layers: no arrow runs upwards, in Python or in C++.

python/kvpack/eval, cli      measure
python/kvpack/hf             fit
python/kvpack/ops            call
csrc                         compute: knows neither torch nor Python, outside csrc/bind
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from .paths import CSRC, PYTHON, files, name

# Which parts of kvpack each part may import. "" stands for the modules beside __init__.py; `_core` is the compiled
# core. Imports inside functions count: an arrow that is followed late is still an arrow.
SURFACE = {"_extras", "_version", "_core", "isa", "spec", "codec", "policy"}
ALLOWED: dict[str, set[str]] = {
    "reference": {"reference"},
    "ops": {"ops", "reference"} | SURFACE,
    "hf": {"hf", "ops", "reference"} | SURFACE,
    "eval": {"eval", "hf", "ops", "reference"} | SURFACE,
    "cli": {"cli", "eval", "hf", "ops", "reference"} | SURFACE,
}
# The public names of `kvpack` itself, by where they live: `from kvpack import Cache` is an arrow to hf.
HOMES = {
    "Cache": "hf",
    "disable": "hf",
    "enable": "hf",
    "nbytes": "hf",
    "codecs": "codec",
    "Codec": "codec",
    "Packed": "codec",
    "build_info": "codec",
    "Policy": "policy",
}
OUTSIDE = {
    "reference": {"numpy"},
    "": {"numpy", "torch"},
    "ops": {"numpy", "torch"},
    "hf": {"numpy", "torch", "transformers"},
}
# The surface gives tensors to the operators, and never reaches higher. __init__ names everything, lazily.
SURFACE_MAY = SURFACE | {"ops"}


def part_of(path: Path) -> str:
    inside = path.relative_to(PYTHON).parts
    return inside[0] if len(inside) > 1 else ""


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file; names imported from a package are appended."""
    package = ("kvpack", *path.relative_to(PYTHON).parent.parts)
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kvpack":
            found.append((node.lineno, f"kvpack.{node.attr}"))  # kvpack.codec(...) after `import kvpack`
    return found


@pytest.mark.parametrize("path", files(PYTHON, ".py"), ids=name)
def test_no_import_runs_upwards(path: Path) -> None:
    part = part_of(path)
    if path == PYTHON / "__init__.py":
        pytest.skip("names everything, lazily: test_import.py")
    for line, module in imports(path):
        top, *rest = module.split(".")
        if top == "kvpack":
            target = HOMES.get(rest[0], rest[0]) if rest else ""
            known = target in ALLOWED or target in SURFACE
            allowed = ALLOWED.get(part, SURFACE_MAY)
            assert not known or target in allowed, f"{name(path)}:{line} imports {module}, which lies above"
        elif part in OUTSIDE and top not in sys.stdlib_module_names:
            assert top in OUTSIDE[part], f"{name(path)}:{line} imports {module}; {part or 'kvpack'} must not"


# Folders of csrc by what they may include of each other.
INCLUDES = {
    "kvpack": {"kvpack"},
    "codecs": {"codecs", "kvpack"},
    "simd": {"simd", "kvpack"},
    "kernels": {"kernels", "codecs", "simd", "kvpack"},
    "isa": {"kernels", "simd"},
    "core": {"core", "kernels", "codecs", "simd", "kvpack"},
    "bind": {"kvpack", "bind"},
}
CPP = files(CSRC, ".h", ".cpp", ".def", ".cuh", ".cu")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)


@pytest.mark.parametrize("path", CPP, ids=name)
def test_no_include_runs_upwards(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    for bracket, header in INCLUDE.findall(path.read_text(encoding="utf-8")):
        if bracket == '"':
            assert header.split("/")[0] in INCLUDES[folder], f"{name(path)} includes {header}"
        elif folder != "bind":
            foreign = ("Python.h", "pybind11", "torch", "ATen", "c10", "numpy")
            assert not header.startswith(foreign), f"{name(path)} includes <{header}>: only csrc/bind may"


def test_only_simd_has_intrinsics() -> None:
    """One exception: the floating-point control register has an intrinsic of its own."""
    headers = {"immintrin.h", "x86intrin.h", "arm_neon.h", "emmintrin.h", "xmmintrin.h"}
    users = {
        name(path)
        for path in CPP
        if headers & {header for _, header in INCLUDE.findall(path.read_text(encoding="utf-8"))}
    }
    outside = {user for user in users if not user.startswith("csrc/simd/")}
    assert outside <= {"csrc/core/fp_control.h"}


@pytest.mark.parametrize("folder", ["simd", "kernels", "isa"])
def test_isa_units_use_no_containers(folder: str) -> None:
    """Templates of the standard library compiled with ISA flags leak into the whole program as weak symbols."""
    forbidden = {"algorithm", "array", "functional", "map", "memory", "string", "vector", "Eigen"}
    for path in (path for path in CPP if path.relative_to(CSRC).parts[0] == folder):
        for _, header in INCLUDE.findall(path.read_text(encoding="utf-8")):
            assert header.split("/")[0] not in forbidden, f"{name(path)} includes <{header}>"
