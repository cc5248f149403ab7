"""What survives: attacks on a model that was made to forget. Importing a room registers its attacks."""

from .base import Attack as Attack
from .base import Outcome as Outcome
from .base import Victim as Victim
from .base import worst as worst
