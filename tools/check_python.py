"""Ends with a clear message unless this Python can make the environment that kvpack is built in."""

import sys
import sysconfig
from pathlib import Path


def main() -> None:
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"kvpack needs Python 3.11 or newer, this is {found}: make PYTHON=python3.11 ...")
    try:
        import ensurepip
        import venv
    except ImportError as error:
        sys.exit(f"{sys.executable} lacks {error.name}: on Debian, install python3-venv")
    del ensurepip, venv
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        sys.exit(f"{header} is missing: on Debian, install python3-dev")


if __name__ == "__main__":
    main()
