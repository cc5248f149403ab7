"""Unlearn by taking a concept's codes away from a codebook (CodeUnlearn, arXiv 2410.10866). No gradient."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..dictionaries.codebook import Codebook
from ..errors import EmptyData, InvalidConfig
from ..features import EnrichmentScore, Score, select
from ..gates import Always, Gate
from ..lm import Site
from ..patches import CodebookPatch
from ..patches.codebook import CodeSlice
from .base import Method, Study


class Ban(Method):
    """Measure, find the codes that the concept chooses far more often than other text does, ban them."""

    codebook: str
    """A name as ``load_dictionary`` takes it."""
    score: Score = EnrichmentScore()
    n: int | None = Field(None, gt=0)
    """How many codes, the best first; none: all that pass."""
    mode: Literal["refill", "zero", "prune"] = "refill"
    error: Literal["drop", "keep"] = "drop"
    """See ``CodebookPatch``."""
    gate: Gate = Always()

    def fit(self, study: Study) -> CodebookPatch:
        codebook = study.dictionary(self.codebook)
        if not isinstance(codebook, Codebook):
            raise InvalidConfig(f"{self.codebook} has no codes to ban: it is no codebook; use suppress")
        stats = study.stats(self.codebook)
        passing = int(self.score(stats).isfinite().sum())
        if not passing:
            raise EmptyData(
                f"no code of {self.codebook} is the concept's by {self.score.kind}: of {codebook.n_features} codes "
                f"{int((stats.forget.count > 0).sum())} are chosen on the {stats.forget.n_sequences} forget passages; "
                f"give more passages, or loosen {', '.join(type(self.score).model_fields) or 'the choice of score'}"
            )
        banned = select(stats, self.score, self.n or passing)
        gate, sensor = study.gate(self.gate, CodeSlice(codebook, banned))
        return CodebookPatch(
            codebook=codebook, banned=banned, mode=self.mode, error=self.error, gate=gate, sensor=sensor
        )

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        return (self.codebook,), ()
