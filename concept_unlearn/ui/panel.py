"""The knobs of a patch on the page: its strength, the thresholds of its gates, its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from nicegui import ui

from ..patches import Explanation, Patch
from ..patches.base import parts
from .knobs import Knobs, gate_of, in_words, is_gated, strength_span, threshold_span
from .marks import named
from .muted import Named, features_of


class Panel:
    """Says how the knobs stand, and calls ``turned`` when one was turned."""

    def __init__(self, patch: Patch, words: Mapping[Named, Sequence[str]], turned: Callable[[], None]) -> None:
        self._patch, self._words, self._tell = patch, words, turned
        self._start = Knobs(strength=patch.strength)
        self._strength: Any = None
        self._above: dict[int, Any] = {}
        self._off: dict[Named, Any] = {}
        self._read: dict[int, Any] = {}
        with ui.element("section").classes("card knobs"):
            self._build()

    def knobs(self) -> Knobs:
        made = {i: getattr(gate_of(part), "above", None) for i, part in enumerate(parts(self._patch))}
        above = {i: float(s.value) for i, s in self._above.items() if float(s.value) != made[i]}
        off = frozenset(name for name, box in self._off.items() if not box.value)
        return Knobs(strength=float(self._strength.value), above=above, off=off)

    def read(self, explanation: Explanation, knobs: Knobs, head: int) -> None:
        """What the gates read in the last prompt, beside their thresholds; which features fire in it.

        ``knobs`` are those that it was read under. The first ``head`` tokens are what every chat begins with.
        """
        fired = {(f.site, f.feature) for moment in explanation.moments[head:] for f in moment.fired}
        for name, box in self._off.items():
            box.classes(**{"add" if name in fired else "remove": "fires"})
        left = knobs.left(self._patch)
        gates = {left[gate.part]: gate for gate in explanation.gates}
        for i, label in self._read.items():
            if (gate := gates.get(i)) is None:
                label.set_text("Not asked: this part is off.")
                continue
            verdict = "open" if gate.opened else "closed"
            if gate.statistic is None or gate.threshold is None:
                label.set_text(f"{verdict}: let through {gate.opened} of {len(explanation.moments)} tokens")
            else:
                label.set_text(f"{verdict}: read {gate.statistic:.3g}, opens above {gate.threshold:.3g}")

    def _build(self) -> None:
        with ui.element("div").classes("line"):
            ui.html("Patch", tag="h2", sanitize=False)
            ui.button("As made", on_click=self._reset).props("flat dense no-caps").classes("small")
        span = strength_span(self._patch)
        self._strength = self._slider("Strength", span.low, span.high, span.step, self._patch.strength)
        ui.label(f"0 is off, {self._patch.strength:g} as made").classes("quiet small")
        several = list(parts(self._patch))
        for i, part in enumerate(several):
            gate = gate_of(part)
            title = f"{part.kind} {i + 1}" if len(several) > 1 else part.kind
            found = threshold_span(gate) if gate is not None else None
            if gate is None or found is None:
                if len(several) > 1:
                    ui.html(title, tag="h3", sanitize=escape)
                ui.label(in_words(part)).classes("quiet gate-words")
            else:
                above = float(getattr(gate, "above"))  # noqa: B009
                prefix = f"{title}: " if len(several) > 1 else ""
                self._above[i] = self._slider(f"{prefix}{gate.kind} gate opens above", *found, above)
            if is_gated(part):
                self._read[i] = ui.label("Ask something to see what the gate reads.").classes("quiet small gate-read")
        self._features(several)

    def _features(self, several: Sequence[Patch]) -> None:
        names = list(dict.fromkeys(name for part in several for name in features_of(part)))
        if not names:
            return
        with ui.element("div").classes("line"):
            ui.html(f"Features ({len(names)})", tag="h3", sanitize=False)
            with ui.element("div").classes("line tight"):
                ui.button("All", on_click=lambda: self._set(True)).props("flat dense no-caps").classes("small")
                ui.button("None", on_click=lambda: self._set(False)).props("flat dense no-caps").classes("small")
        with ui.element("div").classes("features"):
            for site in dict.fromkeys(site for site, _ in names):
                ui.html(site, tag="h4", sanitize=escape).classes("quiet")
                for feature in (feature for at, feature in names if at == site):
                    box = ui.checkbox(named(site, feature, self._words), value=True, on_change=self._changed)
                    self._off[site, feature] = box.props("dense").classes("feature")

    def _slider(self, title: str, low: float, high: float, step: float, value: float) -> Any:
        with ui.element("div").classes("line"):
            ui.label(title)
            told = ui.label(f"{value:.3g}").classes("value")
        slider = ui.slider(min=low, max=high, step=step, value=value, on_change=self._changed)
        slider.props(f'aria-label="{title}"').on_value_change(lambda event: told.set_text(f"{event.value:.3g}"))
        return slider

    def _set(self, value: bool) -> None:
        for box in self._off.values():
            box.set_value(value)

    def _reset(self) -> None:
        self._strength.set_value(self._start.strength)
        several = list(parts(self._patch))
        for i, slider in self._above.items():
            slider.set_value(getattr(gate_of(several[i]), "above"))  # noqa: B009
        self._set(True)

    def _changed(self) -> None:
        self._tell()
