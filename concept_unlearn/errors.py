"""Every error a user can meet.

ConceptUnlearnError
├── UnknownName             a name that nothing registered, shipped or built in answers to
├── InvalidConfig           a config or spec with an unknown key or a value of the wrong kind
├── ModelNotFound           no such model in the cache, on disk or on the Hub
├── SiteNotFound            the model has no such place
├── DictionaryMismatch      a dictionary of another width or another model
├── NotExact                a dictionary that cannot be sliced or edited exactly
├── InvalidData             a data file, probe or passage that cannot be used
│   └── EmptyData           nothing to measure, score or train on
├── NonFinite               NaN or infinity where a number was needed
├── Diverged                a training that destroys what it should keep
├── PatchMismatch           a patch made for another base model
├── PatchNotReached         an edit that no longer reaches its site
├── EndpointFailed          a model behind an address that does not answer, or not what was asked
├── CorruptArtifact         a saved file that is truncated, altered or incomplete
└── MissingExtra            an optional package that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConceptUnlearnError(Exception):
    """Base of all errors raised on purpose by this package."""


class UnknownName(ConceptUnlearnError, LookupError):
    """``UnknownName("edit", "zreo", ["zero", "clamp"])`` says what was asked for and what is known."""

    def __init__(self, what: str, given: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        close = difflib.get_close_matches(given, names, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(names) if names else "none"
        super().__init__(f"no {what} named {given!r}; known: {listed}.{guess}{' ' + hint if hint else ''}")


class InvalidConfig(ConceptUnlearnError):
    # Not a ValueError: pydantic would fold it into its own report instead of letting it through.
    ...


class ModelNotFound(ConceptUnlearnError, FileNotFoundError): ...


class SiteNotFound(ConceptUnlearnError, LookupError): ...


class DictionaryMismatch(ConceptUnlearnError, ValueError): ...


class NotExact(ConceptUnlearnError, ValueError): ...


class InvalidData(ConceptUnlearnError, ValueError): ...


class EmptyData(InvalidData): ...


class NonFinite(ConceptUnlearnError, ArithmeticError): ...


class Diverged(ConceptUnlearnError, ArithmeticError): ...


class PatchMismatch(ConceptUnlearnError, ValueError): ...


class PatchNotReached(ConceptUnlearnError, RuntimeError): ...


class EndpointFailed(ConceptUnlearnError, ConnectionError): ...


class CorruptArtifact(ConceptUnlearnError, OSError): ...


class MissingExtra(ConceptUnlearnError, ImportError):
    """``MissingExtra("gguf", "to convert the embedded model")`` names the pip line that installs it."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{package} is needed {purpose}: pip install {package}")
