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

# Names that are imported when they are first used, because they need an extra: module, and attribute or None for the
# module itself. The module's own error names the extra.
_LAZY: dict[str, tuple[str, str | None]] = {
    "ops": ("kvpack.ops", None),
    "Cache": ("kvpack.hf", "Cache"),
    "disable": ("kvpack.hf", "disable"),
    "enable": ("kvpack.hf", "enable"),
    "nbytes": ("kvpack.hf", "nbytes"),
    "eval": ("kvpack.eval", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
