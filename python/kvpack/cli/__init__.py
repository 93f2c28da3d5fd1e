"""The command line: `kvpack demo | ppl | sweep | bench | codecs | doctor`. One file per command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `kvpack` command."""
    try:
        from .app import app
    except ImportError as error:
        if error.name and error.name.partition(".")[0] in ("typer", "rich", "click"):
            print(f"kvpack: the command line needs {error.name}: pip install 'kvpack[cli]'", file=sys.stderr)
            raise SystemExit(3) from error  # common.UNAVAILABLE, which cannot be imported here
        raise
    app(prog_name="kvpack")
