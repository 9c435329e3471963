"""Floor 5: one self-contained HTML page per run.

A run's figures arrive as plain values (`ReportData`); this room draws them and knows nothing of recipes or folders.
PIL is imported when the first picture is drawn.
"""

from undiffuse.report.content import Neighbours, ReportData
from undiffuse.report.curves import read_metrics
from undiffuse.report.page import render, write_report

__all__ = ["Neighbours", "ReportData", "read_metrics", "render", "write_report"]
