"""Examples, scopes and how text becomes token ids."""

from .examples import Passage as Passage
from .examples import Probe as Probe
from .scope import Scope as Scope
from .scope import concepts as concepts
