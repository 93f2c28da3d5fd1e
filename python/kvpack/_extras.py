"""Optional packages, and the error that names the extra which brings a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OPTIONAL = ("torch", "transformers", "accelerate", "gguf", "safetensors")
OLDEST = (5, 16)  # transformers before it: its own caches fail some of our tests, assisted generation and tp_plan


class MissingExtraError(ImportError):
    """An optional package is not installed, or too old."""


@contextmanager
def needed(by: str, extra: str) -> Iterator[None]:
    """Around imports of optional packages: if one is missing, MissingExtraError says what needs it and what to install.

    by: what is imported or called, as the user writes it. extra: of this package, "torch" or "hf".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OPTIONAL:
            raise
        raise MissingExtraError(f"{by} needs {missing}: pip install 'kvpack[{extra}]'", name=missing) from error


def too_old(transformers: str) -> str | None:
    """What to say of this version of transformers where it is too old to be used, else None."""
    if tuple(map(int, transformers.split(".")[:2])) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return (
        f"kvpack.Cache needs transformers {oldest} or newer, and {transformers} is installed: "
        "pip install --upgrade 'kvpack[hf]'"
    )
