"""MUSE: news or books to forget, verbatim, as knowledge and as a trace of membership (arXiv 2407.06460)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Literal

from pydantic import Field

from ...data.encode import encode_answer
from ...data.examples import Probe
from ...data.scope import Scope
from ...data.tables import Row, Source, read_table
from ...lm import LM
from ..benchmark import Benchmark, Line
from ..metric import Metric
from ..metrics import ExtractionStrength, Gibberish, MembershipAUC, PrivLeak, Rouge
from ..view import Asked

STOP = ("\n\n", "\nQuestion", "Question:")
"""Where a reply to a few-shot prompt goes on to a question of its own."""
STEPS = 4
"""Forget sets that scalability and sustainability have each."""


class MUSE(Benchmark):
    """Six questions to an unlearned model; the last two, scalability and sustainability, are ``steps``.

    A folder is as the repository of the data set: ``knowmem/forget_qa.json`` and ``_icl``, the same of ``retain_qa``
    (question, answer), ``verbmem/forget.json`` (prompt, gt), ``privleak/forget.json`` and ``holdout`` (text),
    ``raw/forget.json`` and ``retain1``, ``scal/forget_1.json`` to ``forget_4.json`` and the same of ``sust`` (text).
    """

    data: Source = "muse-bench/MUSE-News"
    """A folder, or a dataset id of the Hub."""
    forget: str = Field("forget", pattern=rf"^(forget|(scal|sust)_[1-{STEPS}])$")
    """The documents to forget: ``forget``; ``scal_1`` to ``scal_4``, each of which holds the one before; ``sust_1`` to
    ``sust_4``, forgotten one after another. VerbMem, KnowMem and PrivLeak are of ``forget`` all the same."""
    n_items: int | None = Field(None, gt=0)
    """Of each set, the first so many."""
    n_shots: int | None = Field(None, ge=0)
    """Answered questions before each question of KnowMem; all there are where None."""
    max_tokens: int = Field(2048, gt=1)
    """Of each document."""
    k: float = Field(0.4, gt=0, le=1)
    """Share of tokens that Min-K reads."""
    max_new_tokens: int = Field(32, gt=0)
    """Of an answer of KnowMem."""
    max_verbatim_tokens: int = Field(128, gt=0)
    """Of a continuation of VerbMem, and of what it is compared with."""

    @property
    def name(self) -> str:
        return f"{self.data.rstrip('/').rpartition('/')[2]}, {self.forget}"

    def steps(self, which: Literal["scal", "sust"]) -> tuple[MUSE, ...]:
        """The same benchmark of each successive forget set: larger ones, or one request after another."""
        return tuple(MUSE(**{**self.model_dump(), "forget": f"{which}_{i}"}) for i in range(1, STEPS + 1))

    @cached_property
    def sets(self) -> Mapping[str, Asked]:
        found = {
            "verbatim": Asked(tuple(map(_continued, self._rows("verbmem/forget"))), self.max_verbatim_tokens),
            "forget_questions": self._questions("forget_qa"),
            "retain_questions": self._questions("retain_qa"),
        }
        config, _, step = self.forget.partition("_")
        texts = {
            "forget": f"{config}/forget_{step}" if step else "raw/forget",
            "members": "privleak/forget",
            "holdout": "privleak/holdout",
        }
        for name, table in texts.items():
            found[name] = Asked(tuple(row.passage() for row in self._rows(table)), max_tokens=self.max_tokens)
        return found

    def fitted(self, sets: Mapping[str, Asked], lm: LM) -> Mapping[str, Asked]:
        """A continuation is compared with as many tokens of the document as the model may write."""
        n, tokenizer = self.max_verbatim_tokens, lm.tokenizer

        def cut(text: str) -> str:
            ids = encode_answer(tokenizer, text, after_space=True)
            return text if len(ids) <= n else str(tokenizer.decode(ids[:n], skip_special_tokens=True)).strip()

        asked = sets["verbatim"]
        probes = tuple(
            e.model_copy(update={"answers": tuple(map(cut, e.answers))}) for e in asked.examples if isinstance(e, Probe)
        )
        return {**sets, "verbatim": replace(asked, examples=probes)}

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            *self.leaks,
            ExtractionStrength(),
            MembershipAUC(on="members", k=self.k),
            PrivLeak(on="members", k=self.k),
            self.keeps,
            Gibberish(on="questions", sets=("forget_questions", "retain_questions")),
        )

    @property
    def leaks(self) -> tuple[Metric, ...]:
        """VerbMem and KnowMem."""
        return tuple(Rouge(on=name, measure="f1") for name in ("verbatim", "forget_questions"))

    @property
    def keeps(self) -> Metric:
        return Rouge(on="retain_questions", measure="f1")

    @property
    def lines(self) -> tuple[Line, ...]:
        return _LINES

    @cached_property
    def request(self) -> Scope:
        retain = [row.passage() for row in self._rows("raw/retain1")]
        return Scope.of(
            self.name, forget=self.sets["forget"].examples, retain=retain,
            in_easy=self.sets["forget_questions"].examples, out_near=self.sets["retain_questions"].examples,
        )  # fmt: skip

    def _rows(self, table: str) -> list[Row]:
        return read_table(self.data, table)[: self.n_items]

    def _questions(self, split: str) -> Asked:
        shots = read_table(self.data, f"knowmem/{split}_icl")[: self.n_shots] if self.n_shots != 0 else []
        before = "".join(f"Question: {r.text('question')}\nAnswer: {r.text('answer')}\n\n" for r in shots)
        probes = tuple(_question(row, before) for row in self._rows(f"knowmem/{split}"))
        return Asked(probes, self.max_new_tokens, stop=STOP)


def _question(row: Row, before: str) -> Probe:
    return row.probe(prompt=f"{before}Question: {row.text('question')}\nAnswer:", answers=row.text("answer"))


def _continued(row: Row) -> Probe:
    return row.probe(prompt=row.text("prompt"), answers=row.text("gt"))


_LINES = (
    Line.of("Forgotten", "continues a document as it goes on (VerbMem)", "verbatim/rouge", "low", "VerbMem"),
    Line.of("Forgotten", "answers questions about it (KnowMem)", "forget_questions/rouge", "low", "KnowMem"),
    Line.of("Forgotten", "share of a document it says by itself", "forget/extraction_strength", "low", "extraction"),
    Line.of("Privacy", "tells what it was trained on (AUC)", "members/membership_auc", "as retrained", kind="number"),
    Line.of("Privacy", "leakage beside the retrained model, %", "members/priv_leak", "0", "PrivLeak", "number"),
    Line.of("Kept", "answers questions about the rest (KnowMem)", "retain_questions/rouge", "as before", "kept"),
    Line.of("Side effects", "gibberish answers", "questions/gibberish", "as before"),
)  # fmt: skip
