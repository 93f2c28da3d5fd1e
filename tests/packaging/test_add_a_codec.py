"""docs/add-a-codec.md, taken at its word: its snippets put into a copy of the sources make a codec that works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from .paths import ROOT

CHECK = """
import numpy as np
import torch
import kvpack
from kvpack import ops, reference

assert "uniform3" in kvpack.codecs()
x = np.random.default_rng(0).standard_normal((4, 200, 128), dtype=np.float32)
for side in ("key", "value"):
    for text in ("uniform3", "uniform3:scale=mse,center=tile,search"):
        codec = kvpack.codec(text, head_dim=128, side=side)
        packed, spec = codec.encode(x), codec.spec
        center = spec.center or "none"
        means = reference.encode_means(x, "uniform3", center, side)
        want = reference.encode(x, "uniform3", spec.scale, side, center, spec.search, means)
        assert (packed.data == want).all() and (packed.means == means).all()
        error = ((codec.decode(packed) - x) ** 2).mean()
        assert 0.034 < error < 0.039, error
code = kvpack.codec("uniform3", head_dim=128).spec.code()
layout = ops.layout(code, 128, code, 128, 1)
raw = torch.zeros(ops.page_bytes(layout) + 64, dtype=torch.uint8)
page = raw[-raw.data_ptr() % 64 :]
table = torch.tensor([[page.data_ptr()]])
keys, values = (torch.from_numpy(x[i : i + 1, None, :64].copy()) for i in (0, 1))
ops.encode_pages(table, keys, values, 0, layout)
counts = torch.tensor([64], dtype=torch.int32)
query = torch.from_numpy(x[2:3, None, :1].copy())
got = ops.attend(query, table, counts, *[None] * 7, layout, 128**-0.5)
decoded = [ops.decode_pages(table, counts, side, layout, torch.float32) for side in (0, 1)]
want = torch.nn.functional.scaled_dot_product_attention(query, *decoded)
assert (got - want).norm() < 1e-4 * want.norm()
"""


def put(path: Path, before: str, snippet: str) -> None:
    """Insert a snippet before a line that begins with `before`."""
    text = path.read_text(encoding="utf-8")
    at = re.search(rf"^{re.escape(before)}", text, flags=re.MULTILINE)
    assert at is not None, f"{path.name} has no line {before!r}"
    path.write_text(text[: at.start()] + snippet + text[at.start() :], encoding="utf-8")


@pytest.mark.full
def test_the_walk_through_adding_a_codec(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "add-a-codec.md").read_text(encoding="utf-8")
    struct, line, codebook, entry = re.findall(r"```(?:cpp|python)\n(.*?)```", page, flags=re.DOTALL)
    assert len((struct + line + codebook + entry).splitlines()) < 60
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    package = tmp_path / "python" / "kvpack"
    shutil.copytree(ROOT / "python" / "kvpack", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    put(tmp_path / "csrc/codecs/lloyd_max.h", "// Number k (1-based)", struct + "\n")
    definitions = tmp_path / "csrc/codecs/codecs.def"
    definitions.write_text(definitions.read_text(encoding="utf-8") + line, encoding="utf-8")
    put(package / "reference/codebooks.py", '    "tqr3": Codebook', codebook)
    put(package / "reference/codecs.py", '    "tcq1": _trellis', entry)

    # The scalar level is enough: the others are the same templates.
    module = package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [*sorted((tmp_path / "csrc/core").glob("*.cpp")), "csrc/isa/scalar.cpp", "csrc/bind/numpy.cpp"]
    includes = ["-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    facts = ['-DKVPACK_VERSION="0"', '-DKVPACK_ARCH="generic"', '-DKVPACK_COMPILER="any"', "-DKVPACK_HAS_TORCH=0"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    command = ["c++", *flags, *includes, *facts, *map(str, sources), "-o", str(module)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=900)
    environment = {"PYTHONPATH": str(tmp_path / "python"), "KVPACK_NO_NATIVE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", CHECK], check=True, env=environment, cwd=tmp_path, timeout=300)
