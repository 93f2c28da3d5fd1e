"""The operator library ``kvpack``: one schema registry, and the loading of the native implementation.

Every operator is defined once, in Python: a schema, a *fake* (shapes for ``torch.compile``) and a *default*
in plain PyTorch. The default is registered as ``CompositeExplicitAutograd``, so that it serves every device
until a native library registers a kernel for that device's key, which then wins. The compiled library holds
only such kernels; it knows no schema, and so it is loaded after all of them are defined.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "kvpack"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]

# Kernels read raw strides, so the compiler must not change them; and the fakes and functional schemas hold
# to the rules of torch.compile.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def register(
    schema: str,
    fake: Callable[..., Any],
    default: Callable[..., Any],
    extra_tags: tuple[torch.Tag, ...] = (),
) -> Callable[..., Any]:
    """Define an operator ``name(...) -> ...`` with its fake and its default; returns its only overload."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=_TAGS + extra_tags)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


_loaded: list[str] = []


def use_isa(name: str) -> None:
    """Pin the ISA level of the compiled operators, if they are loaded; ``kvpack.isa.use`` calls this."""
    for path in _loaded:
        if ctypes.CDLL(path).kvpack_isa_use(name.encode()) != 0:
            raise ValueError(f"ISA level {name!r} is not available to the operators")


def _candidates() -> list[str]:
    """Where the native library may lie; first the import system's answer, right for editable installs too."""
    found: list[str] = []
    spec = importlib.util.find_spec(f"{NAMESPACE}._C_cpu")
    if spec is not None and spec.origin is not None:
        found.append(spec.origin)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for pattern in ("_C_cpu*.so", "_C_cpu*.dylib", "_C_cpu*.pyd"):
        found.extend(sorted(glob.glob(os.path.join(package, pattern))))
    return list(dict.fromkeys(found))


def load_native() -> bool:
    """Load the compiled operators; True if they now serve the CPU.

    ``KVPACK_NO_NATIVE=1`` skips them silently. If they are missing or do not load, one warning says so: the
    defaults are right, but slow, and nobody should measure their speed by accident.
    """
    if os.environ.get("KVPACK_NO_NATIVE") == "1":
        return False
    reason = "the compiled library _C_cpu was not found beside the package"
    for path in _candidates():
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError as error:
            reason = f"{path} does not load: {error}"
            continue
        _loaded.append(path)
        return True
    warnings.warn(
        f"kvpack: the native operators are missing ({reason}). The plain PyTorch defaults run instead: their "
        "results are right, but they are many times slower, and attention decodes the whole cache on every "
        "call. Reinstall kvpack with torch already installed, or set KVPACK_NO_NATIVE=1 to accept this.",
        RuntimeWarning,
        stacklevel=3,
    )
    return False
