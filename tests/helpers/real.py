"""Which tests are `real`, and that no other starts ranks."""

import sys
from collections.abc import Callable
from functools import partial

import pytest

from helpers.launcher import STARTUP

sys.path.append(str(STARTUP))
from only_real import LIGHT_TEST  # noqa: E402, F401 - in this process too nothing starts ranks

# (module, name) of the fixtures that start ranks.
REAL_FIXTURES: set[tuple[str, str]] = set()


def real_fixture(
    function: Callable | None = None, scope: str = "module", **options: object
) -> Callable:
    """A pytest fixture that starts ranks: the tests that use it are marked `real`."""
    if function is None:
        return partial(real_fixture, scope=scope, **options)
    REAL_FIXTURES.add((function.__module__, function.__name__))
    return pytest.fixture(scope=scope, **options)(function)
