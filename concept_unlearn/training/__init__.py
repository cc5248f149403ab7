"""Training a live model towards objectives and back: rows in, a change of weights out."""

from .attribution import Mask as Mask
from .difference import Difference as Difference
from .difference import difference as difference
from .loop import Log as Log
from .loop import Loop as Loop
from .loop import Probe as Probe
from .plan import Data as Data
from .settings import Optimisation as Optimisation
from .settings import PrimalDual as PrimalDual
from .settings import Watch as Watch
