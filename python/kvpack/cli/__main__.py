"""`python -m kvpack.cli`: the same as the `kvpack` command."""

from . import main

main()
