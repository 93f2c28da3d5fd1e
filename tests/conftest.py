"""What all tests share: a hub that cannot be reached, one thread, reproducible hypothesis, and a header of facts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

# Before torch or transformers are imported. Nothing is fetched by a test, and workers of xdist share few cores.
for _name, _value in (
    ("HF_HUB_OFFLINE", "1"),
    ("OMP_NUM_THREADS", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    # Corpora and statistics, in a folder beside the checkout; what needs them skips where they are not.
    ("KVPACK_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data")),
):
    os.environ.setdefault(_name, _value)

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # The same examples every time, and no deadlines: the machine may be busy, or emulated.
    settings.register_profile("kvpack", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvpack")


def pytest_report_header() -> list[str]:
    """What is under test: which package, ISA level and operators."""
    import kvpack

    native: Any = "no torch"
    if importlib.util.find_spec("torch") is not None:
        import torch

        from kvpack import ops

        native = f"torch {torch.__version__}, operators {'native' if ops.native else 'MISSING, defaults run'}"
    return [
        f"kvpack {kvpack.__version__} in {os.path.dirname(str(kvpack.__file__))}",
        f"ISA {kvpack.isa.active()} of {', '.join(kvpack.isa.available())}; {native}",
    ]
