"""How far prompts are from being refused, by what a reply begins with: all that a client who sees answers can go by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..component import Frozen
from ..data.encode import encode_answer
from ..lm import LM
from ..lm.oracle import Oracle
from ..training.rows import REFUSALS
from .families import check_families, focal, frequency_mapping
from .questions import Question

_REFUSE = 0


class Labels(Frozen):
    """What counts as a refusal and as an answer, and how they are weighed: fields that a method takes over as its own.

    L = mean focal(h, refuse) over prompts to forget + retain_weight mean KL(p^0 || p) over prompts to keep.
    """

    mapping: Literal["own", "first_tokens", "frequency"] = "own"
    """Answers begin with the first tokens of the prompt's own, no refusal's among them, or of any's where none is left;
    of those of any prompt; or with the ``m`` tokens that the model itself begins with most. Refusals
    with those of the built-in ones."""
    m: int = Field(6, gt=0)
    normalise: bool = True
    """h of refusal and answer add up to 1, so taking the answer away counts as much as refusing, and noise does that;
    off, they are as in the paper, and nothing counts but how likely a refusal is."""
    g: float = Field(2.0, ge=0)
    """Of the focal loss; 0 is cross-entropy."""
    retain_weight: float = Field(1.0, ge=0)


class Refusing(NamedTuple):
    """Token ids that replies begin with."""

    refusals: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    """Of each prompt to forget."""

    def loss(self, p: Float[Tensor, "n vocab"], which: Sequence[int], labels: Labels) -> Float[Tensor, " n"]:
        """focal(h, refuse) of the prompts ``which``."""
        refused = p[:, list(self.refusals)].mean(1)
        answered = torch.stack([row[list(self.answers[i])].mean() for row, i in zip(p, which, strict=True)])
        h = torch.stack([refused, answered], 1)
        if labels.normalise:
            h = h / h.sum(1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
        return focal(h, torch.full((len(h),), _REFUSE), g=labels.g)


def refusing(lm: LM, oracle: Oracle, labels: Labels, questions: Sequence[Question]) -> Refusing:
    """Raises EmptyData or InvalidConfig for families that are empty or share a token. ``frequency`` asks them all."""
    chats = sorted({q.chat for q in questions})
    begun = [_first(lm, text, chat) for text in refusal_texts() for chat in chats]
    refusals = tuple(dict.fromkeys(begun))
    if labels.mapping == "frequency":
        said = oracle.probabilities([q.ids for q in questions])
        by_refusals = torch.nn.functional.one_hot(torch.tensor(begun), said.shape[1]).float().mean(0)
        found, answers = frequency_mapping([by_refusals[None], said], labels.m)
        return Refusing(found, (answers,) * len(questions))
    own = [tuple(dict.fromkeys(answer[0] for answer in q.answers)) for q in questions]
    known = tuple(dict.fromkeys(token for tokens in own for token in tokens))
    if labels.mapping == "own":
        known = tuple(token for token in known if token not in refusals)
        own = [tuple(token for token in tokens if token not in refusals) for tokens in own]
    check_families({"refusal": refusals, "answer": known})
    return Refusing(refusals, tuple((labels.mapping == "own" and tokens) or known for tokens in own))


def n_preparing(labels: Labels, n_forget: int) -> int:
    """Queries that ``refusing`` takes."""
    return n_forget if labels.mapping == "frequency" else 0


def divergence(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """KL(p || q)"""
    return (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=1e-30))).sum(1)


def refusal_texts() -> list[str]:
    return REFUSALS.read_text(encoding="utf-8").splitlines()


def _first(lm: LM, text: str, chat: bool) -> int:
    return encode_answer(lm.tokenizer, text, after_space=not chat)[0]
