"""Tables, curves and the self-contained page of a study."""

from atdiff.report.page import write_report
from atdiff.report.plots import save_curves
from atdiff.report.tables import comparison_table, markdown_table

__all__ = ["comparison_table", "markdown_table", "save_curves", "write_report"]
