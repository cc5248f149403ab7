"""TOFU: fictitious authors to forget, the others, real authors and world facts to keep (arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...data.examples import Passage, Probe, normalise
from ...data.scope import Scope
from ...data.tables import Row, Source, read_rows, read_table
from ...errors import EmptyData, InvalidConfig, InvalidData, UnknownName
from ..benchmark import Benchmark, Line
from ..metric import Metric
from ..metrics import (
    ExactMemorisation,
    ExtractionStrength,
    ForgetQuality,
    Gibberish,
    MembershipAUC,
    PrivLeak,
    Probability,
    Rouge,
    TokenEntropy,
    TruthRatio,
    reworded,
    tofu_utility,
    wordings_of,
)
from ..metrics.peer import Compat
from ..view import Asked

_OTHERS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
SETS = ("forget", *_OTHERS, "holdout")
_AUTHORS, _EACH = 200, 20
"""The last so many in a hundred of the authors are to be forgotten, with this many questions about each."""
_REWORDED = wordings_of("forget")
_OTHER_ATTACKS: tuple[Literal["loss", "zlib", "min_k_plus_plus"], ...] = ("loss", "zlib", "min_k_plus_plus")
"""On membership, beside Min-K."""


class TOFU(Benchmark):
    """Questions put as a user's message. With a retrained model beside: forget quality and privacy leakage.

    A folder holds ``forget10_perturbed.jsonl`` and so on, as the repository of the data set does: question, answer,
    paraphrased_answer, perturbed_answer, paraphrased_question.
    """

    data: Source = "locuslab/TOFU"
    """A folder, or a dataset id of the Hub."""
    forget: str = Field("forget10", pattern=r"^forget\d\d$")
    """The split that is to be forgotten."""
    holdout: str | None = None
    """Questions and answers of the same kind that no model was trained on, if any: a table of ``data`` or a file."""
    rows: Mapping[str, tuple[int, int]] = {}
    """By set the numbers of its first row, from 0, and of the one after its last; all of others. An author has 20."""
    n_items: int | None = Field(None, gt=0)
    """Of each set, the first so many."""
    max_new_tokens: int = Field(200, gt=0)
    compat: Compat | None = None
    """``open-unlearning``: its numbers where its code computes something else than the papers, for old tables."""

    def model_post_init(self, context: Any) -> None:
        for name, (start, stop) in self.rows.items():
            if name not in SETS:
                raise UnknownName("set of TOFU", name, SETS)
            if not 0 <= start < stop:
                raise InvalidConfig(f"rows of {name!r} go from one to a later one; given: {start} to {stop}")

    @property
    def name(self) -> str:
        return f"TOFU {self.forget}"

    @cached_property
    def sets(self) -> Mapping[str, Asked]:
        read = {"forget": f"{self.forget}_perturbed", **_OTHERS}
        found = {name: self._cut(name, read_table(self.data, table)) for name, table in read.items()}
        if self.holdout is not None:
            file = Path(self.holdout).expanduser()
            rows = read_rows(file) if file.is_file() else read_table(self.data, self.holdout)
            found["holdout"] = self._cut("holdout", rows)
        asked = {name: tuple(map(_probe, rows)) for name, rows in found.items()}
        _check_apart(asked)
        sets = {name: Asked(probes, self.max_new_tokens) for name, probes in asked.items()}
        return {**sets, _REWORDED: reworded(sets["forget"])}

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        compat = self.compat
        utility = tofu_utility(compat=compat)
        found: list[Metric] = [
            *(ExtractionStrength(on=name, compat=compat) for name in ("forget", _REWORDED, "retain")),
            ExactMemorisation(compat=compat),
            Probability(),
            Rouge(measure="recall"),
            TruthRatio(compat=compat),
            ForgetQuality(),
            *(Gibberish(on=name, sets=(name,)) for name in ("forget", "retain")),
            *(TokenEntropy(on=name) for name in ("forget", "retain")),
            *utility.terms,
            utility,
        ]
        if self.holdout is not None:
            found += [MembershipAUC(compat=compat), PrivLeak(compat=compat)]
            found += [MembershipAUC(attack=a, label=f"{a}_auc", compat=compat) for a in _OTHER_ATTACKS]
        return tuple(found)

    @property
    def leaks(self) -> tuple[Metric, ...]:
        return ExtractionStrength(compat=self.compat), Rouge(measure="recall"), Probability()

    @property
    def keeps(self) -> Metric:
        """Extraction strength on what is kept, as UWC (2406.09179) calibrates."""
        return ExtractionStrength(on="retain", compat=self.compat)

    @property
    def lines(self) -> tuple[Line, ...]:
        return _LINES

    @cached_property
    def request(self) -> Scope:
        """Passages to forget have the attribute ``author``, the number among the 200 of the data set."""
        probes = {name: asked.examples for name, asked in self.sets.items()}
        forget, retain = ([_passage(p) for p in probes[name] if isinstance(p, Probe)] for name in ("forget", "retain"))
        first = (_AUTHORS - _AUTHORS * int(self.forget.removeprefix("forget")) // 100) * _EACH
        first += self.rows.get("forget", (0, 0))[0]
        forget = [_by(passage, (first + i) // _EACH) for i, passage in enumerate(forget)]
        return Scope.of(
            self.name, forget=forget, retain=retain, in_easy=probes["forget"], in_hard=probes[_REWORDED],
            out_near=probes["retain"], out_far=(*probes["real_authors"], *probes["world_facts"]),
        )  # fmt: skip

    def _cut(self, name: str, rows: list[Row]) -> list[Row]:
        start, stop = self.rows.get(name, (0, len(rows)))
        if stop > len(rows):
            raise EmptyData(f"set {name!r} of {self.data} has {len(rows)} rows; asked for are those up to {stop}")
        return rows[start:stop][: self.n_items]


def _probe(row: Row) -> Probe:
    """Real authors and world facts have no paraphrases; a holdout has no wrong answers either."""
    answer = row.text("answer")
    wrong = row.texts("perturbed_answer") if "perturbed_answer" in row.fields else ()
    if answer in wrong:
        raise InvalidData(f"{row.where}: {answer!r} is both an answer and a distractor")
    return row.probe(
        prompt=row.text("question"), answers=answer, distractors=wrong, chat=True,
        paraphrases=row.text("paraphrased_answer") if "paraphrased_answer" in row.fields else (),
        wordings=row.text("paraphrased_question") if "paraphrased_question" in row.fields else (),
    )  # fmt: skip


def _passage(probe: Probe) -> Passage:
    return Passage(text=probe.answers[0], prompt=probe.prompt)


def _by(passage: Passage, author: int) -> Passage:
    return passage.model_copy(update={"attributes": (("author", str(author)),)})


def _check_apart(asked: Mapping[str, tuple[Probe, ...]]) -> None:
    """What was trained on is no holdout."""
    trained = {normalise(p.prompt): name for name in ("forget", "retain") for p in asked[name]}
    for probe in asked.get("holdout", ()):
        if name := trained.get(normalise(probe.prompt)):
            raise InvalidData(f"{probe.prompt!r} is in the holdout and in {name!r}: a holdout was never trained on")


_LINES = (
    Line.of("Forgotten", "share of answers to forget that it says", "forget/extraction_strength", "low", "extraction"),
    Line.of("Forgotten", "… to a reworded question", f"{_REWORDED}/extraction_strength", "low"),
    Line.of("Forgotten", "words of answers to forget that it writes", "forget/rouge", "low", "ROUGE"),
    Line.of("Forgotten", "how likely it finds the answer", "forget/probability", "low", "probability"),
    Line.of("Forgotten", "tokens of the answer it would choose", "forget/exact_memorisation", "low"),
    Line.of("Forgotten", "wrong answers as likely as right ones", "forget/truth_ratio", "high", kind="number"),
    Line.of("Forgotten", "as if retrained (p of forget quality)", "forget/forget_quality", "high", "quality", "number"),
    Line.of("Privacy", "tells what it was trained on (AUC)", "forget/membership_auc", "as retrained", kind="number"),
    Line.of("Privacy", "leakage beside the retrained model, %", "forget/priv_leak", "0", "PrivLeak", "number"),
    Line.of("Kept", "model utility (harmonic mean of nine)", "retain/model_utility", "as before", "utility"),
    Line.of("Kept", "share of retained answers that it says", "retain/extraction_strength", "as before", "kept"),
    Line.of("Kept", "words of retained answers that it writes", "retain/rouge", "as before"),
    Line.of("Kept", "… real authors", "real_authors/rouge", "as before"),
    Line.of("Kept", "… world facts", "world_facts/rouge", "as before"),
    Line.of("Side effects", "gibberish answers, authors to forget", "forget/gibberish", "as before", "gibberish"),
    Line.of("Side effects", "gibberish answers, other authors", "retain/gibberish", "as before"),
)  # fmt: skip
