"""kvpack: KV caches that stay packed at 2 to 8 bits and are read in packed form.

``import kvpack`` needs NumPy only: :func:`codec` encodes and decodes arrays. With torch there are the operators
(``kvpack.ops``) and codecs on tensors; with transformers, :class:`Cache`. A missing extra is named by the error.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvpack import isa, spec
from kvpack._version import __version__
from kvpack.codec import Codec, Packed, build_info, codec, codecs
from kvpack.policy import Policy

if TYPE_CHECKING:
    from kvpack import eval, ops
    from kvpack.hf import Cache, disable, enable, nbytes

__all__ = [
    "Cache",
    "Codec",
    "Packed",
    "Policy",
    "__version__",
    "build_info",
    "codec",
    "codecs",
    "disable",
    "enable",
    "eval",
    "isa",
    "nbytes",
    "ops",
    "spec",
]

# Names that need an extra: (module, attribute or None for the module itself, what has to be installed).
_LAZY: dict[str, tuple[str, str | None, str]] = {
    "ops": ("kvpack.ops", None, "torch"),
    "Cache": ("kvpack.hf", "Cache", "hf"),
    "disable": ("kvpack.hf", "disable", "hf"),
    "enable": ("kvpack.hf", "enable", "hf"),
    "nbytes": ("kvpack.hf", "nbytes", "hf"),
    "eval": ("kvpack.eval", None, "hf"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
    module, attribute, extra = _LAZY[name]
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "kvpack":
            raise
        raise ImportError(f"kvpack.{name} needs {error.name}: pip install 'kvpack[{extra}]'") from error
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
