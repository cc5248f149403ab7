"""Activations of a live model as rows, one a token."""

from .stream import Rows as Rows
from .stream import stream as stream
