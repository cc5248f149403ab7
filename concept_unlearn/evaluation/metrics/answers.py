"""Right or wrong, by what the model writes and by how it ranks; and is what it writes still language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..fluency import is_gibberish
from ..measured import Measured, mean_of, undefined
from ..metric import Beside, Metric, _ItemMetric
from ..view import Read, Seen, View


class GeneratedAccuracy(_ItemMetric):
    """Share of probes with an accepted answer, as whole words, in the first words of the greedy reply."""

    needs: ClassVar[tuple[Read, ...]] = ("said",)

    def value(self, seen: Seen, i: int) -> float:
        return float(seen.probes[i].answered_by(seen.said[i].text))


class RankedAccuracy(_ItemMetric):
    """Share of probes of which an accepted answer is likelier, a byte, than every distractor; a tie is wrong."""

    needs: ClassVar[tuple[Read, ...]] = ("answers", "distractors")

    def value(self, seen: Seen, i: int) -> float | None:
        probe = seen.probes[i]
        if not probe.distractors:
            return None
        right, wrong = (
            max(-tokens.body.nll / len(text.encode()) for text, tokens in zip(texts, scored, strict=True))
            for texts, scored in ((probe.answers, seen.answers[i]), (probe.distractors, seen.distractors[i]))
        )
        return float(right > wrong)


class AnswerLogprob(_ItemMetric):
    """Nats a token of the likeliest accepted answer, without its end token."""

    needs: ClassVar[tuple[Read, ...]] = ("answers",)

    def value(self, seen: Seen, i: int) -> float | None:
        found = [m for tokens in seen.answers[i] if (m := tokens.body.mean_logprob) is not None]
        return max(found, default=None)


class Touched(_ItemMetric):
    """Share of examples of which the patch changed anything at all: some log-probability of an answer or text."""

    lower_is_better: ClassVar[bool] = True
    needs: ClassVar[tuple[Read, ...]] = ("answers",)

    @property
    def beside(self) -> tuple[Beside, ...]:
        return ("original",)

    def __call__(self, view: View) -> Measured:
        if view.original is None:
            return undefined("no observation of the model before", len(view[self.on].examples))
        pairs = zip(view[self.on].answers, view.original[self.on].answers, strict=True)
        return mean_of([float([t.logprobs for t in a] != [t.logprobs for t in b]) for a, b in pairs])

    def value(self, seen: Seen, i: int) -> float | None:
        raise AssertionError("it compares two views")


class Gibberish(Metric):
    """Share of degenerate replies over several sets: loops, and text that its untouched model does not expect."""

    lower_is_better: ClassVar[bool] = True

    sets: tuple[str, ...]

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return dict.fromkeys(self.sets, ("said", "surprise"))

    def __call__(self, view: View) -> Measured:
        pairs = (pair for name in self.sets for pair in zip(view[name].said, view[name].surprise, strict=True))
        return mean_of([float(is_gibberish(said.ids, surprise)) for said, surprise in pairs])
