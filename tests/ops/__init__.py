"""Tests of the torch operators. A package, so that its modules share ``helpers``."""
