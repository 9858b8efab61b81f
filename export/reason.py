"""Why a library refused, in one line: theirs answer in paragraphs."""

from __future__ import annotations


def reason(cause: BaseException) -> str:
    """The first line of the message that says something, or the kind of error if there is none."""
    lines = (line.strip() for line in str(cause).splitlines())
    return next((line for line in lines if line), type(cause).__name__)
