"""One optimiser step as objectives see it: what the model, and its reference, say of each split's batch.

Everything is computed at most once, on first use, and only where it is read. Values come flat, one a token, in the
order of the batch; the reductions divide by the counts of the whole optimiser step, so that micro-batches and
processes add up to what one big batch would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ..errors import EmptyData, InvalidData
from ..lm import LM, Site
from ..lm.head import Ending, ending
from .batch import Batch, Read, Where
from .reference import LiveReference, Reading, Reference, read


class Tally:
    """Counts that only the model can tell, such as how many sequences are below a bound, over a whole step.

    While ``counting``, each part adds its share; afterwards every part is told the sum.
    """

    def __init__(self) -> None:
        self.counting = True
        self.counts: dict[str, Tensor] = {}

    def __call__(self, name: str, count: Tensor) -> Tensor:
        if self.counting:
            self.counts[name] = self.counts[name] + count if name in self.counts else count
            return count
        return self.counts[name]


class Step:
    """The batches of one part of an optimiser step, and what is said of them."""

    def __init__(
        self,
        lm: LM,
        batches: Mapping[str, Batch],
        reads: Sequence[Read],
        *,
        head: Ending | None = None,
        reference: Reference | None = None,
        whole: Mapping[str, Sequence[Batch]] | None = None,
        tally: Tally | None = None,
    ) -> None:
        """``reads`` is what the objectives that will be called declare; ``whole`` holds the batches of all parts of
        the optimiser step, by default just these. Without a ``reference`` the model itself, as it is now, is one.
        """
        self.lm, self.reads = lm, reads
        self._head = head or ending(lm.model)
        self._reference = reference or LiveReference(lm, self._head)
        self._batches, self._tally = batches, tally
        self._whole = whole if whole is not None else {split: [batch] for split, batch in batches.items()}
        self._memo: dict[tuple[object, ...], Tensor] = {}
        self._passes: dict[str, Reading] = {}
        self._heard: dict[str, dict[int, Tensor]] = {}

    def batch(self, split: str) -> Batch:
        """Raises InvalidData for a split that is not there."""
        if split not in self._batches:
            known = ", ".join(sorted(self._batches)) or "none"
            raise InvalidData(f"an objective reads the split {split!r}; given: {known}")
        return self._batches[split]

    # What the model says.

    def tokens(
        self,
        split: str,
        fn: Callable[[Float[Tensor, "m vocab"], Int[Tensor, " m"]], Float[Tensor, " m"]],
        where: Where = "answer",
    ) -> Float[Tensor, " n"]:
        """``fn(logits, labels)`` gives one number a token; of many tokens it is asked some at a time."""
        labels, heard = self.labels(split, where), self._hearing(split, where)

        def ask(z: Tensor, which: slice) -> Tensor:
            heard(z, which)
            return fn(z, labels[which])

        return self._head.each(self._hidden(split, where), ask)

    def tokens_beside(
        self,
        split: str,
        fn: Callable[[Float[Tensor, "m vocab"], Float[Tensor, "m vocab"], Int[Tensor, " m"]], Float[Tensor, " m"]],
        where: Where = "answer",
    ) -> Float[Tensor, " n"]:
        """``fn(logits, reference_logits, labels)``, the same with the reference's logits beside the model's."""
        labels, heard = self.labels(split, where), self._hearing(split, where)
        hidden = self._declared(Read(split, "logits", where, True), lambda b: self._reference.hidden(split, b, where))

        def ask(z: Tensor, which: slice) -> Tensor:
            heard(z, which)
            return fn(z, self._reference.logits(hidden[which]), labels[which])

        return self._head.each(self._hidden(split, where), ask)

    def nll(self, split: str) -> Float[Tensor, " n"]:
        """-log p of every supervised token: c."""
        key = (split, "nll")
        if key not in self._memo:
            self._memo[key] = self.tokens(split, lambda z, y: cross_entropy(z, y, reduction="none"))
        return self._memo[key]

    def heard_nll(self, split: str) -> Float[Tensor, " n"] | None:
        """``nll`` without gradients, if an objective has asked for logits of all supervised tokens."""
        heard = self._heard.get(split)
        return None if heard is None else torch.cat([heard[start] for start in sorted(heard)])

    def reference_nll(self, split: str) -> Float[Tensor, " n"]:
        return self._declared(Read(split, "nll", "answer", True), lambda b: self._reference.nll(split, b))

    def activations(self, split: str, site: Site, where: Where) -> Float[Tensor, "n d"]:
        """In float32."""
        x = self._pass(split).activations[site][self.batch(split).positions(where)]
        return x if x.dtype == torch.float64 else x.float()

    def reference_activations(self, split: str, site: Site, where: Where) -> Float[Tensor, "n d"]:
        x = self._declared(Read(split, site, where, True), lambda b: self._reference.activations(split, b, site, where))
        return x if x.dtype == torch.float64 else x.float()

    def _hearing(self, split: str, where: Where) -> Callable[[Float[Tensor, "m vocab"], slice], None]:
        """A listener to logits, for what they say of the supervised tokens: nothing is computed twice to log it."""
        batch = self.batch(split)
        read, answer = batch.positions(where), batch.positions()
        if split in self._heard or bool((answer & ~read).any()):
            return lambda z, which: None
        chosen, labels = answer[read], self.labels(split, where)
        heard: dict[int, Tensor] = {}
        self._heard[split] = heard

        def listen(z: Tensor, which: slice) -> None:
            if which.start not in heard:
                own = chosen[which]
                heard[which.start] = cross_entropy(z.detach()[own], labels[which][own], reduction="none")

        return listen

    # Where the tokens stand.

    def labels(self, split: str, where: Where = "answer") -> Int[Tensor, " n"]:
        """The token that each position predicts; 0 behind the end, where there is none."""
        batch = self.batch(split)
        return pad(batch.ids[:, 1:], (0, 1))[batch.positions(where)]

    def owner(self, split: str, where: Where = "answer") -> Int[Tensor, " n"]:
        """The sequence that each token belongs to."""
        return self.batch(split).positions(where).nonzero()[:, 0]

    def order(self, split: str, where: Where = "answer") -> Int[Tensor, " n"]:
        """Each token's place among those of its sequence, from 0."""
        positions = self.batch(split).positions(where)
        return (positions.long().cumsum(-1) - 1)[positions]

    # Reductions.

    def token_mean(self, split: str, values: Float[Tensor, " n"], where: Where = "answer") -> Float[Tensor, ""]:
        """sum over tokens / all tokens"""
        return values.sum() / self.total(split, lambda b: b.lengths(where).sum())

    def seq_sum(self, split: str, values: Float[Tensor, " n"], where: Where = "answer") -> Float[Tensor, ""]:
        """sum over tokens / sequences"""
        return values.sum() / self.n_sequences(split, where)

    def seq_mean(self, split: str, values: Float[Tensor, " n"], where: Where = "answer") -> Float[Tensor, ""]:
        """mean over the tokens of each sequence, then over sequences"""
        lengths = self.batch(split).lengths(where)[self.owner(split, where)]
        return (values / lengths).sum() / self.n_sequences(split, where)

    def mean(self, split: str, values: Float[Tensor, " batch"], where: Where = "answer") -> Float[Tensor, ""]:
        """mean over the sequences that have a token at all"""
        has_any = self.batch(split).lengths(where) > 0
        return torch.where(has_any, values, 0.0).sum() / self.n_sequences(split, where)

    def per_sequence(self, split: str, values: Float[Tensor, " n"], where: Where = "answer") -> Float[Tensor, " batch"]:
        """sum over the tokens of each sequence"""
        zeros = values.new_zeros(len(self.batch(split).ids))
        return zeros.index_add(0, self.owner(split, where), values)

    def n_sequences(self, split: str, where: Where = "answer") -> Tensor:
        """B': sequences of the optimiser step that have a token at all."""
        return self.total(split, lambda b: (b.lengths(where) > 0).sum())

    def total(self, split: str, count: Callable[[Batch], Tensor]) -> Tensor:
        """``count`` over all batches of the optimiser step. Raises EmptyData where that is nothing."""
        self.batch(split)
        found = torch.stack([count(batch) for batch in self._whole[split]]).sum()
        if not found:
            raise EmptyData(f"no sequence of this step's {split!r} batch has a token to read")
        return found

    def agree(self, name: str, count: Tensor) -> Tensor:
        """What ``count``, which the model decides, adds up to over all parts of the optimiser step."""
        return count if self._tally is None else self._tally(name, count.detach())

    # Passes.

    def _hidden(self, split: str, where: Where) -> Float[Tensor, "n d"]:
        key = (split, "hidden", where)
        if key not in self._memo:
            hidden = self._pass(split).hidden
            assert hidden is not None, f"nobody declared to read the logits of {split!r}: {self.reads}"
            self._memo[key] = hidden[self.batch(split).positions(where)]
        return self._memo[key]

    def _pass(self, split: str) -> Reading:
        if split not in self._passes:
            batch, own = self.batch(split), [r for r in self.reads if r.split == split and not r.reference]
            sites = sorted({r.what for r in own if isinstance(r.what, Site)})
            logits = any(not isinstance(r.what, Site) for r in own)
            self._passes[split] = read(self.lm, self._head, batch, logits=logits, sites=sites)
        return self._passes[split]

    def _declared(self, wanted: Read, ask: Callable[[Batch], Tensor]) -> Tensor:
        assert wanted in self.reads, f"{wanted} was not declared, so it may not be cached: {self.reads}"
        if wanted not in self._memo:
            self._memo[wanted] = ask(self.batch(wanted.split))
        return self._memo[wanted]
