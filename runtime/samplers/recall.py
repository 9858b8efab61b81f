"""How a row reaches back to a sample that no history slot holds.

A form is a sum over what a call has, written as its coefficients: those of a row of the update, float64
[3 + S], over (sample, prediction, noise, history newest first). Solvers that restart from an earlier sample
(Heun, singlestep, UniPC's corrector) get it from the current one by inverting the rows in between.
"""

import numpy as np

from allaprima.runtime.schedule import F64

SLOTS = 4


def unit(place: int) -> F64:
    """The form that is one thing alone."""
    form = np.zeros(3 + SLOTS)
    form[place] = 1.0
    return form


SAMPLE, PREDICTION, NOISE = unit(0), unit(1), unit(2)


def past(age: int) -> F64:
    """The form of the prediction ``age`` calls ago, 0 for the current one."""
    return PREDICTION if age == 0 else unit(2 + age)


def carried(form: F64, row: F64) -> F64:
    """A form of one call, written over what the next call has, if ``row`` made the sample in between.

    ``form`` must not contain this call's noise unless as a multiple of the row does; what falls out of the
    history must have coefficient zero.
    """
    share = form[0] / row[0]
    rest = form - share * row
    return np.concatenate([[share, 0.0, 0.0, rest[1]], rest[3:-1]])
