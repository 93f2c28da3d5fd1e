"""Measuring: what a packed cache costs in quality and gains in bytes and speed.

    perplexity, divergence   one cache, one of four named modes (kvpack.eval.modes)
    agreement                of two modes with each other
    sweep, grid, RayFarm     many caches, resumable, side by side
    decode_speed, prefill    tokens per second against the stock cache, paired
    load_model, load_text    the default model and text, or yours

Names are loaded when they are first used: `import kvpack.eval` alone needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvpack._extras import needed

if TYPE_CHECKING:
    from .agree import agreement as agreement
    from .cachespec import CacheSpec as CacheSpec
    from .errors import EmulationError as EmulationError
    from .errors import IncompleteSweepError as IncompleteSweepError
    from .errors import MeasureError as MeasureError
    from .errors import ModelUnavailableError as ModelUnavailableError
    from .errors import NothingPackedError as NothingPackedError
    from .errors import RayUnavailableError as RayUnavailableError
    from .errors import TextUnavailableError as TextUnavailableError
    from .errors import WorkerDiedError as WorkerDiedError
    from .measure import divergence as divergence
    from .measure import perplexity as perplexity
    from .measure import task as task
    from .metrics import Interval as Interval
    from .models import load_model as load_model
    from .models import random_model as random_model
    from .modes import MODES as MODES
    from .ray_farm import RayFarm as RayFarm
    from .results import Divergence as Divergence
    from .results import Perplexity as Perplexity
    from .speed import DecodeSpeed as DecodeSpeed
    from .speed import decode_speed as decode_speed
    from .speed import prefill as prefill
    from .sweeps import grid as grid
    from .sweeps import sweep as sweep
    from .texts import cut_windows as cut_windows
    from .texts import load_text as load_text

_HOME = {
    "CacheSpec": "cachespec",
    "DecodeSpeed": "speed",
    "Divergence": "results",
    "EmulationError": "errors",
    "IncompleteSweepError": "errors",
    "Interval": "metrics",
    "MODES": "modes",
    "MeasureError": "errors",
    "ModelUnavailableError": "errors",
    "NothingPackedError": "errors",
    "Perplexity": "results",
    "RayFarm": "ray_farm",
    "RayUnavailableError": "errors",
    "TextUnavailableError": "errors",
    "WorkerDiedError": "errors",
    "agreement": "agree",
    "cut_windows": "texts",
    "decode_speed": "speed",
    "divergence": "measure",
    "grid": "sweeps",
    "load_model": "models",
    "load_text": "texts",
    "perplexity": "measure",
    "prefill": "speed",
    "random_model": "models",
    "sweep": "sweeps",
    "task": "measure",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed(f"kvpack.eval.{name}", "hf"):
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
