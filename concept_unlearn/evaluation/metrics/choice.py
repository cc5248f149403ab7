"""Which of several options a model finds likeliest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from ...errors import InvalidData
from ..measured import Measured, mean_of
from ..metric import Metric
from ..view import Read, Seen, Tokens, View


class Choice(NamedTuple):
    place: int
    """Of the option that scores highest, the first of equal ones."""
    is_right: bool
    is_tied: bool
    p_right: float
    """Softmax of the scores, of the right options."""
    n_options: int


class ChoiceAccuracy(Metric):
    """Share of probes of which a right option scores highest; of equal ones the first is chosen.

    A collapsed model shows in the notes: how often options tie, the share chosen at each place, and the mean
    probability of the right option among all.
    """

    score: Literal["sum", "norm", "letter"] = "norm"
    """sum: -N of the option. norm: that a byte of its text. letter: the log-probability of the option, one token such
    as A after "Answer:"."""

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return {self.on: ("answers", "distractors")}

    def __call__(self, view: View) -> Measured:
        seen = view[self.on]
        choices = [self.choose(seen, i) for i in range(len(seen.probes))]
        made = [c for c in choices if c is not None]
        notes: dict[str, float | str | None] = {"score": self.score}
        if made:
            notes |= {
                "tie_rate": sum(c.is_tied for c in made) / len(made),
                "p_right": sum(c.p_right for c in made) / len(made),
            }
            places, n = Counter(c.place for c in made), max(c.n_options for c in made)
            notes |= {f"chosen_{place}": places[place] / len(made) for place in range(n)}
        return mean_of([None if c is None else float(c.is_right) for c in choices], notes=notes)

    def choose(self, seen: Seen, i: int) -> Choice | None:
        """None of a probe with nothing to choose from."""
        options = seen.options(i)
        if len(options) < 2:
            return None
        scores = np.array([self._score(text, tokens) for text, tokens in options])
        right = np.array([text in seen.probes[i].answers for text, _ in options])
        shares = np.exp(scores - np.logaddexp.reduce(scores))
        place = int(scores.argmax())
        tied = bool((scores == scores[place]).sum() > 1)
        return Choice(place, bool(right[place]), tied, float(shares[right].sum()), len(options))

    def _score(self, text: str, tokens: Tokens) -> float:
        if self.score != "letter":
            return -tokens.nll / (len(text.encode()) if self.score == "norm" else 1)
        if tokens.body.n != 1:
            raise InvalidData(f"the option {text!r} has {tokens.body.n} tokens; scored by its letter, it must be one")
        return tokens.logprobs[0]
