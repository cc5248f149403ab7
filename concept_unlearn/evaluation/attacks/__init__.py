"""What survives: attacks on a model that was made to forget. Importing a room registers its attacks."""

from .base import Attack as Attack
from .base import Outcome as Outcome
from .base import Victim as Victim
from .base import worst as worst
from .context import Dilute as Dilute
from .context import InContext as InContext
from .context import MultiTurn as MultiTurn
from .extraction import Extraction as Extraction
from .extraction import Prefill as Prefill
from .jailbreak import JailbreakPrefix as JailbreakPrefix
from .jailbreak import RolePlay as RolePlay
from .lens import LogitLens as LogitLens
from .linear_probe import LinearProbe as LinearProbe
from .quantise import Quantise as Quantise
from .relearn import Relearn as Relearn
from .rewrite import Paraphrase as Paraphrase
from .rewrite import Translate as Translate
from .run import attack as attack
from .soft_prompt import SoftPrompt as SoftPrompt
from .switch_off import SwitchOff as SwitchOff
