"""Facts about a request that its handlers note, for the log and the metrics."""

from __future__ import annotations

from typing import Any

from starlette.types import Scope


def note(scope: Scope, **facts: object) -> None:
    """Note facts; what is None is left out."""
    noted_in(scope).update({name: value for name, value in facts.items() if value is not None})


def noted_in(scope: Scope) -> dict[str, Any]:
    """What was noted so far."""
    facts: dict[str, Any] = scope.setdefault("state", {}).setdefault("facts", {})
    return facts
