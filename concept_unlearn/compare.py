"""One model, several ways to make it forget, one benchmark: everybody meets the same examples and the same attacks."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .data.encode import encode_text
from .data.examples import Probe
from .data.scope import Scope
from .errors import InvalidConfig
from .evaluation.attacks import Attack, Outcome, attack
from .evaluation.benchmark import Benchmark
from .evaluation.cost import Cost, measure_cost
from .evaluation.meter import Meter
from .evaluation.question import encode_probe
from .evaluation.view import View
from .lm import LM
from .lm.fingerprint import checksum
from .patches import Patch
from .report import Entry, Question, Report
from .tracking import Progress, Tracker, silent

_COST_TEXTS = 2

Unlearned = Patch | LM
"""What is compared: a patch of the model, or a checkpoint that stands for itself."""


def compare(
    lm: LM,
    patches: Mapping[str, Unlearned],
    benchmark: Benchmark,
    *,
    attacks: Sequence[Attack] | Mapping[str, Attack] = (),
    scope: Scope | None = None,
    retrained: LM | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """The unpatched model and every patch, observed on the same examples and attacked alike. The first leads.

    A patch below full strength is also shown as it was made. ``scope`` is where attacks take what was forgotten from,
    the benchmark's own where None; ``retrained`` a model that never saw it, from which every gap is taken. With a
    ``folder`` records are kept as they come, and a comparison that was stopped goes on.
    """

    def tell(title: str, total: int | None) -> Any:
        return contextlib.nullcontext(progress)

    comparison = Comparison(
        lm, benchmark, attacks=attacks, scope=scope, retrained=retrained, tracker=tell,
        folder=None if folder is None else Path(folder),
    )  # fmt: skip
    return comparison.report([comparison.entry(name, patch) for name, patch in patches.items()])


class Comparison:
    """The untouched model is observed once, when it is first needed; ``entry`` observes one way to forget."""

    def __init__(
        self,
        lm: LM,
        benchmark: Benchmark,
        *,
        attacks: Sequence[Attack] | Mapping[str, Attack] = (),
        scope: Scope | None = None,
        retrained: LM | None = None,
        folder: Path | None = None,
        tracker: Tracker = silent,
    ) -> None:
        self.lm, self.benchmark, self.track, self.folder = lm, benchmark, tracker, folder
        self.attacks = dict(attacks) if isinstance(attacks, Mapping) else named(attacks)
        self.scope = scope or benchmark.request
        self._retrained = retrained
        if self.attacks and self.scope is None:
            raise InvalidConfig(f"attacks need scope=: the {benchmark.kind} benchmark has none of its own")

    @cached_property
    def base(self) -> Entry:
        """The untouched model; what attacks get out of it is the ceiling."""
        return self._entry("base", self._base_view, attacked=(self.lm, None))

    @cached_property
    def retrained(self) -> Entry | None:
        return None if self._retrained_view is None else self._entry("retrained", self._retrained_view)

    def entry(
        self,
        name: str,
        patch: Unlearned,
        *,
        about: str = "",
        seed: int | None = None,
        curve: tuple[tuple[float, float], ...] = (),
        fit: Meter | None = None,
    ) -> Entry:
        """One row of a report. ``curve`` is what calibration tried, ``fit`` what making the patch took."""
        own = patch if isinstance(patch, LM) else self.lm
        active = None if isinstance(patch, LM) else patch
        view = self._observed(name, own, active)
        entry = self._entry(name, view, attacked=(own, active))
        changes: dict[str, Any] = {"about": about or _about(patch), "seed": seed, "curve": curve}
        if active is not None:
            changes |= {"strength": active.strength, "cost": self._cost(active, fit)}
            if active.strength != 1:
                made = self._observed(f"{name} as made", own, active.at(1.0))
                changes["as_made"] = self._measured(made)
        return entry.model_copy(update=changes)

    def report(
        self,
        entries: Sequence[Entry],
        provenance: Mapping[str, Any] | None = None,
        missing: Mapping[str, str] | None = None,
    ) -> Report:
        """``missing`` are methods that could not be made, with the reason."""
        benchmark = self.benchmark
        questions = {
            name: tuple(
                Question(prompt=e.prompt, answers=e.answers, chat=e.chat)
                if isinstance(e, Probe)
                else Question(prompt=e.prompt or "", answers=(e.text,))
                for e in seen.examples
            )
            for name, seen in self._base_view.sets.items()
        }
        return Report(
            model=self.lm.name, fingerprint=self.lm.fingerprint, benchmark=benchmark.name, spec=benchmark.spec(),
            digest=benchmark.digest, lines=benchmark.lines, leaks=tuple(m.name for m in benchmark.leaks),
            keeps=benchmark.keeps.name, questions=questions, base=self.base, retrained=self.retrained,
            entries=tuple(entries), missing=dict(missing or {}), provenance=dict(provenance or {}),
        )  # fmt: skip

    @cached_property
    def _base_view(self) -> View:
        return self._observed("the untouched model", self.lm, None)

    @cached_property
    def _retrained_view(self) -> View | None:
        if self._retrained is None:
            return None
        return self._observed("the retrained model", self._retrained, None)

    def _entry(self, name: str, view: View, attacked: tuple[LM, Patch | None] | None = None) -> Entry:
        said = {n: tuple(r.text for r in seen.said) for n, seen in view.sets.items() if seen.holds("said")}
        outcomes = {} if attacked is None else self._attacked(name, *attacked)
        return Entry(name=name, results=self._measured(view), said=said, attacks=outcomes)

    def _measured(self, view: View) -> dict[str, Any]:
        beside = view.beside(original=self._base_view, retrained=self._retrained_view)
        return self.benchmark.measure(beside)

    def _observed(self, name: str, lm: LM, patch: Patch | None) -> View:
        with self.track(f"evaluate {name}", self.benchmark.n_steps()) as progress:
            return self.benchmark.observe(
                lm, patch, judge=self.lm, folder=self._folder(name, lm, patch), progress=progress
            )

    def _attacked(self, name: str, lm: LM, patch: Patch | None) -> dict[str, Outcome]:
        if not self.attacks:
            return {}
        assert self.scope is not None
        folder = None if self.folder is None else self.folder / "attacks"
        with self.track(f"attack {name}", None) as progress:
            return attack(lm, patch, self.benchmark, self.scope, self.attacks, folder=folder, progress=progress)

    def _folder(self, name: str, lm: LM, patch: Patch | None) -> Path | None:
        """Another for everything that decides what is observed."""
        if self.folder is None:
            return None
        models = [checksum(lm.model), str(lm.dtype), None if lm is self.lm else checksum(self.lm.model)]
        what = [*models, None if patch is None else patch.digest, self.benchmark.digest, self.benchmark.spec()]
        key = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:8]
        return self.folder / "records" / f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}-{key}"

    def _cost(self, patch: Patch, fit: Meter | None) -> Cost:
        asked = next(iter(self.benchmark.sets.values())).examples[:_COST_TEXTS]
        texts = [
            encode_probe(self.lm, e).prompt
            if isinstance(e, Probe)
            else encode_text(self.lm.tokenizer, e.text, e.prompt)
            for e in asked
        ]
        cost = measure_cost(self.lm, patch, [ids[: self.lm.context] for ids in texts]).model_copy(
            update={"access": patch.access}
        )
        if fit is None:
            return cost
        return cost.model_copy(
            update={
                "fit_seconds": fit.seconds, "fit_cpu_seconds": fit.cpu_seconds, "peak_mb": fit.peak_mb,
                "forward_tokens": fit.forward_tokens, "backward_tokens": fit.backward_tokens,
            }
        )  # fmt: skip


def named(attacks: Sequence[Attack]) -> dict[str, Attack]:
    """By kind, numbered where there are several of one."""
    found: dict[str, Attack] = {}
    for one in attacks:
        same = sum(other.kind == one.kind for other in found.values())
        found[f"{one.kind} {same + 1}" if same else one.kind] = one
    return found


def _about(patch: Unlearned) -> str:
    return "a checkpoint" if isinstance(patch, LM) else f"a {patch.kind} patch"
