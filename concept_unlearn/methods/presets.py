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

_CLOSER_LOOK: dict[str, Any] = {"lr": 1e-5, "epochs": 5.0, "batch_size": 32, "warm_up": 1.0, "weight_decay": 0.01}

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
    "me_gd": ([{"kind": "me", "weight": 0.1}, {"kind": "retain_nll"}], _CLOSER_LOOK),
    "me_gd_continual": ([{"kind": "me", "weight": 1.0}, {"kind": "retain_nll"}], _CLOSER_LOOK),
    "me_gd_real_world": ([{"kind": "me", "weight": 0.5}, {"kind": "retain_nll"}], {**_CLOSER_LOOK, "lr": 5e-6}),
    "idk_ap": ([{"kind": "idk"}, {"kind": "answer_preservation"}], _CLOSER_LOOK),
    # WAGLE, arXiv 2410.17509: TOFU's ratios are 0.8 and 0.95, WMDP's 0.4 and 0.6
    "wagle": ([{"kind": "ga"}, {"kind": "retain_nll"}], {"mask": {"score": {"kind": "wagle"}, "ratio": 0.8}}),
    "wagle_npo": ([{"kind": "npo"}, {"kind": "retain_nll"}], {"mask": {"score": {"kind": "wagle"}, "ratio": 0.8}}),
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

_GUARDS: dict[str, dict[str, Any]] = {
    # Black-box Adversarial Reprogramming turned to unlearning, arXiv 2007.08714
    "bar": {"kind": "black_box"},
    # embedding-corrupted prompts, arXiv 2406.07933
    "eco": {"kind": "corrupt"},
}

_FEATURES: dict[str, dict[str, Any]] = {
    # CRISP, arXiv 2508.13650: b 0.99 and g 0.01 of its code as multiples of 1 - b
    "crisp": {
        "kind": "crisp",
        "score": {"kind": "count"},
        "n": 10,
        "beta": 99.0,
        "gamma": 1.0,
        "adapter": {"r": 4, "lora_alpha": 8},
        "lr": 1e-5,
        "epochs": 1.0,
        "batch_size": 1,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    **_FEATURES,
    **{name: {"kind": "suppress", **row} for name, row in _SUPPRESSION.items()},
    **{name: {"kind": "finetune", "objectives": o, **rest} for name, (o, rest) in _FORGETTING.items()},
    **_GUARDS,
}
"""Specs of methods: those that edit features still need their dictionaries."""
