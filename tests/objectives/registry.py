"""Every objective, in every way it can be set that changes its formula."""

from __future__ import annotations

import pytest

from concept_unlearn.objectives import (
    CEU,
    DPO,
    ME,
    NPO,
    RMU,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    CappedGA,
    Hinge,
    Margin,
    Objective,
    RetainEmbedding,
    RetainKL,
    SatImp,
    SimNPO,
)

NEEDS_MORE = ("lower_features",)
"""Those that are nothing without a dictionary: shown beside it."""
OURS = [
    *(member() for kind, member in Objective.members.items() if kind not in NEEDS_MORE),
    WGA(beta=2), SatImp(beta1=1, beta2=2), Hinge(score="mean", delta=2.8), Hinge(normalise="batch"), CappedGA(keep=0.5),
    NPO(beta=0.5), WTNPO(beta=1, a=0.5), SimNPO(margin=0.5), DPO(preferred="alternate", scale="1"), CEU(skip=2),
    ME(direction="uniform_to_model"), ME(reduction="token_mean"), RMU(where="real", k=3), RMU(where="own"),
    RetainKL(where="content"), RetainEmbedding(where="real"),
]  # fmt: skip
OTHERS = [
    TNPO(compat="paper"), WTNPO(compat="paper"), ME(compat="paper"), SimNPO(compat="open-unlearning", margin=0.5),
    UNDIAL(compat="open-unlearning"), RetainKL(compat="open-unlearning"), Margin(compat="open-unlearning"),
    RMU(compat="open-unlearning"), RetainEmbedding(compat="open-unlearning"),
]  # fmt: skip
EVERY = [*OURS, *OTHERS]
OVER_PADDING = [o for o in OTHERS if o.kind in ("undial", "retain_kl")]
MASKED = [o for o in EVERY if o not in OVER_PADDING]


def named(objective: Objective) -> str:
    fields = {k: v for k, v in objective if v != type(objective)().__dict__[k]}
    return ",".join([objective.kind, *(f"{k}={v}" for k, v in fields.items())])


def each(objectives: list[Objective]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("objective", objectives, ids=named)
