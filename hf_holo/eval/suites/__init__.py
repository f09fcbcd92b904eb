"""The suites of `hf-holo eval`, one file each: what they measure, and how they tell it.

A suite is a module with `parts(models, options)`, its measurements one by one, and `told(tables, folder)`, which draws
its pictures into the folder and returns its section of the report.
"""

from . import audio, branches, language, long, multimodal, recall, speed, vision, zero_shot
from .options import Options
from .run import Part, Run, Tables

OF_TEXT = {
    "language": language,
    "zero-shot": zero_shot,
    "recall": recall,
    "long": long,
    "speed": speed,
    "branches": branches,
}
OF_SENSES = {"vision": vision, "audio": audio, "multimodal": multimodal}  # by what their models are for
SUITES = {**OF_TEXT, **OF_SENSES}
GROUPS = {"quick": ("language", "zero-shot", "recall", "speed", *OF_SENSES), "all": tuple(SUITES)}

__all__ = ["GROUPS", "OF_SENSES", "SUITES", "Options", "Part", "Run", "Tables"]
