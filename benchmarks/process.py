"""One measurement, one process: what one leaves in memory or in thread pools must not touch the next."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from allaprima.bundle import AllaprimaError

P = ParamSpec("P")
T = TypeVar("T")


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the function gives, or raises, in a fresh interpreter.

    Raises:
        BrokenProcessPool: the process was killed (out of memory, for example) before it could answer.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def reason_of(error: BaseException) -> str:
    """An error in words: ours say all in their message, of others the type says most."""
    return str(error) if isinstance(error, AllaprimaError) else f"{type(error).__name__}: {error}"


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes, mapped files included.

    A child begins with its parent's size at the fork, so whoever starts measurements must stay small.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
