"""A model as its client meets it: prompts in, probabilities out, every prompt paid for, nothing to differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.encode import pad
from ..errors import InvalidConfig
from ..tracking import Progress
from .forward import forward, log_softmax
from .hooks import EditFn
from .model import LM
from .score import Scored
from .site import Site

EMBEDDING = Site("resid_pre", 0)
"""What the blocks read: the embedding of each token, and of its position where a model adds one."""


class Oracle:
    """Answers questions about prompts, given as token ids, whose embeddings may be edited; a discrete prefix is just
    other ids. ``queries`` is how many prompts it has answered, each with each candidate for one.
    """

    def __init__(self, lm: LM, *, batch_size: int = 32, queries: int = 0, progress: Progress | None = None) -> None:
        """``queries`` is what was spent before; ``progress`` hears of each query."""
        self.lm, self.batch_size, self.queries, self.progress = lm, batch_size, queries, progress

    def probabilities(
        self, prompts: Sequence[Sequence[int]], edits: Mapping[Site, EditFn] | None = None
    ) -> Float[Tensor, "prompts vocab"]:
        """Of the token that comes next, on the CPU in float32."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        with self._asking(edits):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                ids, mask = pad([prompts[i] for i in batch], side="left", device=self.lm.device)
                rows = log_softmax(forward(self.lm.model, ids, mask, keep=1).logits[:, -1]).exp().cpu()
                for i, row in zip(batch, rows, strict=True):
                    found[i] = row
                self._count(len(batch))
        return torch.stack(found)

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        edits: Mapping[Site, EditFn] | None = None,
    ) -> list[list[Scored]]:
        """Log-probabilities of each candidate answer of each prompt."""
        with self._asking(edits):
            found = self.lm.score(prompts, answers, batch_size=self.batch_size)
        self._count(sum(map(len, answers)))
        return found

    @contextmanager
    def _asking(self, edits: Mapping[Site, EditFn] | None) -> Iterator[None]:
        """No graph is recorded inside, even by an edit that asks for one: no parameter takes part."""
        if beyond := [site for site in edits or () if site != EMBEDDING]:
            raise InvalidConfig(f"a client reaches the embeddings at {EMBEDDING} alone; given: {beyond[0]}")
        trained = [p for p in self.lm.model.parameters() if p.requires_grad]
        before = [p.grad for p in trained]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with torch.no_grad(), self.lm.edit(edits) if edits else nullcontext():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            assert all(p.grad is g for p, g in zip(trained, before, strict=True)), "an oracle was differentiated"

    def _count(self, n: int) -> None:
        self.queries += n
        if self.progress:
            self.progress(n)
