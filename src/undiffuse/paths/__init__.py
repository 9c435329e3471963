"""Floor 1: how data becomes noise."""

from undiffuse.paths.base import Path, change_of_path
from undiffuse.paths.levels import check_levels, geometric_levels, levels_from_data
from undiffuse.paths.schedules import PATHS, VE, VP, Cosine, Karras, Linear, SubVP, Trig
from undiffuse.paths.tabulated import Tabulated
from undiffuse.paths.values import for_values, is_value

__all__ = [
    "PATHS",
    "VE",
    "VP",
    "Cosine",
    "Karras",
    "Linear",
    "Path",
    "SubVP",
    "Tabulated",
    "Trig",
    "change_of_path",
    "check_levels",
    "for_values",
    "geometric_levels",
    "is_value",
    "levels_from_data",
]
