"""The splits that objectives read, made of a scope."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

from ..data.examples import Passage
from ..data.scope import Scope
from ..errors import EmptyData, InvalidConfig, UnknownName
from ..lm import LM
from ..tracking import Progress
from .alternates import alternates
from .plan import SIDES, Data
from .rows import Encoder, Split, answered, order, plain, refused
from .settings import Optimisation
from .trainable import flags_restored


def make_data(
    lm: LM,
    scope: Scope,
    splits: Iterable[str],
    settings: Optimisation,
    *,
    labels: Sequence[str] = (),
    progress: Progress | None = None,
) -> Data:
    """With ``labels`` each text is one of them. Raises UnknownName for a split that nobody makes, InvalidData for a
    passage that cannot be in it.
    """
    wanted = set(splits)
    if unknown := sorted(wanted - set(SIDES)):
        raise UnknownName("split", unknown[0], SIDES)
    if labels and (other := sorted(wanted - {"forget", "retain"})):
        raise InvalidConfig(f"a label has no {other[0]}: classification goes with the splits forget and retain")
    encoder = Encoder(lm.tokenizer, min(settings.max_length, lm.context), tuple(labels))
    forget, retain = scope.forget, (*scope.near, *scope.retain)
    made: dict[str, Split] = {}
    if wanted & {"refusal", "alternate"}:
        forget = _asked(forget, "to forget")
    if "retain_refusal" in wanted:
        retain = _asked(retain, "to keep")
    if "alternate" in wanted:
        with flags_restored(lm.model):
            answers = alternates(lm, forget, seed=settings.seed, progress=progress)
        forget = _with_answers(forget, answers)
        made["alternate"] = answered(encoder, forget, [a for a in answers if a is not None])
    watched = {"forget", "retain"} if settings.watch else set()
    if (wanted | watched) & {"forget"}:
        made["forget"] = plain(encoder, forget)
    if (wanted | watched) & {"retain"}:
        made["retain"] = plain(encoder, retain)
    epochs = math.ceil(settings.epochs) if settings.max_steps is None else 8
    if "refusal" in wanted:
        made["refusal"] = refused(encoder, forget, epochs=epochs, seed=settings.seed)
    if "retain_refusal" in wanted:
        made["retain_refusal"] = refused(encoder, retain, epochs=epochs, seed=settings.seed + 1)
    encoder.warn()
    held = _held_out(len(retain), settings)
    trained = sorted(set(range(len(retain))) - set(held))
    return Data(made, {"forget": range(len(forget)), "retain": trained}, {"forget": range(len(forget)), "retain": held})


def _asked(passages: Sequence[Passage], what: str) -> tuple[Passage, ...]:
    """Those that can be given another answer, because they have a question."""
    kept = tuple(p for p in passages if p.prompt is not None)
    if not kept:
        raise EmptyData(f"refusals and alternates answer questions, and no passage {what} has a prompt")
    if left := len(passages) - len(kept):
        warnings.warn(
            f"{left} of {len(passages)} passages {what} are left out: they have no prompt to refuse", stacklevel=4
        )
    return kept


def _with_answers(passages: Sequence[Passage], answers: Sequence[str | None]) -> tuple[Passage, ...]:
    kept = tuple(p for p, a in zip(passages, answers, strict=True) if a is not None)
    if not kept:
        raise EmptyData("no forget passage has an alternate answer: give some as Passage(..., alternates=[...])")
    if len(kept) < len(passages):
        left = len(passages) - len(kept)
        warnings.warn(f"{left} of {len(passages)} passages are left out: they have no alternate answer", stacklevel=4)
    return kept


def _held_out(n: int, settings: Optimisation) -> list[int]:
    """A tenth of the retained items at most, the same for every method that has this seed."""
    if settings.watch is None:
        return []
    if n < 2:
        raise EmptyData(f"to watch what is kept takes 2 retained passages, one of them held out; given: {n}")
    return sorted(order(n, seed=settings.seed, epoch=-1)[: min(settings.watch.passages, max(n // 10, 1))])
