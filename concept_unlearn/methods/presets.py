"""Published recipes as rows: over the axes of ``Suppress``, and over forgetting and retaining objectives.

Absolute values are those of the papers' models; where a recipe sets no learning rate or length, Finetune's own apply.
"""

from __future__ import annotations

from typing import Any

_SUPPRESSION: dict[str, dict[str, Any]] = {
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

_FORGETTING: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    # name: objectives, and what else the recipe sets
    # TOFU's baselines, arXiv 2401.06121
    "grad_ascent": ([{"kind": "ga"}], {}),
    "grad_diff": ([{"kind": "ga"}, {"kind": "retain_nll"}], {}),
    "kl_min": ([{"kind": "ga"}, {"kind": "retain_kl"}], {}),
    "idk": ([{"kind": "idk"}, {"kind": "retain_nll"}], {}),
    "idk_dpo": ([{"kind": "dpo"}, {"kind": "retain_nll"}], {}),
    # NPO, arXiv 2404.05868
    "npo": ([{"kind": "npo"}, {"kind": "retain_nll"}], {}),
    "npo_kl": ([{"kind": "npo"}, {"kind": "retain_kl"}], {}),
    # SimNPO, arXiv 2410.07163
    "sim_npo": ([{"kind": "sim_npo", "weight": 0.125}, {"kind": "retain_nll"}], {}),
    # AltPO, arXiv 2409.13474
    "alt_po": ([{"kind": "dpo", "preferred": "alternate"}, {"kind": "retain_nll"}], {}),
    # A Closer Look at Machine Unlearning, arXiv 2410.08109
    "me_gd": ([{"kind": "me", "weight": 0.1}, {"kind": "retain_nll"}], {}),
    "idk_ap": ([{"kind": "idk"}, {"kind": "answer_preservation"}], {}),
    # Rethinking LLM Unlearning Objectives, arXiv 2502.19301
    "wga": ([{"kind": "wga"}, {"kind": "retain_nll"}], {}),
    "tnpo": ([{"kind": "tnpo"}, {"kind": "retain_nll"}], {}),
    "wtnpo": ([{"kind": "wtnpo"}, {"kind": "retain_nll"}], {}),
    # UNDIAL, arXiv 2402.10052
    "undial": (
        [{"kind": "undial"}],
        {"lr": 1e-4, "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
    ),
    # CE-U, arXiv 2503.01224
    "ceu": ([{"kind": "ceu"}], {}),
    # SatImp, arXiv 2505.11953
    "sat_imp": ([{"kind": "sat_imp"}, {"kind": "retain_nll", "weight": 0.1}], {}),
    # PDU, arXiv 2506.05314
    "pdu": ([{"kind": "margin"}, {"kind": "retain_nll"}], {"balance": {}}),
    # RMU, arXiv 2403.03218
    "rmu": ([{"kind": "rmu"}, {"kind": "retain_embedding"}], {"lr": 5e-5, "max_steps": 80}),
    # Unlearning with Control, arXiv 2406.09179, both versions
    "hinge": ([{"kind": "hinge", "weight": 0.1}, {"kind": "retain_nll", "weight": 0.9}], {}),
    "capped_ga": ([{"kind": "capped_ga"}, {"kind": "retain_nll"}], {}),
    "temperature_ga": ([{"kind": "temperature_ga"}, {"kind": "retain_nll"}], {}),
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"kind": "suppress", **row} for name, row in _SUPPRESSION.items()},
    **{name: {"kind": "finetune", "objectives": o, **rest} for name, (o, rest) in _FORGETTING.items()},
}
"""Specs of methods: those that edit features still need their dictionaries."""
