"""The model as earlier requests have left it, and, from within, as it was before any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..lm import LM
from ..patches import Patch, Stack, WeightPatch


class Before:
    """``with Before(lm, patch) as before:`` the patch is on; inside ``before.any_request()`` it is off.

    The second may be opened while weights are trained: a weight that the patch changes is swapped for its own tensor,
    which nothing has written to, and swapped back.
    """

    def __init__(self, lm: LM, patch: Patch | None) -> None:
        self._lm, self._patch, self._on = lm, patch, ExitStack()

    def __enter__(self) -> Before:
        own = {p: p.data for p in self._lm.model.parameters()}
        on = [(patch, self._on.enter_context(patch.on(self._lm))) for patch in _parts(self._patch)]
        self._switches = [switch for patch, switch in on if not isinstance(patch, WeightPatch)]
        self._own = {p: data for p, data in own.items() if p.data.data_ptr() != data.data_ptr()}
        return self

    def __exit__(self, *error: object) -> None:
        self._on.close()

    @contextmanager
    def any_request(self) -> Iterator[None]:
        now = {p: p.data for p in self._own}
        mixes = torch.is_autocast_enabled(self._lm.device.type)  # dtypes, so that nothing need be copied
        try:
            for p, data in self._own.items():
                p.data = data if mixes else data.to(p.dtype)
            for switch in self._switches:
                switch.enabled = False
            yield
        finally:
            for switch in self._switches:
                switch.enabled = True
            for p, data in now.items():
                p.data = data


def _parts(patch: Patch | None) -> tuple[Patch, ...]:
    if isinstance(patch, Stack) and patch.strength == 1:
        return tuple(inner for part in patch.patches for inner in _parts(part))
    return () if patch is None else (patch,)
