"""Patches: reversible changes of a live model, saved as plain data and safetensors."""

from .base import Patch as Patch
from .base import Stack as Stack
from .codebook import CodebookPatch as CodebookPatch
from .feature import FeaturePatch as FeaturePatch
from .io import load_patch as load_patch
from .weight import WeightPatch as WeightPatch
from .weight import merge as merge
