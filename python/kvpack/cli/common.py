"""What the commands share: options, errors and exit codes, progress, and how figures are written.

Exit codes: 0 done; 1 failed; 2 a value that is not allowed; 3 a model, a text or a package is not to be had; 4 refused,
because nothing went through the codec; 130 interrupted. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvpack._extras import MissingExtraError, needed
from kvpack.eval.errors import (
    MeasureError,
    ModelUnavailableError,
    NothingPackedError,
    RayUnavailableError,
    TextUnavailableError,
)
from kvpack.eval.formats import figure as figure
from kvpack.eval.formats import kld as kld
from kvpack.eval.formats import number as number
from kvpack.eval.formats import percent as percent
from kvpack.eval.metrics import jsonable

FAILED, BAD_VALUE, UNAVAILABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="'default', 'random', a local directory, a .gguf file, or a hub id."),
]
TextOption = Annotated[
    str,
    typer.Option("--text", "-t", help="'topics' (Python's own documentation), 'wikitext-2', or a text file."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Dtype of the model: float32, bfloat16, float16, float64.")]
ModeOption = Annotated[str, typer.Option("--mode", help="fake, chunked, stepwise or emulated.")]
WindowOption = Annotated[int, typer.Option("--window", "-w", min=0, help="Newest tokens kept exact.")]
SinksOption = Annotated[int, typer.Option("--sinks", min=0, help="First tokens kept exact.")]
LengthOption = Annotated[int, typer.Option("--length", "-l", min=2, help="Tokens in a window of text.")]
CountOption = Annotated[int, typer.Option("--count", "-n", min=1, help="Windows of text, spread evenly.")]
PromptOption = Annotated[
    int, typer.Option("--prompt", min=0, help="Tokens of the first call, which sees its own tokens exactly.")
]
SkipOption = Annotated[
    int | None,
    typer.Option("--skip", min=0, help="Positions before this are not scored [default: length / 4]."),
]
ChunkOption = Annotated[int | None, typer.Option("--chunk", min=1, help="Tokens per call, for mode chunked.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Command = TypeVar("Command", bound=Callable[..., None])

errors = Console(stderr=True, soft_wrap=True, highlight=False)


def command(function: Command) -> Command:
    """Turns the errors of a command into one line on stderr and an exit code, unless --debug."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with needed(f"kvpack {function.__name__}", "hf"):
                function(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            errors.print("kvpack: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if kwargs.get("debug") or os.environ.get("KVPACK_DEBUG"):
                raise
            said = str(error) or type(error).__name__
            if code_of(error) == FAILED and not isinstance(error, MeasureError):
                said = f"{type(error).__name__}: {said} (--debug shows where)"
            errors.print(f"kvpack: {said}", markup=False, style="red")
            raise typer.Exit(code_of(error)) from None

    return wrapped  # type: ignore[return-value]


def code_of(error: Exception) -> int:
    if isinstance(error, NothingPackedError):
        return REFUSED
    if isinstance(error, (ModelUnavailableError, TextUnavailableError, RayUnavailableError, MissingExtraError)):
        return UNAVAILABLE
    return BAD_VALUE if isinstance(error, ValueError) else FAILED


class Reporter:
    """Progress on stderr: bars on a terminal, otherwise one line when something begins."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._begun: set[str] = set()
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )

    def __enter__(self) -> Reporter:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, style="dim")

    def progress(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        if not self._live and what not in self._begun:
            self._begun.add(what)
            self.say(what)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(what))
            self._begun.discard(what)


def print_json(value: Any) -> None:
    """One JSON document on stdout; what is not finite is null."""
    value = value.to_json() if hasattr(value, "to_json") else value
    sys.stdout.write(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def output() -> Console:
    """The console for results. Where there is no terminal, wide enough that no table is broken."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=150)


def codec_list(text: str) -> list[str]:
    """Codecs separated by commas, as a list; further options of a codec ("tq4:a=1,b=2") stay with it.

    ValueError if there is none.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, _ = part.partition("=")
        if equals and ":" not in name and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    if not found:
        raise ValueError("no codecs were named: like --codecs tq4,tq4/tq3 (kvpack codecs lists them)")
    return found


def int_list(text: str, what: str) -> list[int]:
    """Whole numbers separated by commas, as a list. ValueError names the part that is none."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not part.isdecimal():
            raise ValueError(f"{what} {part!r} is not a whole number, 0 or more")
        found.append(int(part))
    if not found:
        raise ValueError(f"no {what} was given")
    return found


def size(count: float | None) -> str:
    """Bytes in binary units, three digits."""
    if count is None:
        return "-"
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
