"""What features do on text, and which of them carry a concept."""

from .attribution import attribute as attribute
from .directions import difference_of_means as difference_of_means
from .directions import leace as leace
from .scores import AttributionScore as AttributionScore
from .scores import AUCScore as AUCScore
from .scores import CountScore as CountScore
from .scores import EnrichmentScore as EnrichmentScore
from .scores import FisherScore as FisherScore
from .scores import MeanDifferenceScore as MeanDifferenceScore
from .scores import Score as Score
from .scores import SelectivityScore as SelectivityScore
from .scores import SparsityScore as SparsityScore
from .scores import matched_frequency as matched_frequency
from .scores import select as select
from .show import Choice as Choice
from .show import Effect as Effect
from .show import Inspection as Inspection
from .show import Labeller as Labeller
from .show import inspect_features as inspect_features
from .stats import Stats as Stats
from .stats import measure as measure
from .stats import measure_all as measure_all
