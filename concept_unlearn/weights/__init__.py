"""Pure functions on named tensors: changes of parameters, and their merging."""

from .delta import Delta as Delta
from .delta import Dense as Dense
from .delta import LowRank as LowRank
from .delta import Sparse as Sparse
from .delta import restore_delta as restore_delta
from .masks import shares as shares
from .scores import GradientWeightScore as GradientWeightScore
from .scores import MagnitudeWeightScore as MagnitudeWeightScore
from .scores import RandomWeightScore as RandomWeightScore
from .scores import SnipWeightScore as SnipWeightScore
from .scores import WagleWeightScore as WagleWeightScore
from .scores import WandaWeightScore as WandaWeightScore
from .scores import WeightScore as WeightScore
