"""The fixture that runs a test with both implementations of the operators."""

from __future__ import annotations

import pytest

from kvpack import ops

from .helpers import DEFAULT, NATIVE, Implementation


@pytest.fixture(params=[DEFAULT, NATIVE] if ops.native else [DEFAULT], ids=lambda implementation: implementation.name)
def impl(request: pytest.FixtureRequest) -> Implementation:
    """The default called directly; and what the dispatcher runs, if that is native."""
    chosen: Implementation = request.param
    return chosen
