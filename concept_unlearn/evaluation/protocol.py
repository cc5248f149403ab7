"""Evaluation protocols as rows: the attacks that a survey asks for, and how patches are made equal before.

``attacks: survey`` and ``calibration: uwc`` in a run's config stand for these.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnknownName

_RELEARNED = 8
"""Passages an optimiser step of relearning."""

ATTACKS: dict[str, dict[str, dict[str, Any]]] = {
    # Rethinking Machine Unlearning for LLMs, arXiv 2402.08787; the sizes of relearning, one epoch each, are ours
    "survey": {
        **{
            f"relearn_{k}": {"kind": "relearn", "k": k, "batch_size": _RELEARNED, "steps": -(-k // _RELEARNED)}
            for k in (8, 32, 128)
        },
        "jailbreak": {"kind": "jailbreak_prefix"},
        "prefill": {"kind": "prefill"},
        "int8": {"kind": "quantise", "bits": 8},
        "int4": {"kind": "quantise", "bits": 4},
        "soft_prompt": {"kind": "soft_prompt"},
        "patch_off": {"kind": "switch_off"},
    },
}
CALIBRATION: dict[str, dict[str, Any]] = {
    # Unlearning with Control, arXiv 2406.09179: tau 0.95 of extraction strength on what is kept; the grid is ours
    "uwc": {"keep": 0.95, "metric": "extraction_strength", "grid": 21, "tolerance": 0.005},
}


def attacks_of(name: str) -> dict[str, dict[str, Any]]:
    """Specs of attacks, by name. Raises UnknownName."""
    return _row("protocol of attacks", name, ATTACKS)


def calibration_of(name: str) -> dict[str, Any]:
    """The fields of a calibration; its metric is that of whatever set the benchmark keeps. Raises UnknownName."""
    return _row("calibration", name, CALIBRATION)


def _row(what: str, name: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in rows:
        raise UnknownName(what, name, rows)
    return dict(rows[name])
