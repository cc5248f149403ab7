"""A live model, and the one room that knows Hugging Face from TransformerLens."""

from .context import Context as Context
from .generate import Written as Written
from .hooks import EditFn as EditFn
from .model import LM as LM
from .score import Scored as Scored
from .site import Site as Site
