"""Instruction-set levels of the CPU kernels: which exist here, which one runs.

``KVPACK_ISA=<level>`` in the environment pins one from the start; every level gives the same codes and scales.
"""

from __future__ import annotations

import os
import sys

from kvpack import _core


def available() -> list[str]:
    """Levels that this build has and this machine can run, slowest first."""
    return list(_core.isa_available())


def active() -> str:
    """The level in use."""
    return str(_core.isa_active())


def use(name: str) -> None:
    """Pin a level, for NumPy codecs and operators alike.

    Raises:
        ValueError: the level is not available here.
    """
    _core.isa_use(name)
    os.environ["KVPACK_ISA"] = name  # for operators that are loaded later
    library = sys.modules.get("kvpack.ops._library")
    if library is not None:
        library.use_isa(name)
