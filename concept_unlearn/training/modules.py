"""Small modules at sites of a frozen model as what is trained: hooked in, and switched off for the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import InvalidConfig
from ..lm import LM, Context, EditFn, Site
from ..lm.head import Ending
from ..patches.base import Switch
from ..step import LiveReference
from ..weights import Delta, Dense
from .sharded import is_sharded
from .trainable import HALF, Trainable, flags_restored


class Modules(Trainable):
    """The parameters that edits read. The model's own are frozen, and with the edits off it is its own reference."""

    def __init__(self, lm: LM, parameters: Mapping[str, nn.Parameter], switch: Switch) -> None:
        self.lm, self.parameters, self._switch = lm, dict(parameters), switch
        self._initial = {name: p.detach().clone() for name, p in parameters.items()}

    @contextmanager
    def untouched(self) -> Iterator[None]:
        enabled, self._switch.enabled = self._switch.enabled, False
        try:
            yield
        finally:
            self._switch.enabled = enabled

    def reference(self, head: Ending) -> LiveReference:
        return LiveReference(self.lm, head, lambda _: self.untouched())

    def deltas(self) -> dict[str, Delta]:
        changes = {name: p.detach() - self._initial[name] for name, p in self.parameters.items()}
        return {name: Dense(change) for name, change in changes.items() if change.any()}


@contextmanager
def train_modules(lm: LM, edits: Mapping[Site, EditFn], parameters: Mapping[str, nn.Parameter]) -> Iterator[Modules]:
    """Inside the block the model is edited at these sites, and only ``parameters``, which the edits read, are trained.

    They are in full precision and on the model's device. What they are when the block begins is what the changes are
    counted from: drawn from the same seed, training goes on after it was stopped.
    Raises SiteNotFound, or InvalidConfig under FSDP.
    """
    if is_sharded():
        raise InvalidConfig(
            "modules at sites are not sharded: launch without FSDP; gradient_checkpointing saves memory"
        )
    assert parameters
    assert not any(p.dtype in HALF for p in parameters.values()), list(parameters)
    switch = Switch()
    with flags_restored(lm.model), lm.edit({site: _switched(edit, switch) for site, edit in edits.items()}):
        for p in lm.model.parameters():
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        try:
            yield Modules(lm, parameters, switch)
        finally:
            for p in parameters.values():
                p.grad = None


def _switched(edit: EditFn, switch: Switch) -> EditFn:
    def edited(x: Tensor, context: Context) -> Tensor:
        return edit(x, context) if switch.enabled else x

    return edited
