"""Requests to forget that come one after another, each served on the model that the last one left."""

from .config import SequenceRun as SequenceRun
from .config import load_sequence as load_sequence
from .report import After as After
from .report import SequenceReport as SequenceReport
from .serving import Sequential as Sequential
from .serving import stack as stack
from .serving import total as total
