"""Results as a table, plots, one self-contained HTML page, and JSON."""

from .report import Entry as Entry
from .report import Report as Report
