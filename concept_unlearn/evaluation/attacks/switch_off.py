"""The edit left out: whoever holds the weights can run them without what edits activations beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from ...patches import Patch, Stack
from ...patches.activation import ActivationPatch
from .base import Access, Victim, Way, _Ways


class SwitchOff(_Ways):
    """The model as it was published: changes of the weights are in it, edits of activations are not."""

    access: ClassVar[Access] = "weights"

    def ways(self, victim: Victim) -> Iterable[Way]:
        yield Way(published(victim.patch))


def published(patch: Patch | None) -> Patch | None:
    """What is left of a patch in the weights."""
    if isinstance(patch, ActivationPatch):
        return None
    if isinstance(patch, Stack):
        kept = tuple(p for p in map(published, patch.patches) if p is not None)
        return replace(patch, patches=kept) if kept else None
    return patch
