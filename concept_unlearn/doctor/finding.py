"""One thing that was looked at."""

from __future__ import annotations

from typing import Literal

from ..component import Frozen

State = Literal["ok", "note", "broken"]


class Finding(Frozen):
    """What was looked at, what was found, and how to mend it."""

    group: str
    name: str
    state: State
    """A note is of something optional that is not there, or that could be better; what is broken is needed."""
    found: str
    mend: str = ""
    """A command or setting; empty where there is nothing to mend."""
