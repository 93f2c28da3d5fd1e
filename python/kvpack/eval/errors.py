"""The named errors of measuring: each says what was asked, what stood in the way, and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Divergence


class MeasureError(RuntimeError):
    """Base class: a measurement could not be made, and no number was produced."""


class NothingPackedError(MeasureError):
    """No scored query attended to a token that went through the codec: the run measured nothing about it."""


class EmulationError(MeasureError):
    """The model's attention cannot be replaced, so the modes `fake` and `emulated` do not exist for it."""


class ModelUnavailableError(MeasureError):
    """A model could not be fetched or loaded (offline, wrong checksum, missing package, unknown path)."""


class TextUnavailableError(MeasureError):
    """A text could not be found or is too short for the windows that were asked of it."""


class RayUnavailableError(MeasureError):
    """Work was to be spread with Ray, which is not installed or does not start."""


class WorkerDiedError(MeasureError):
    """A worker process ended before its task did."""


class IncompleteSweepError(MeasureError):
    """Some rows of a sweep could not be measured; the others are kept.

    rows: those that were measured or taken over, in the order of the caches. failed: what stood in the way of each of
    the others, by its label and window.
    """

    def __init__(self, message: str, rows: list[Divergence], failed: dict[str, Exception]) -> None:
        super().__init__(message)
        self.rows, self.failed = rows, failed
