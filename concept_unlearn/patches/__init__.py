"""Patches: reversible changes of a live model, saved as plain data and safetensors."""

from .adapter import AdapterPatch as AdapterPatch
from .base import Patch as Patch
from .base import Stack as Stack
from .codebook import CodebookPatch as CodebookPatch
from .expert import ExpertPatch as ExpertPatch
from .explain import Explanation as Explanation
from .explain import explain as explain
from .feature import FeaturePatch as FeaturePatch
from .fusion import fuse as fuse
from .inputs import inputs_of as inputs_of
from .io import load_patch as load_patch
from .logit import LogitPatch as LogitPatch
from .prefix import PrefixPatch as PrefixPatch
from .prompt import PromptPatch as PromptPatch
from .union import union as union
from .weight import WeightPatch as WeightPatch
from .weight import merge as merge
