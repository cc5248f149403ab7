"""Losses that forget and losses that keep, each a pure function of a step."""

from .ascent import GA as GA
from .ascent import WGA as WGA
from .ascent import CappedGA as CappedGA
from .ascent import Hinge as Hinge
from .ascent import SatImp as SatImp
from .ascent import TemperatureGA as TemperatureGA
from .base import Objective as Objective
from .crisp import LowerFeatures as LowerFeatures
from .depart import Depart as Depart
from .divert import CEU as CEU
from .divert import IDK as IDK
from .divert import ME as ME
from .divert import UNDIAL as UNDIAL
from .divert import Margin as Margin
from .follow import Follow as Follow
from .preference import DPO as DPO
from .preference import NPO as NPO
from .preference import TNPO as TNPO
from .preference import WTNPO as WTNPO
from .preference import SimNPO as SimNPO
from .representation import RMU as RMU
from .representation import RetainEmbedding as RetainEmbedding
from .retain import AnswerPreservation as AnswerPreservation
from .retain import RetainKL as RetainKL
from .retain import RetainNLL as RetainNLL
