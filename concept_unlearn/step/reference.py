"""What a forward pass gives, and the untouched model that objectives compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..lm import LM, Site
from ..lm.forward import forward
from ..lm.head import Ending
from ..lm.hooks import Stopped
from .batch import Batch, Where


class Reference(Protocol):
    """The model as it was before training."""

    def nll(self, split: str, batch: Batch) -> Float[Tensor, " n"]:
        """Of the supervised tokens."""

    def hidden(self, split: str, batch: Batch, where: Where) -> Float[Tensor, "n d"]:
        """What goes into the head."""

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]: ...

    def activations(self, split: str, batch: Batch, site: Site, where: Where) -> Float[Tensor, "n d"]: ...


class Reading(NamedTuple):
    """One forward pass: what goes into the head, none where nobody asked for logits, and activations."""

    hidden: Float[Tensor, "batch seq d"] | None
    activations: dict[Site, Float[Tensor, "batch seq d"]]


def read(lm: LM, head: Ending, batch: Batch, *, logits: bool, sites: Sequence[Site] = ()) -> Reading:
    """One pass that goes no deeper than what is read."""
    with ExitStack() as stack:
        seen = stack.enter_context(lm.read(*sites))
        hidden = None
        if logits:
            hidden = head.hidden(batch.ids, batch.mask)
        else:
            stack.enter_context(lm.stop_at(max(sites)))
            with suppress(Stopped):
                forward(lm.model, batch.ids, batch.mask, keep=1)
    return Reading(hidden, {site: x.flatten(2) for site, x in seen.items()})


class LiveReference:
    """The reference asked anew each time: ``lm`` inside the context that ``as_it_was()`` opens."""

    def __init__(
        self,
        lm: LM,
        head: Ending,
        as_it_was: Callable[[nn.Module | None], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """``as_it_was(None)`` brings back the whole model, ``as_it_was(module)`` at least that module."""
        self.lm, self.head, self._as_it_was = lm, head, as_it_was

    def within(self, also: Callable[[], AbstractContextManager[object]]) -> LiveReference:
        """The same, asked inside another context too: with a patch on, say."""

        @contextmanager
        def both(only: nn.Module | None) -> Iterator[None]:
            with self._as_it_was(only), also():
                yield

        return LiveReference(self.lm, self.head, both)

    def nll(self, split: str, batch: Batch) -> Float[Tensor, " n"]:
        targets = batch.ids.roll(-1, 1)[batch.positions()]
        hidden = self.hidden(split, batch, "answer")
        with torch.no_grad(), self._as_it_was(self.head.module):
            return self.head.each(hidden, lambda z, which: cross_entropy(z, targets[which], reduction="none"))

    @torch.no_grad()
    def hidden(self, split: str, batch: Batch, where: Where) -> Float[Tensor, "n d"]:
        with self._as_it_was(None):
            found = read(self.lm, self.head, batch, logits=True).hidden
        assert found is not None
        return found[batch.positions(where)]

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        with self._as_it_was(self.head.module):
            return self.head(hidden)

    @torch.no_grad()
    def activations(self, split: str, batch: Batch, site: Site, where: Where) -> Float[Tensor, "n d"]:
        with self._as_it_was(None):
            found = read(self.lm, self.head, batch, logits=False, sites=[site])
        return found.activations[site][batch.positions(where)]
