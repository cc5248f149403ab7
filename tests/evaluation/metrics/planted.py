"""Views made by hand: what a model is said to have scored and said, without a model."""

from __future__ import annotations

from typing import Any

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.evaluation.metric import Metric
from concept_unlearn.evaluation.view import Asked, Reply, Seen, Tokens, View

Item = tuple[Probe | Passage, dict[str, Any]]


def tokens(*nll: float, hits: str = "", n_end: int = 0, mean=(), std=()) -> Tokens:
    """Token NLLs; hits "1101" where the label is the model's first choice."""
    greedy = tuple(h == "1" for h in hits or "0" * len(nll))
    return Tokens(tuple(-x for x in nll), greedy, n_end, tuple(mean), tuple(std))


def predicted(said: tuple[int, ...], labels: tuple[int, ...], n_end: int = 0) -> Tokens:
    return tokens(
        *[0.5] * len(labels), hits="".join(str(int(a == b)) for a, b in zip(said, labels, strict=True)), n_end=n_end
    )


def scored(right=(), wrong=(), paraphrased=(), /, **fields: Any) -> Item:
    """A probe by its tokens; each may be one answer's or several."""
    groups = {
        name: (group,) if isinstance(group, Tokens) else tuple(group)
        for name, group in (("answers", right), ("distractors", wrong), ("paraphrases", paraphrased))
    }
    texts = {name: tuple(f"{name} {i}" for i in range(len(group))) for name, group in groups.items()}
    return Probe(**{"prompt": "q", **texts, **fields}), groups


def replied(text: str, *answers: str, ids: tuple[int, ...] = (), **fields: Any) -> Item:
    return Probe(**{"prompt": "q", "answers": answers or ("yes",), **fields}), {"said": Reply(ids, text)}


def passage(text: str, found: Tokens, **reads: Any) -> Item:
    return Passage(text=text), {"answers": (found,), **reads}


def seen(items: list[Item], name: str = "forget") -> Seen:
    return Seen(name, Asked(tuple(example for example, _ in items)), tuple(record for _, record in items))


def view(*items: Item, original: View | None = None, retrained: View | None = None, **sets: list[Item]) -> View:
    """Of the set forget, and of any others by name."""
    named = {"forget": list(items), **sets} if items else sets
    return View("planted", {name: seen(group, name) for name, group in named.items()}, original, retrained)


def value(metric: Metric, *items: Item, **sets: Any) -> float | None:
    return metric(view(*items, **sets)).value
