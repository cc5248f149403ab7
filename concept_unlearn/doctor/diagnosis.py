"""All findings, and whether what is needed is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..component import Frozen
from .finding import Finding
from .installation import extras, imports, installation
from .machine import machine
from .models import models
from .storage import storage


class Diagnosis(Frozen):
    """What was found; ``sound`` where nothing that is needed is broken."""

    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == "broken")

    @property
    def sound(self) -> bool:
        return not self.broken


def diagnose(*, fast: bool = False) -> Diagnosis:
    """``fast`` looks at the versions of packages and leaves out whether each of them can be imported.

    Changes nothing and asks no network.
    """
    rooms: dict[str, Callable[[], Iterable[Finding]]] = {
        "installation": installation,
        **({} if fast else {"imports": imports}),
        "extras": extras,
        "machine": machine,
        "models": models,
        "folders": storage,
    }
    return Diagnosis(findings=tuple(finding for group, look in rooms.items() for finding in _guarded(group, look)))


def _guarded(group: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A room that cannot even be looked at is a finding, and the others are still looked at."""
    try:
        return list(look())
    except Exception as error:  # whatever is broken is what we are here to tell
        said = (str(error).splitlines() or [""])[0]
        return [Finding(group=group, name=group, state="broken", found=f"{type(error).__name__}: {said}")]
