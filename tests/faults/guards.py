"""A fault's test, once as the code is, and once for each guard that is taken away: then its check must fail."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import mesh
import pytest

Guard = Callable[[pytest.MonkeyPatch], None]
BROKEN_SOON_S = 1.2  # without a guard a check may fail by waiting


def fault(*guards: Guard) -> Callable[[Callable[[], Awaitable[None]]], Any]:
    """Makes `scenario` a test. A guard is a function that removes it, named after it."""

    def decorate(scenario: Callable[[], Awaitable[None]]) -> Any:
        names = [f"without {guard.__name__.replace('_', ' ').strip()}" for guard in guards]

        @pytest.mark.parametrize("removed", [None, *guards], ids=["guarded", *names])
        async def test(removed: Guard | None, monkeypatch: pytest.MonkeyPatch) -> None:
            if removed is None:
                await scenario()
                return
            monkeypatch.setattr(mesh, "SOON_S", BROKEN_SOON_S)
            removed(monkeypatch)
            with pytest.raises(AssertionError):
                await scenario()

        test.__doc__ = scenario.__doc__
        return test

    return decorate
