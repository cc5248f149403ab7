"""Pure functions on named tensors: changes of parameters, and their merging."""

from .delta import Delta as Delta
from .delta import Dense as Dense
from .delta import LowRank as LowRank
from .delta import Sparse as Sparse
from .delta import restore_delta as restore_delta
