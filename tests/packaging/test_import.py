"""`import kvpack` is light, and a missing extra is named. Each case is a process of its own."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("expression", "extra", "missing"),
    [
        ("kvpack.Cache", "kvpack[hf]", ("torch", "transformers")),
        ("kvpack.Cache", "kvpack[hf]", ("transformers",)),
        ("kvpack.nbytes", "kvpack[hf]", ("torch",)),
        ("kvpack.ops", "kvpack[torch]", ("torch",)),
    ],
)
def test_the_error_names_the_extra(expression: str, extra: str, missing: tuple[str, ...]) -> None:
    code = f"""
import kvpack
try:
    {expression}
except ImportError as error:
    print(error)
"""
    assert extra in run(code, *missing)


def test_the_command_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(names={"typer"}) + "from kvpack.cli import main; main()"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "typer" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_public_name_is_there() -> None:
    pytest.importorskip("transformers")
    run("import kvpack; assert all(getattr(kvpack, name) is not None for name in kvpack.__all__)")
