"""What models are asked. Importing a room registers its benchmarks."""

from .choice import MultipleChoice as MultipleChoice
from .concept import ConceptBenchmark as ConceptBenchmark
from .muse import MUSE as MUSE
from .sae_bench import known_to as known_to
from .sae_bench import sae_bench as sae_bench
from .survey import Survey as Survey
from .survey import overlaps as overlaps
from .tofu import TOFU as TOFU
from .unlearning_score import UnlearningScore as UnlearningScore
