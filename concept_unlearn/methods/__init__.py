"""Ways to unlearn: (LM, Scope) in, Patch out."""

from .ban import Ban as Ban
from .base import Method as Method
from .base import Study as Study
from .base import preset as preset
from .finetune import Finetune as Finetune
from .presets import PRESETS as PRESETS
from .steer import Steer as Steer
from .suppress import Suppress as Suppress
from .teach import retrain as retrain
from .teach import teach as teach
