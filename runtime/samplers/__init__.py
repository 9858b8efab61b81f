"""Samplers as tables of numbers: names, tables and the idle row."""

from allaprima.runtime.samplers.catalog import SamplerInfo, find, names
from allaprima.runtime.samplers.limit import NO_BOUND
from allaprima.runtime.samplers.part import take_part
from allaprima.runtime.samplers.table import Table, idle_row
from allaprima.runtime.samplers.tabulate import count_steps, make_table

__all__ = [
    "NO_BOUND",
    "SamplerInfo",
    "Table",
    "count_steps",
    "find",
    "idle_row",
    "make_table",
    "names",
    "take_part",
]
