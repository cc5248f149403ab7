"""Each feature suppressed alone: what the model then no longer knows, of the concept and of what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from ..activations import stream
from ..data.encode import encode_text
from ..data.examples import Probe
from ..data.scope import IN_SCOPE, OUT_OF_SCOPE, Scope
from ..dictionaries import Dictionary, Slice, as_dictionary
from ..edits import Clamp, Edit
from ..errors import EmptyData, InvalidConfig
from ..features.show.effect import Change, Effect
from ..lm import LM
from ..lm.score import Scored
from ..patches import FeaturePatch
from ..tracking import Progress
from .question import encode_probe, encode_reply

T = TypeVar("T")

_SIDES = ((IN_SCOPE, ("forget",)), (OUT_OF_SCOPE, ("near", "retain")))
"""Probes, and the passages that serve where there is none."""


class _Question(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]
    """The right ones, then the wrong ones."""
    n_right: int
    sizes: list[int]
    """Of each in bytes: likelihoods are compared a byte."""


class _Known(NamedTuple):
    logprob: float
    """Of any right answer."""
    is_right: bool | None
    """None where there is no wrong one."""


def effect_alone(
    lm: LM,
    dictionary: Dictionary,
    scope: Scope,
    features: Sequence[int],
    *,
    edit: Edit | None = None,
    n: int = 64,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[int, Effect]:
    """What a patch of one feature and ``edit`` (``Clamp()`` where None) does, of each of these features.

    It is asked at most ``n`` questions of the concept and as many others, evenly spread over the scope's probes; a
    side without probes is asked for the second halves of its passages. That costs one scoring of all questions, one
    pass over them as deep as the dictionary, and for each feature one scoring of the questions in which its edit
    changes anything: of the others the answer is known. A question is read once for all its answers. ``progress``
    hears of features. Raises InvalidConfig for an edit of several features, EmptyData where nothing can be asked.
    """
    edit = Clamp() if edit is None else Edit.parse(edit)
    if edit.kind == "refuse":
        raise InvalidConfig("the refuse edit raises one feature where others fire; alone a feature has no others")
    dictionary = as_dictionary(dictionary).to(lm.device)
    sensor = dictionary.slice(features)
    sides = [_questions(lm, scope, probes, passages, n) for probes, passages in _SIDES]
    asked = [question for side in sides for question in side]
    before = _ask(lm, asked, batch_size)
    touched = _touched(lm, sensor, edit, asked)
    found = {}
    for column, feature in enumerate(sensor.features):
        chosen = touched[:, column].nonzero()[:, 0].tolist()
        after = list(before)
        with FeaturePatch(dictionary=dictionary, features=[feature], edit=edit).on(lm):
            for i, known in zip(chosen, _ask(lm, [asked[i] for i in chosen], batch_size), strict=True):
                after[i] = known
        cut = len(sides[0])
        found[feature] = Effect(
            edit=edit.spec(),
            forget=_change(before[:cut], after[:cut], sum(i < cut for i in chosen)),
            retain=_change(before[cut:], after[cut:], sum(i >= cut for i in chosen)),
        )
        if progress:
            progress(1)
    return found


def _questions(lm: LM, scope: Scope, probes: Sequence[str], passages: Sequence[str], n: int) -> list[_Question]:
    asked = [_of_probe(lm, probe) for probe in _spread([p for name in probes for p in getattr(scope, name)], n)]
    if not asked:
        texts = [encode_text(lm.tokenizer, p.text, p.prompt) for name in passages for p in getattr(scope, name)]
        for ids in _spread([text for text in texts if len(text) > 1], n):
            asked.append(_Question(ids[: len(ids) // 2], [ids[len(ids) // 2 :]], 1, [1]))
    if not asked:
        raise EmptyData(
            f"scope {scope.name!r} has no probe in {', '.join(probes)} and no passage of two tokens instead"
        )
    return asked


def _of_probe(lm: LM, probe: Probe) -> _Question:
    texts = (*probe.answers, *probe.distractors)
    answers = [encode_reply(lm, probe, text) for text in texts]
    return _Question(encode_probe(lm, probe).prompt, answers, len(probe.answers), [len(t.encode()) for t in texts])


def _spread(items: Sequence[T], n: int) -> list[T]:
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


def _ask(lm: LM, asked: Sequence[_Question], batch_size: int) -> list[_Known]:
    if not asked:
        return []
    scored = lm.score([q.prompt for q in asked], [q.answers for q in asked], batch_size=batch_size)
    return [_known(question, own) for question, own in zip(asked, scored, strict=True)]


def _known(question: _Question, scored: Sequence[Scored]) -> _Known:
    logprobs, n = [float(s.logprobs.double().sum()) for s in scored], question.n_right
    a_byte = [value / size for value, size in zip(logprobs, question.sizes, strict=True)]
    right = None if len(scored) == n else max(a_byte[:n]) > max(a_byte[n:])
    return _Known(float(torch.tensor(logprobs[:n], dtype=torch.float64).logsumexp(0)), right)


@torch.no_grad()
def _touched(lm: LM, sensor: Slice, edit: Edit, asked: Sequence[_Question]) -> Bool[Tensor, "questions k"]:
    """Where each feature's edit changes anything, in a question or in one of its answers."""
    texts = [question.prompt + answer for question in asked for answer in question.answers]
    owner = torch.tensor([i for i, question in enumerate(asked) for _ in question.answers])
    found = torch.zeros(len(asked), len(sensor.features), dtype=torch.long)
    sizes = sensor.W_dec.norm(dim=-1).clamp(min=1e-12)
    for rows in stream(lm, [sensor.site], texts):
        x = rows.activations[sensor.site].float()
        norm = x.norm(dim=-1, keepdim=True)
        acts, scale = sensor.encode(x)
        unit = norm / sizes if scale is None else norm / sizes / scale
        changed = edit(acts[..., None], unit[..., None])[..., 0] != acts  # each feature as the only one
        changed &= norm <= sensor.max_norm
        found.index_add_(0, owner[rows.sequence.cpu()], changed.cpu().long())
    return found > 0


def _change(before: Sequence[_Known], after: Sequence[_Known], touched: int) -> Change:
    moved = [now.logprob - was.logprob for was, now in zip(before, after, strict=True)]
    return Change(
        questions=len(before),
        touched=touched,
        logprob=fmean(moved),
        error=stdev(moved) / math.sqrt(len(moved)) if len(moved) > 1 else 0.0,
        before=_share(before),
        after=_share(after),
    )


def _share(known: Sequence[_Known]) -> float | None:
    judged = [k.is_right for k in known if k.is_right is not None]
    return fmean(judged) if judged else None
