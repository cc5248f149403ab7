"""Several attacks on one patched model, each kept when it is done."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ...activations.processes import Processes
from ...data.scope import PASSAGES, Scope
from ...errors import (
    Diverged,
    InvalidConfig,
    InvalidData,
    MissingExtra,
    NonFinite,
    NotExact,
    SiteNotFound,
)
from ...files import write_atomically
from ...lm import LM
from ...lm.fingerprint import checksum
from ...patches import Patch
from ...tracking import Progress
from ..benchmark import Benchmark
from .base import Attack, Outcome, Victim

CANNOT = (InvalidData, InvalidConfig, MissingExtra, NonFinite, Diverged, NotExact, SiteNotFound)
"""Why an attack cannot be tried on this model or benchmark; other errors are not about the attack."""


def attack(
    lm: LM,
    patch: Patch | None,
    benchmark: Benchmark,
    scope: Scope,
    attacks: Mapping[str, Attack],
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """By name, what leaks under each; ``skipped`` says why one could not be tried.

    Give one folder for all patches: outcomes are found again by everything that decides them, an attack that was
    stopped goes on, and what does not depend on the patch is shared. Skipped ones are tried again.
    """
    here = Processes.here()
    places = {name: _place(folder, name, _key(lm, patch, benchmark, scope, a)) for name, a in attacks.items()}
    done = {name: _read(path) for name, path in places.items()}
    here.wait()  # nobody writes before all have read
    found = {}
    for name, one in attacks.items():
        outcome, path = done[name], places[name]
        if outcome is None:
            work = None if path is None else path.with_suffix("")
            victim = Victim(lm, patch, benchmark, scope, folder=work, shared=folder, progress=progress)
            try:
                outcome = one(victim)
            except CANNOT as error:
                outcome = Outcome(skipped=f"{type(error).__name__}: {error}")
            if path is not None and work is not None:
                here.wait()
                if here.rank == 0 and outcome.skipped is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, outcome.model_dump_json(indent=1).encode())
                    shutil.rmtree(work, ignore_errors=True)
        found[name] = outcome
    return found


def _key(lm: LM, patch: Patch | None, benchmark: Benchmark, scope: Scope, one: Attack) -> str:
    """Of everything that decides an outcome."""
    what = {
        "model": [lm.fingerprint, checksum(lm.model)],
        "dtype": str(lm.dtype),
        "patch": None if patch is None else patch.digest,
        "asked": benchmark.digest,
        "leaks": [leak.spec() for leak in benchmark.leaks],
        "scope": [[p.model_dump(mode="json") for p in getattr(scope, part)] for part in PASSAGES],
        "attack": one.spec(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _place(folder: Path | None, name: str, key: str) -> Path | None:
    return None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}-{key}.json"


def _read(path: Path | None) -> Outcome | None:
    return None if path is None or not path.is_file() else Outcome.model_validate_json(path.read_bytes())
