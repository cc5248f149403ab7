"""The package, its requirements and their versions."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from .finding import Finding

_PACKAGE = "concept-unlearn"
_PURPOSE = {
    "demo": "to fetch the embedded model",
    "eval": "for the tasks of lm-eval",
    "quantise": "for the quantise attack",
    "ui": "for the live page",
    "notebooks": "to run the notebooks",
    "dev": "to work on the package",
    "docs": "to build its pages",
}


class Declared(NamedTuple):
    """Bounds of the interpreter, of what is always needed, and of what each extra adds."""

    python: str
    always: list[Requirement]
    extras: dict[str, list[Requirement]]


def installation() -> Iterator[Finding]:
    """The interpreter, the package, and each requirement against its bounds."""
    group = "installation"
    try:
        here = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        yield Finding(
            group=group, name=_PACKAGE, state="broken", found="imported from a folder that was never installed",
            mend="pip install -e .",
        )  # fmt: skip
        return
    wanted, python = declared().python, platform.python_version()
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding(
        group=group, name="python", state="ok" if fits else "broken", found=_against(python, wanted, fits),
        mend="" if fits else f"make an environment with Python {wanted}",
    )  # fmt: skip
    yield Finding(group=group, name=_PACKAGE, state="ok", found=here.version)
    for requirement in declared().always:
        fits = _fits(requirement)
        yield Finding(
            group=group, name=requirement.name, state="ok" if fits else "broken",
            found=_against(_version(requirement), str(requirement.specifier), fits),
            mend="" if fits else _pip(requirement),
        )  # fmt: skip


def imports() -> Iterator[Finding]:
    """Requirements that are installed, fit, and yet cannot be imported."""
    modules = metadata.packages_distributions()
    wanted = [requirement for requirement in declared().always if _version(requirement) is not None]
    failed = []
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        tops = [top for top, owners in modules.items() if name in map(canonicalize_name, owners)]
        for top in sorted(t for t in tops if not t.startswith("_")):
            try:
                with _silence():
                    importlib.import_module(top)
            except Exception as error:  # whatever a package does when it is imported
                said = (str(error).splitlines() or [""])[0]
                found = f"import {top}: {type(error).__name__}: {said}"
                failed.append((requirement, found))
    for requirement, found in failed:
        mend = f"pip install --force-reinstall {str(requirement)!r}"
        yield Finding(group="imports", name=requirement.name, state="broken", found=found, mend=mend)
    if not failed:
        yield Finding(group="imports", name="requirements", state="ok", found=f"all {len(wanted)} can be imported")


def extras() -> Iterator[Finding]:
    """What is optional, and the line that installs what of it is missing."""
    for extra, group in declared().extras.items():
        missing = [requirement for requirement in group if not _fits(requirement)]
        purpose = f", {_PURPOSE[extra]}" if extra in _PURPOSE else ""
        lacks = ", ".join(requirement.name for requirement in missing)
        yield Finding(
            group="extras", name=extra, state="note" if missing else "ok",
            found=(f"without {lacks}" if missing else "there") + purpose,
            mend=f"pip install {' '.join(repr(str(r)) for r in missing)}" if missing else "",
        )  # fmt: skip


def declared(project: Path = Path(__file__).parents[2] / "pyproject.toml") -> Declared:
    """What a checkout's ``pyproject.toml`` asks for, which may be newer than the installation; else the metadata."""
    asked = tomllib.loads(project.read_text()).get("project", {}) if project.is_file() else {}
    if asked.get("name") == _PACKAGE:  # another project's file may lie beside an installed package
        extras = asked["optional-dependencies"]
        return Declared(asked["requires-python"], _here(asked["dependencies"]), {e: _here(extras[e]) for e in extras})
    found = metadata.distribution(_PACKAGE)
    lines, extras = found.requires or (), found.metadata.get_all("Provides-Extra") or ()
    always = _here(lines)
    return Declared(
        found.metadata["Requires-Python"] or "", always,
        {extra: [r for r in _here(lines, extra) if r not in always] for extra in extras},
    )  # fmt: skip


def _here(lines: Iterable[str], extra: str = "") -> list[Requirement]:
    """Of requirements those for this machine, their markers taken off."""
    kept = []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            kept.append(requirement)
    return kept


def _version(requirement: Requirement) -> str | None:
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement) -> bool:
    version = _version(requirement)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _against(version: str | None, wanted: str, fits: bool) -> str:
    if version is None:
        return f"not installed; wanted: {wanted or 'any version'}"
    return version if fits else f"{version}; wanted: {wanted}"


def _pip(requirement: Requirement) -> str:
    return f"pip install {str(requirement)!r}"


@contextmanager
def _silence() -> Iterator[None]:
    """What libraries print, log and warn of while they are imported is no finding."""
    disabled = logging.root.manager.disable
    with (
        Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(disabled)
