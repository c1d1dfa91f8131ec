"""The report: one self-contained HTML page from a run folder; `render_report` is the door."""

from analysis.report.page import render_report

__all__ = ["render_report"]
