"""Tables, plots and the self-contained HTML report of a study."""

from atdiff.core.specs import correction_label
from atdiff.report.page import write_report
from atdiff.report.plots import save_curves
from atdiff.report.statistics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    CorrectedRow,
    Row,
    compare,
    compare_corrected,
    corrections_of,
    holm,
    winners,
)
from atdiff.report.tables import comparison_table, markdown_table
from atdiff.report.words import conclusions, corrected_conclusions, interval_label, metric_label, percent, scores

__all__ = [
    "HIGHER_IS_BETTER", "LOWER_IS_BETTER", "CorrectedRow", "Row", "compare", "compare_corrected", "comparison_table",
    "conclusions", "corrected_conclusions", "correction_label", "corrections_of", "holm", "interval_label",
    "markdown_table", "metric_label", "percent", "save_curves", "scores", "winners", "write_report",
]  # fmt: skip
