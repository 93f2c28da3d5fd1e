"""The typer application: every command registers here."""

from __future__ import annotations

from typing import Annotated

import typer

from . import allocate, bench, codecs, demo, doctor, ppl, sweep
from .common import command

app = typer.Typer(
    name="kvpack",
    help="KV caches that are really packed in memory and really read packed: try, measure, inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from .doctor import own_version

        typer.echo(own_version())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for _name, _function in (
    ("demo", demo.demo),
    ("ppl", ppl.ppl),
    ("sweep", sweep.sweep),
    ("allocate", allocate.allocate),
    ("bench", bench.bench),
    ("codecs", codecs.codecs),
    ("doctor", doctor.doctor),
):
    app.command(_name)(command(_function))
