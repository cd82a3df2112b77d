"""What a person reads: tables, pictures, one HTML page, exports."""

from streamfisher.reports.comparison import comparison_picture, comparison_table
from streamfisher.reports.directions import direction_table, directions_text, export_directions
from streamfisher.reports.export import FORMATS, eigenvalue_table, metric_table, to_frame
from streamfisher.reports.figures import picture
from streamfisher.reports.influence import export_influence, influence_table, influence_text
from streamfisher.reports.named_spectra import write_named_spectra
from streamfisher.reports.page import html_report
from streamfisher.reports.samples import export_samples, sample_table, samples_text
from streamfisher.reports.series_page import comparison_page
from streamfisher.reports.text import table

__all__ = [
    # To read
    "table",
    "html_report",
    "picture",
    "comparison_table",
    "comparison_picture",
    "comparison_page",
    "samples_text",
    "influence_text",
    "directions_text",
    # For other programs
    "FORMATS",
    "to_frame",
    "write_named_spectra",
    "metric_table",
    "eigenvalue_table",
    "sample_table",
    "export_samples",
    "influence_table",
    "export_influence",
    "direction_table",
    "export_directions",
]
