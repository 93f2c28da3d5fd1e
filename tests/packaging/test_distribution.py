"""What is installed, what the sdist holds, and that it installs where there is no torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

from .paths import ROOT


def call(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def installed() -> dict[str, Path]:
    """Files of the installed distribution, by name; skips where kvpack runs from a checkout."""
    try:
        distribution = importlib.metadata.distribution("kvpack")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kvpack is not installed, it runs from PYTHONPATH")
    if distribution.read_text("direct_url.json") and "editable" in str(distribution.read_text("direct_url.json")):
        pytest.skip("an editable installation")
    return {str(file): Path(str(file.locate())) for file in distribution.files or []}


def test_the_installed_files() -> None:
    names = [name for name in installed() if not name.startswith("kvpack-") and "__pycache__" not in name]
    assert "kvpack/py.typed" in names
    assert [name for name in names if name.startswith("kvpack/_core.")]
    assert {Path(name).suffix for name in names if name.startswith("kvpack/")} <= {".py", ".pyi", ".so", ".typed"}
    outside = [name for name in names if not name.startswith("kvpack/")]
    assert [name for name in outside if Path(name).name != "kvpack"] == []  # the command
    sources = {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python" / "kvpack").rglob("*.py")}
    assert sources <= set(names)


def test_metadata() -> None:
    installed()
    metadata = importlib.metadata.metadata("kvpack")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or []) == {"torch", "hf", "cli", "peers", "ray", "test", "all"}
    assert [line for line in metadata.get_all("Requires-Dist") or [] if "extra" not in line] == ["numpy>=1.26"]


def test_the_operator_library_needs_torch_by_name_only() -> None:
    """libtorch_cpu.so is named, because torch loads its libraries locally; nothing of C++ torch is bound to."""
    library = next((path for name, path in installed().items() if name.startswith("kvpack/_C_cpu")), None)
    if library is None:
        pytest.skip("built without torch")
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = call("readelf", "--dynamic", "--wide", library)
    assert "libtorch_cpu.so" in dynamic
    assert "libc10" not in dynamic
    assert "RUNPATH" not in dynamic
    symbols = [
        line.split()[-1] for line in call("readelf", "--dyn-syms", "--wide", library).splitlines() if " UND " in line
    ]
    assert [name for name in symbols if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))] == []


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a checkout")
    pytest.importorskip("scikit_build_core")
    out = tmp_path_factory.mktemp("sdist")
    build = f"import os, scikit_build_core.build as b; os.chdir({str(ROOT)!r}); print(b.build_sdist({str(out)!r}))"
    return out / call(sys.executable, "-c", build).splitlines()[-1]


def test_the_sdist_holds_sources_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "csrc/codecs/codecs.def"):
        assert needed in names
    assert "python/kvpack/py.typed" in names
    built = {path for path in names if path.startswith("build/") or path.endswith((".so", ".pyc"))}
    private = {path for path in names if path.startswith(".") and "/" in path}
    assert built | private == set()
    sources = {
        path.relative_to(ROOT).as_posix() for folder in ("csrc", "cmake") for path in (ROOT / folder).rglob("*.*")
    }
    assert sources <= names


@pytest.mark.full
@pytest.mark.xdist_group("build")
def test_the_sdist_installs_where_there_is_no_torch(sdist: Path, tmp_path: Path) -> None:
    """The way of a user without torch: pip, with build isolation, into a new environment."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CMAKE", "KVPACK"))}
    env["CMAKE_BUILD_PARALLEL_LEVEL"] = "1"  # another worker is busy
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    call(python, "-m", "pip", "install", "--quiet", sdist, cwd=tmp_path, env=env)
    check = """
import numpy as np, kvpack
assert kvpack.build_info()["torch_operators"] is False
c = kvpack.codec("tq4", head_dim=128, side="key")
x = np.random.default_rng(0).standard_normal((100, 128), dtype=np.float32)
assert ((c.decode(c.encode(x)) - x) ** 2).mean() < 0.0095
try:
    kvpack.Cache
except ImportError as error:
    print(error)
"""
    said = call(python, "-W", "error", "-c", check, cwd=tmp_path, env=env)
    assert "kvpack[hf]" in said


@pytest.mark.full
@pytest.mark.xdist_group("build")
def test_an_editable_installation_works(tmp_path: Path) -> None:
    """In a copy: it must not disturb the environment that the tests run in."""
    copy, home = tmp_path / "kvpack", tmp_path / "venv"
    copy.mkdir()
    for item in ("csrc", "cmake", "python"):
        shutil.copytree(ROOT / item, copy / item, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for item in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / item, copy / item)
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CMAKE", "KVPACK"))}
    call(python, "-m", "pip", "install", "--quiet", "--editable", copy, cwd=tmp_path, env=env)
    said = call(python, "-c", "import kvpack; print(kvpack.__file__, kvpack.isa.active())", cwd=tmp_path, env=env)
    assert said.startswith(str(copy / "python"))
