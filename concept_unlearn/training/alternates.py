"""Plausible wrong answers: those that come with the passages, or made up by the model itself."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.examples import Passage, normalise
from ..lm import LM
from ..tracking import Progress

_ASK = (
    'Question: "{question}"\nAnswer: "{answer}"\n\nInvent another answer to this question, in the same style, with '
    "other names, places and facts. Write the new answer only."
)
_TRIES = 3


def alternates(lm: LM, passages: Sequence[Passage], *, seed: int, progress: Progress | None = None) -> list[str | None]:
    """One for each passage that has a prompt; None where nothing but the true answer came (AltPO, arXiv 2409.13474)."""
    found = [next((a for a in p.alternates if normalise(a) != normalise(p.text)), None) for p in passages]
    for attempt in range(_TRIES):
        open_ = [i for i, p in enumerate(passages) if found[i] is None and p.prompt]
        prompts = [_ASK.format(question=passages[i].prompt, answer=passages[i].text) for i in open_]
        written = lm.generate(
            prompts, max_new_tokens=64, temperature=0.8 + 0.2 * attempt, seed=seed + attempt, progress=progress
        )
        for i, text in zip(open_, written, strict=True):
            answer = text.strip().strip('"').split("\n")[0].strip()
            if normalise(answer).strip() and normalise(answer) != normalise(passages[i].text):
                found[i] = answer
    return found
