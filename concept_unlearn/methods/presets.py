"""Published recipes as rows over the axes of ``Suppress``. Absolute values are those of the papers' models."""

from __future__ import annotations

from typing import Any

from ..errors import UnknownName
from .suppress import Suppress

PRESETS: dict[str, dict[str, Any]] = {
    # Farrell et al. 2024, arXiv 2410.19278: Gemma 2 2B, n 10 or 20, -20 to -30
    "farrell": {
        "score": {"kind": "sparsity", "max_retain_rate": 0.01},
        "n": 20,
        "edit": {"kind": "clamp", "to": -20.0},
    },
    # the same where a residual norm is not known to be about 90
    "farrell_relative": {
        "score": {"kind": "sparsity", "max_retain_rate": 0.01},
        "n": 20,
        "edit": {"kind": "clamp", "to": {"of_norm": -0.5}},
    },
    # SAEBench's unlearning task: n in {10, 20}, multipliers in {25, 50, 100, 200}
    "saebench": {
        "score": {"kind": "sparsity", "max_retain_rate": 0.01},
        "n": 10,
        "edit": {"kind": "clamp", "to": -100.0},
    },
    # Khoriaty et al. 2025, arXiv 2503.11127
    "clamp_prime": {
        "score": {"kind": "sparsity", "max_retain_rate": 0.01},
        "n": 5,
        "edit": {"kind": "clamp", "to": -300.0},
    },
    "refusal_clamp": {
        "score": {"kind": "sparsity", "max_retain_rate": 0.01},
        "n": 10,
        "edit": {"kind": "refuse", "above": 0.05},
    },
    # Dynamic SAE Guardrails, arXiv 2504.08192
    "dsg": {
        "score": {"kind": "fisher"},
        "n": 20,
        "edit": {"kind": "dense_clamp", "to": -500.0},
        "gate": {"kind": "sequence", "alpha": 0.05},
    },
    # CRISP's selection, arXiv 2508.13650, with a negative multiple in place of its finetuning
    "crisp_selection": {"score": {"kind": "count"}, "n": 20, "edit": {"kind": "scale", "by": -6.0}},
    # SAeUron, arXiv 2501.18052
    "saeuron": {"score": {"kind": "mean_difference"}, "n": 10, "edit": {"kind": "scale", "by": -6.0}},
}


def preset(name: str, *dictionaries: str) -> Suppress:
    """``preset("dsg", "smollm2/blocks.7.hook_resid_post")``. Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return Suppress.parse({"kind": "suppress", "dictionaries": dictionaries, **PRESETS[name]})
