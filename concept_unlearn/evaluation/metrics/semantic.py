"""What replies mean, by models that judge text: they are named in a field, and loaded when a metric is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ..measured import Measured, mean_of, undefined
from ..metric import Beside, Metric
from ..view import Read, View
from .generation import rouge_l
from .scorers import NLI_MODEL, SENTENCE_ENCODER, entailment_model, sentence_encoder

_MIN_RECALL = 0.1
"""ROUGE-L recall below which a reply has nothing to do with the answer, whatever an entailment model says."""


class _OnReplies(Metric):
    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return {self.on: ("said",)}


class CosineSimilarity(_OnReplies):
    """max(0, cosine) of the reply with what the original model replied (2410.08109); 0 where either is empty."""

    encoder: str = SENTENCE_ENCODER
    """A wheel's name, a folder or a model of the Hub; published with sentence-transformers/paraphrase-MiniLM-L6-v2."""

    @property
    def beside(self) -> tuple[Beside, ...]:
        return ("original",)

    def __call__(self, view: View) -> Measured:
        said = [reply.text for reply in view[self.on].said]
        if view.original is None:
            return undefined("no observation of the original model", len(said))
        before = [reply.text for reply in view.original[self.on].said]
        units = unit_vectors(self.encoder, [*said, *before])
        values = [max(0.0, float(units[a] @ units[b])) for a, b in zip(said, before, strict=True)]
        return mean_of([min(v, 1.0) for v in values], notes={"encoder": self.encoder})


class EmbeddingAccuracy(_OnReplies):
    """Share of replies nearer, by cosine, to the right answer than to every distractor (WAGLE, 2410.17509).

    The right answer is the paraphrased one where a probe has it, the nearest of several. A tie is wrong, as is an empty
    reply. Undefined without distractors.
    """

    encoder: str = SENTENCE_ENCODER

    def __call__(self, view: View) -> Measured:
        seen = view[self.on]
        texts = [
            (r.text, p.paraphrases or p.answers, p.distractors) for p, r in zip(seen.probes, seen.said, strict=True)
        ]
        units = unit_vectors(self.encoder, [t for said, right, wrong in texts for t in (said, *right, *wrong)])
        values: list[float | None] = []
        for said, right, wrong in texts:
            best = [max((float(units[said] @ units[t]) for t in group), default=None) for group in (right, wrong)]
            values.append(None if best[0] is None or best[1] is None else float(best[0] > best[1]))
        return mean_of(values, notes={"encoder": self.encoder})


class Entailment(_OnReplies):
    """Share of replies that say what the answer says, to a natural language inference model (2410.08109).

    A reply with a ROUGE-L recall of the answer below 0.1 says something else, as does an empty one. Of several answers
    any will do.
    """

    nli: str = NLI_MODEL
    """A folder or a model of the Hub with a label "entailment"."""
    premise: Literal["reply", "answer"] = "reply"
    """What entails the other of the two. reply: it may say more than the answer. answer: it may say less, as in TOFU's
    sets other than the forgotten one."""

    def __call__(self, view: View) -> Measured:
        seen = view[self.on]
        found = [False] * len(seen.probes)
        pairs, whose = [], []
        for i, (probe, reply) in enumerate(zip(seen.probes, seen.said, strict=True)):
            for answer in probe.answers:
                rouge = rouge_l(answer, reply.text)
                if reply.text.strip() and (rouge is None or rouge.recall >= _MIN_RECALL):
                    pairs.append((reply.text, answer) if self.premise == "reply" else (answer, reply.text))
                    whose.append(i)
        for i, entailed in zip(whose, entailment_model(self.nli)(pairs), strict=True):
            found[i] |= entailed
        return mean_of([float(f) for f in found], notes={"nli": self.nli, "premise": self.premise})


def unit_vectors(encoder: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each text its direction, encoded once; zero of an empty text and of a zero vector."""
    distinct = list(dict.fromkeys(texts))
    vectors = sentence_encoder(encoder)(distinct)
    found = {}
    for text, vector in zip(distinct, vectors, strict=True):
        norm = float(np.linalg.norm(vector))
        found[text] = vector / norm if norm and text.strip() else np.zeros_like(vector)
    return found
