"""How a row reaches back to a sample that no history slot holds.

A form is a sum over what a call has, written as its coefficients, float64 [4 + S], over (sample, prediction,
noise, history newest first, noise of the last call). Solvers that restart from an earlier sample
(Heun, singlestep, UniPC's corrector) get it from the current one by inverting the rows in between.
"""

import numpy as np

from allaprima.runtime.schedule import F64

SLOTS = 4


def unit(place: int) -> F64:
    """The form that is one thing alone."""
    form = np.zeros(4 + SLOTS)
    form[place] = 1.0
    return form


SAMPLE, PREDICTION, NOISE = unit(0), unit(1), unit(2)
ECHO = unit(3 + SLOTS)
"""The noise of the last call."""


def past(age: int) -> F64:
    """The form of the prediction ``age`` calls ago, 0 for the current one."""
    return PREDICTION if age == 0 else unit(2 + age)


def carried(form: F64, row: F64) -> F64:
    """A form of one call, written over what the next call has, if ``row`` made the sample in between.

    This call's noise is the next one's last noise. What falls out of the history must have coefficient zero,
    and so must the noise before.
    """
    share = form[0] / row[0]
    rest = form - share * row
    return np.concatenate([[share, 0.0, 0.0, rest[1]], rest[3:-2], [rest[2]]])


def echoes(rows: F64) -> F64:
    """How much of the last call's noise is added to this one's, [N], for rows that are forms [N, 4 + S]."""
    told = rows[:, -1] != 0
    return np.where(told, rows[:, -1] / np.where(told, rows[:, 2], 1.0), 0.0)
