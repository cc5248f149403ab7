"""One optimiser step as objectives see it."""

from .batch import UNSUPERVISED as UNSUPERVISED
from .batch import Batch as Batch
from .batch import Read as Read
from .batch import Where as Where
from .reference import LiveReference as LiveReference
from .reference import Reading as Reading
from .reference import Reference as Reference
from .reference import read as read
from .step import Step as Step
from .step import Tally as Tally
