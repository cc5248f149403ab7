"""What suppressing one feature, and no other, does to what the model knows: plain data."""

from __future__ import annotations

from typing import Any

from ...component import Frozen


class Change(Frozen):
    """Of questions on one side: those of the concept, or those of what is kept."""

    questions: int
    touched: int
    """On how many the edit changed anything; of the others nothing can change."""
    logprob: float
    """Mean change of the log-probability of a right answer, in nats: below 0 where it became less likely."""
    error: float
    """Standard error of that mean."""
    before: float | None
    """Share of questions whose right answer the model finds likelier than all wrong ones; None where none has any."""
    after: float | None


class Effect(Frozen):
    """Of one feature."""

    edit: dict[str, Any]
    """How it was suppressed, as the spec of an edit."""
    forget: Change
    retain: Change
