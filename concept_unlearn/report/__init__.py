"""Results as a table, plots, one self-contained HTML page, Markdown and JSON."""

from .overview import Overview as Overview
from .report import Entry as Entry
from .report import Question as Question
from .report import Report as Report
