"""Plots and the HTML report of a run."""

from e3pruner.report.environment import describe_environment
from e3pruner.report.html import REPORT_FILE, build_report
from e3pruner.report.results import RESULTS_FILE, load_results, save_results
from e3pruner.report.table import model_table
from e3pruner.report.writing import writing_table

__all__ = [
    "REPORT_FILE",
    "RESULTS_FILE",
    "build_report",
    "describe_environment",
    "load_results",
    "model_table",
    "save_results",
    "writing_table",
]
