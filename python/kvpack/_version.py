"""The version of the package, in one place for Python."""

__version__ = "0.1.0"
