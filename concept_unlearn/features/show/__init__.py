"""What a feature is about: where it fires, what it writes, what it resembles; and a choice made by looking."""

from .choice import Choice as Choice
from .effect import Change as Change
from .effect import Effect as Effect
from .inspect import inspect_features as inspect_features
from .inspection import Inspection as Inspection
from .labeller import Labeller as Labeller
