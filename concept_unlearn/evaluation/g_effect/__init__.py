"""What an unlearning objective's gradient does to forgotten and to retained text, and in which layers."""

from .effects import g_effect as g_effect
from .points import PGEffect as PGEffect
from .points import Point as Point
from .points import pg_effect as pg_effect
from .results import Effect as Effect
from .results import GEffect as GEffect
from .trace import trace_g_effect as trace_g_effect
