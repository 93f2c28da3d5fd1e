"""How the native library is found, and what is said when it is missing."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kvpack import ops
from kvpack.ops import _library

NAMES = ("encode", "decode", "rotate", "encode_pages", "decode_pages", "append", "attend", "attend_counting")


def test_native_is_what_the_dispatcher_has() -> None:
    for name in NAMES:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"kvpack::{name}", "CPU")
        assert has == ops.native, name
        assert torch.Tag.needs_fixed_stride_order in getattr(torch.ops.kvpack, name).default.tags
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.kvpack, name).default.tags


def test_operators_that_mutate_return_nothing() -> None:
    for name in NAMES:
        schema = getattr(torch.ops.kvpack, name).default._schema
        assert schema.is_mutable == (name in ("encode_pages", "append", "attend_counting"))
        assert bool(schema.returns) != schema.is_mutable


def test_a_missing_library_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPACK_NO_NATIVE", raising=False)
    monkeypatch.setattr(_library, "_candidates", list)
    with pytest.warns(RuntimeWarning, match="native operators are missing") as caught:
        assert not _library.load_native()
    assert len(caught) == 1


def test_a_broken_library_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVPACK_NO_NATIVE", raising=False)
    broken = tmp_path / "_C_cpu.abi3.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_library, "_candidates", lambda: [str(broken)])
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert not _library.load_native()


def test_it_can_be_skipped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPACK_NO_NATIVE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _library.load_native()


def test_the_defaults_serve_a_process_without_the_library() -> None:
    program = (
        "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
        "import torch; from kvpack import ops\n"
        "assert not ops.native\n"
        "x = torch.ones(64, 64)\n"
        "assert torch.equal(ops.decode(*ops.encode(x, 0, 0), 0, 0, 64, 64, torch.float32), x)\n"
    )
    env = {"KVPACK_NO_NATIVE": "1", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env, timeout=120)
