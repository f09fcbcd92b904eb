"""The suites of `hf-holo eval`, one file each: what they measure, and how they tell it.

A suite is a module with `parts(models, options)`, its measurements one by one, and `told(tables, folder)`, which draws
its pictures into the folder and returns its section of the report.
"""

from . import branches, language, long, recall, speed, zero_shot
from .options import Options
from .run import Part, Run, Tables

SUITES = {
    "language": language,
    "zero-shot": zero_shot,
    "recall": recall,
    "long": long,
    "speed": speed,
    "branches": branches,
}
GROUPS = {"quick": ("language", "zero-shot", "recall", "speed"), "all": tuple(SUITES)}

__all__ = ["GROUPS", "SUITES", "Options", "Part", "Run", "Tables"]
