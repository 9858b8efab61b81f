"""Weights that do not fit their model: libraries fill in what is missing with random numbers, and go on."""

from __future__ import annotations

from collections.abc import Iterable

from allaprima.bundle import ExportError

_HARMLESS = ("position_ids",)
"""What tensors end in that only repeat what the configuration says, as older transformers wrote them."""
_SHOWN = 3


def check_completeness(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Check the names of tensors that a model lacks, and of those that it has no place for.

    Raises:
        ExportError: naming the first of them.
    """
    strange = [name for name in unexpected if not name.endswith(_HARMLESS)]
    wrongs = {"it lacks": missing, "it has no place for": strange}
    told = [f"{words} {_listed(names)}" for words, each in wrongs.items() if (names := sorted(each))]
    if told:
        raise ExportError(
            f"weights and config.json do not belong together: {'; '.join(told)}; get the folder again"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
