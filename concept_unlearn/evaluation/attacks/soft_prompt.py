"""A soft prompt: vectors before every prompt, found by gradient, that bring back the forgotten (arXiv 2402.09063)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.encode import common_prefix, encode_question, encode_text, pad
from ...data.examples import Passage, Probe
from ...errors import Diverged, InvalidConfig, InvalidData, NotExact
from ...lm import LM
from ...lm.oracle import EMBEDDING
from ...patches import Patch, PrefixPatch, PromptPatch, Stack
from ...patches.base import Switch, parts
from ...patches.prompt_edits import Vectors
from ...training.sharded import is_sharded
from ...training.trainable import flags_restored
from ..view import Asked
from .base import Access, Attack, Outcome, Victim, Way, _length
from .relearn import Relearn, held_out

_PLACEHOLDER = "!"


class SoftPrompt(Attack):
    """``n`` placeholders go before each prompt, and vectors are added to their embeddings.

    White-box: the vectors go down the loss of a few passages by gradients through the model with the patch on, edits,
    gates and all; no weight changes. Leaks are measured on examples that were not among these passages, as in
    ``relearn``. The vectors learn the passages' manner too, so read it beside the untouched model under the same.
    """

    access: ClassVar[Access] = "weights"

    n: int = Field(8, gt=0)
    """Vectors, of the width of the model."""
    k: int = Field(20, gt=0)
    """Passages to forget that they are learned on, drawn; all where there are fewer."""
    steps: int = Field(40, gt=0)
    lr: float = Field(0.1, gt=0)
    """Of Adam, in the root mean square of the embeddings."""
    batch_size: int = Field(8, gt=0)
    max_tokens: int = Field(96, gt=1)
    """Of a passage, with its prompt and the placeholders."""
    seed: int = 0

    def __call__(self, victim: Victim) -> Outcome:
        """Raises EmptyData where nothing is left to ask, Diverged where the loss is no number, NotExact for a patch
        that puts text before prompts: the vectors would fall on that text.
        """
        if victim.patch is not None and any(isinstance(part, PrefixPatch) for part in parts(victim.patch)):
            raise NotExact("a soft prompt and a text prefix would stand in the same place: this patch is a prefix")
        passages = Relearn(k=self.k, seed=self.seed).passages(victim.scope)
        leaks, sets, notes = held_out(victim, passages)
        asked = {name: replace(own, examples=tuple(map(self._asked, own.examples))) for name, own in sets.items()}
        _check_length(victim.lm, asked)
        found = self.learned(victim, passages)
        notes |= {"n": self.n, "loss_before": found.first, "loss": found.last}
        patch = _before(found.patch, victim.patch)
        return Outcome(results=victim.measure(Way(patch, asked, notes), leaks, "soft_prompt"))

    def learned(self, victim: Victim, passages: Sequence[Passage]) -> Learned:
        if is_sharded():
            raise InvalidConfig(
                "a soft prompt goes through the live model with the patch at work in it: launch without FSDP"
            )
        lm, rows = victim.lm, [self._row(victim.lm, p) for p in passages]
        if not (rows := [row for row in rows if len(row.ids) > row.n_prompt]):
            raise InvalidData(f"no passage has a word within {self.max_tokens} tokens: allow more")
        unit = _size(lm, rows)
        vectors = nn.Parameter(torch.zeros(self.n, lm.d_model, device=lm.device))
        optimiser = torch.optim.Adam([vectors], lr=self.lr * unit)
        draw = random.Random(f"{self.seed} soft prompt")
        losses: list[float] = []
        with flags_restored(lm.model), contextlib.ExitStack() as stack:
            for p in lm.model.parameters():
                p.requires_grad_(False)
            stack.enter_context(lm.edit(PromptPatch(edit=Vectors(vectors)).edits(lm, Switch())))  # it is the input
            if victim.patch is not None:
                stack.enter_context(victim.patch.on(lm))
            stack.enter_context(torch.enable_grad())
            for _ in range(self.steps):
                batch = draw.sample(rows, min(self.batch_size, len(rows)))
                optimiser.zero_grad()
                loss = _loss(lm, batch)
                if not loss.isfinite():
                    raise Diverged(f"a soft prompt's loss is {float(loss)} at step {len(losses)}: take a lower lr")
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        return Learned(PromptPatch(edit=Vectors(vectors.detach().cpu())), losses[0], losses[-1])

    @property
    def _opening(self) -> str:
        return " ".join([_PLACEHOLDER] * self.n)

    def _asked(self, example: Probe | Passage) -> Probe | Passage:
        if isinstance(example, Passage):
            return example
        return example.model_copy(update={"prompt": f"{self._opening} {example.prompt}"})

    def _row(self, lm: LM, passage: Passage) -> Row:
        if passage.prompt is None:
            ids = encode_text(lm.tokenizer, f"{self._opening} {passage.text}")
            n_prompt = len(common_prefix(ids, encode_text(lm.tokenizer, self._opening)))
        else:
            prompt = f"{self._opening} {passage.prompt}"
            ids = encode_text(lm.tokenizer, passage.text, prompt)
            n_prompt = len(encode_question(lm.tokenizer, prompt))
        return Row(ids[: self.max_tokens], n_prompt)


class Row(NamedTuple):
    ids: list[int]
    n_prompt: int
    """Of them that are not to be said."""


class Learned(NamedTuple):
    patch: PromptPatch
    first: float
    last: float
    """Nats a token, at the first step and at the last."""


def _loss(lm: LM, rows: Sequence[Row]) -> Float[Tensor, ""]:
    """The mean NLL of the tokens behind the prompts."""
    ids, mask = pad([row.ids for row in rows], side="right", device=lm.device)
    said = mask.clone()
    for i, row in enumerate(rows):
        said[i, : max(row.n_prompt, 1)] = False
    logits = lm.logits(ids, mask)[:, :-1][said[:, 1:]]
    return cross_entropy(logits.float(), ids[:, 1:][said[:, 1:]])


def _size(lm: LM, rows: Sequence[Row]) -> float:
    ids, mask = pad([row.ids for row in rows[:8]], side="right", device=lm.device)
    x = lm.activations(ids, mask, EMBEDDING)[EMBEDDING]
    return float(x[mask].float().square().mean().sqrt())


def _before(change: PromptPatch, patch: Patch | None) -> Patch:
    """An input is there before any patch reads it."""
    return change if patch is None else Stack((change, patch))


def _check_length(lm: LM, sets: dict[str, Asked]) -> None:
    if (longest := max(_length(lm, asked) for asked in sets.values())) > lm.context:
        raise InvalidData(
            f"behind these placeholders a prompt and its reply take {longest} tokens, and {lm.name} reads {lm.context}"
        )
