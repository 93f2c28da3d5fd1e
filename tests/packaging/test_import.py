"""`import kvpack` is light, and a missing extra is named. Each case is a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run(code: str, *missing: str) -> str:
    """The standard output of a Python process for which some packages do not exist."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(names=set(missing)) + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_kvpack_loads_neither_torch_nor_transformers() -> None:
    run("import kvpack; assert not {'torch', 'transformers', 'typer'} & set(sys.modules), sorted(sys.modules)")


def test_numpy_alone_encodes_and_decodes() -> None:
    code = """
import numpy as np, kvpack
x = np.random.default_rng(0).standard_normal((2, 100, 128), dtype=np.float32)
for name in kvpack.codecs():
    c = kvpack.codec(name, head_dim=128, side="value")
    y = c.decode(c.encode(x))
    assert y.shape == x.shape, name
    assert ((x - y) ** 2).mean() < 0.65, name  # tqp2 has .62: the price of being unbiased
print("fine")
"""
    assert run(code, "torch", "transformers") == "fine\n"


TORCH = ("kvpack.ops", "from kvpack.ops import attend")
HF = (
    "kvpack.Cache",
    "kvpack.nbytes",
    "from kvpack.hf import PackedLayer",
    "kvpack.eval.load_model('random')",
    "kvpack.eval.random_model()",
)


@pytest.mark.parametrize("missing", [("torch", "transformers"), ("torch",), ("transformers",)], ids=" ".join)
def test_the_error_names_the_extra(missing: tuple[str, ...]) -> None:
    """The first package that is missing, and the extra that brings it."""
    code = f"""
import kvpack
for statement in {(*TORCH, *HF)}:
    try:
        exec(statement)
    except ImportError as error:
        print(error)
    else:
        print("fine")
"""
    said = run(code, *missing).splitlines()
    assert len(said) == len(TORCH) + len(HF)
    for line in said[: len(TORCH)]:
        assert line == ("kvpack.ops needs torch: pip install 'kvpack[torch]'" if "torch" in missing else "fine")
    for line in said[len(TORCH) :]:
        assert line.endswith(tuple(f" needs {name}: pip install 'kvpack[hf]'" for name in missing)), line


def test_operators_work_without_transformers() -> None:
    code = """
import torch, kvpack
assert kvpack.ops.native
x = torch.randn(2, 100, 64)
codec = kvpack.codec("tq4", head_dim=64, side="key")
assert ((codec.decode(codec.encode(x)) - x) ** 2).mean() < 0.02
assert kvpack.ops.rotate(x).shape == x.shape
print("fine")
"""
    assert run(code, "transformers") == "fine\n"


def test_a_transformers_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from kvpack.hf import compat

    monkeypatch.setattr(transformers, "__version__", "5.15.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.16 or newer, and 5\.15\.1 is installed: pip install"):
        importlib.reload(compat)
    monkeypatch.setattr(transformers, "__version__", "6.0.0.dev0")
    importlib.reload(compat)


def test_commands_refuse_a_transformers_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("typer")
    code = """
import importlib.metadata, sys, transformers
from typer.testing import CliRunner
from kvpack.cli.app import app
version = importlib.metadata.version
importlib.metadata.version = lambda name: "5.15.1" if name == "transformers" else version(name)
transformers.__version__ = "5.15.1"
said = "needs transformers 5.16 or newer, and 5.15.1 is installed: pip install --upgrade 'kvpack[hf]'"
for words in ("ppl tq4 --model random", "sweep --model random", "allocate --model random", "demo"):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 3 and said in result.stderr, (words, result.output)
result = CliRunner().invoke(app, ["doctor"])
assert result.exit_code == 1 and "TOO OLD" in result.output, result.output
assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1
"""
    run(code)


@pytest.mark.parametrize("arguments", [["--help"], ["codecs"], ["codecs", "--json"], ["doctor"], ["doctor", "--json"]])
def test_commands_that_need_no_torch(arguments: list[str]) -> None:
    pytest.importorskip("typer")
    code = f"sys.argv = ['kvpack', *{arguments}]\nfrom kvpack.cli import main\nmain()"
    assert "tq4" in run(code, "torch", "transformers") or arguments == ["--help"]


def test_commands_name_the_extra() -> None:
    pytest.importorskip("typer")
    code = """
from typer.testing import CliRunner
from kvpack.cli.app import app
for words in ("ppl tq4", "sweep", "demo", "allocate", "bench", "doctor --model x"):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 3, (words, result.output)
    assert "pip install 'kvpack[hf]'" in result.stderr, (words, result.stderr)
    assert "Traceback" not in result.output
"""
    run(code, "torch", "transformers")


def test_the_command_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(names={"typer"}) + "from kvpack.cli import main; main()"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3
    assert "needs typer: pip install 'kvpack[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_public_name_is_there() -> None:
    pytest.importorskip("transformers")
    run("import kvpack; assert all(getattr(kvpack, name) is not None for name in kvpack.__all__)")
