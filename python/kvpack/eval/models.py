"""Models to measure on: the default model, any local path or hub id, or a labelled random-weight stand-in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvpack._extras import needed

from .errors import ModelUnavailableError

DEFAULT = "default"
RANDOM = "random"
DTYPES = ("float32", "bfloat16", "float16", "float64")

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """A `Say` that says nothing."""


class Tokenizer(Protocol):
    """What measuring needs of a tokenizer. `bos` is the token that every window must begin with, or None."""

    bos: int | None
    eos: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def chat(self, user: str) -> list[int]: ...


class HubTokenizer:
    """A transformers tokenizer. `bos` is set only if the tokenizer itself puts one in front of a text."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        probe = list(inner.encode("a"))
        self.bos: int | None = inner.bos_token_id if probe and probe[0] == inner.bos_token_id else None
        self.eos: int | None = inner.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=True))

    def chat(self, user: str) -> list[int]:
        """The user's message in the model's chat template, or as it is where the model has none."""
        if getattr(self.inner, "chat_template", None) is None:
            return ([] if self.bos is None else [self.bos]) + self.encode(user)
        text = self.inner.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        return self.encode(text)


class ByteTokenizer:
    """One token per UTF-8 byte: the toy tokenizer of the random-weight model. Vocabulary 256."""

    vocab_size = 256
    bos: int | None = None
    eos: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i & 255 for i in ids).decode("utf-8", errors="replace")

    def chat(self, user: str) -> list[int]:
        return self.encode(user)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer; `random` says that the weights mean nothing."""

    model: Any
    tokenizer: Tokenizer
    name: str
    random: bool
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype}" + (" (RANDOM WEIGHTS: figures mean nothing)" if self.random else "")


def cache_dir() -> Path:
    """Where converted models live: $KVPACK_CACHE_DIR, else the platform's user cache directory."""
    if env := os.environ.get("KVPACK_CACHE_DIR"):
        return Path(env).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "kvpack" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "kvpack"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "kvpack"


def torch_dtype(name: str) -> Any:
    """The torch dtype called `name` (one of DTYPES). ValueError names what is allowed."""
    with needed("kvpack.eval", "hf"):
        import torch

    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def cast_parameters(model: Any, dtype: Any) -> None:
    """Casts the parameters in place, and only them.

    `model.to(dtype)` would cast buffers too, the rotary frequencies among them, which ruins long contexts.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def random_model(dtype: str = "float32", *, layers: int = 4, seed: int = 0, **sizes: int) -> LoadedModel:
    """A Llama-shaped model with head size 64, random weights and a byte tokenizer; nothing is fetched.

    The query and key projections are drawn wide, so that attention is peaked and quantization has an effect.
    `sizes` overrides config fields (hidden_size, num_attention_heads, num_key_value_heads, ...).
    """
    with needed("kvpack.eval.random_model", "hf"):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, int] = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    fields.update(sizes)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            width = fields["hidden_size"] ** -0.5
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    gain = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
                    parameter.normal_(std=gain * width)
    finally:
        torch.random.set_rng_state(state)
    cast_parameters(model, torch_dtype(dtype))
    name = f"random Llama ({layers} layers, hidden {fields['hidden_size']}, head size {fields['head_dim']})"
    return LoadedModel(model, ByteTokenizer(), name, True, dtype)


def load_model(name: str = DEFAULT, dtype: str = "float32", *, say: Say = quiet) -> LoadedModel:
    """Loads `name`: "default", "random", a local directory, a .gguf file or a hub id.

    Raises ModelUnavailableError where the model cannot be had (offline, unknown, missing package).
    """
    want = torch_dtype(dtype)
    with needed("kvpack.eval.load_model", "hf"):
        import kvpack.hf.compat  # noqa: F401, it refuses a transformers that is too old
    if name == RANDOM:
        return random_model(dtype)
    label = name
    if name == DEFAULT:
        from .default_model import ensure_default_model

        name, label = str(ensure_default_model(say)), "SmolLM2-135M-Instruct (Q4_1 weights)"
    path = Path(name).expanduser()
    local = path.exists()
    extra: dict[str, Any] = {}
    if local and path.suffix == ".gguf":
        extra["gguf_file"] = path.name
        path = path.parent
    source = str(path) if local else name
    say(f"loading {label}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=want, local_files_only=local, **extra)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, **extra)
    except (OSError, ImportError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnavailableError(f"model {label!r} cannot be loaded: {first}") from error
    return LoadedModel(model.eval(), HubTokenizer(tokenizer), label, False, dtype)


class no_progress_bars:
    """Silences transformers' own bars and load reports for a while: ours is the only progress on the
    terminal.
    """

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging = logging
        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
