"""Activations of a live model as rows, one a token: streamed, stored, mixed."""

from .mix import RowSource as RowSource
from .mix import mixed as mixed
from .shards import Harvest as Harvest
from .shards import Live as Live
from .store import Store as Store
from .store import harvest as harvest
from .stream import Rows as Rows
from .stream import stream as stream
