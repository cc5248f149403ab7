"""Ways to unlearn: (LM, Scope) in, Patch out."""

from .ban import Ban as Ban
from .base import Method as Method
from .base import Study as Study
from .base import preset as preset
from .black_box import BlackBox as BlackBox
from .corrupt import Corrupt as Corrupt
from .crisp import CRISP as CRISP
from .distil import Distil as Distil
from .eul import EUL as EUL
from .expert import Expert as Expert
from .finetune import Finetune as Finetune
from .negate import Negate as Negate
from .offset import Offset as Offset
from .prefix import PREFIXES as PREFIXES
from .prefix import Prefix as Prefix
from .presets import PRESETS as PRESETS
from .split_merge import SplitMerge as SplitMerge
from .steer import Steer as Steer
from .suppress import Suppress as Suppress
from .teach import retrain as retrain
from .teach import teach as teach
