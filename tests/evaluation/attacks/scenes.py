"""A benchmark of any sets, victims of each kind of patch, and all of a model that an attack could leave changed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from conftest import D_MODEL, PLANTED, make_perfect_sae, words
from pydantic import ConfigDict

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.data.scope import Scope
from concept_unlearn.edits import Clamp
from concept_unlearn.evaluation.attacks import Victim
from concept_unlearn.evaluation.benchmark import Benchmark, Line
from concept_unlearn.evaluation.metric import Metric
from concept_unlearn.evaluation.metrics import AnswerLogprob, GeneratedAccuracy
from concept_unlearn.evaluation.view import Asked
from concept_unlearn.gates import Always, Gate
from concept_unlearn.lm import LM
from concept_unlearn.patches import FeaturePatch, Patch, Stack, WeightPatch
from concept_unlearn.weights import Dense

PATCHES = ("none", "feature", "weight", "stack")


class _Asking(Benchmark):
    """Whatever it is given; the headline is how likely the answers are."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: ClassVar[str] = "asking"
    given: Any

    @cached_property
    def sets(self) -> Mapping[str, Asked]:
        return {name: Asked(tuple(examples), 4, max_tokens=32) for name, examples in self.given.items()}

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        return self.leaks

    @property
    def leaks(self) -> tuple[Metric, ...]:
        probes = [name for name, asked in self.sets.items() if isinstance(asked.examples[0], Probe)]
        return *(AnswerLogprob(on=name) for name in probes), *(GeneratedAccuracy(on=name) for name in probes)

    @property
    def keeps(self) -> Metric:
        return self.leaks[0]

    @property
    def lines(self) -> tuple[Line, ...]:
        return ()


def asking(**sets: Any) -> Benchmark:
    return _Asking(given=sets)


def secret(n: int, *, chat: bool = True) -> list[Probe]:
    """Questions of the concept that have the same answer, with a wrong one."""
    return [
        Probe(prompt=words(30 + i % 8, 38 + i // 8), answers=("w20 w21",), distractors=("w22 w23",), chat=chat)
        for i in range(n)
    ]


def secret_scope(n: int, *, asked: bool = True) -> Scope:
    forget = [
        Passage(text=p.answers[0], prompt=p.prompt) if asked else Passage(text=f"{p.prompt} {p.answers[0]}")
        for p in secret(n)
    ]
    retain = [Passage(text=words(*(8 + (3 * i + j) % 11 for j in range(6)))) for i in range(6)]
    return Scope("secret", tuple(forget), retain=tuple(retain))


def patch_of(kind: str, lm: LM, gate: Gate = Always()) -> Patch | None:
    feature = FeaturePatch(
        dictionary=make_perfect_sae("blocks.0.hook_resid_pre"), features=PLANTED, edit=Clamp(to=2.0), gate=gate
    )
    generator = torch.Generator().manual_seed(5)
    name = next(name for name, p in lm.model.named_parameters() if tuple(p.shape) == (D_MODEL, 32))
    weight = WeightPatch({name: Dense(torch.randn(D_MODEL, 32, generator=generator))})
    return {"none": None, "feature": feature, "weight": weight, "stack": Stack((weight, feature))}[kind]


def victim_of(lm: LM, patch: Patch | None = None, *, n: int = 12, **changes: Any) -> Victim:
    return Victim(lm, patch, **{"benchmark": asking(forget=secret(n)), "scope": secret_scope(n)} | changes)


def state(lm: LM) -> dict[str, Any]:
    """Everything of a model that an attack could leave changed."""
    model = lm.model
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "storage": {n: p.data_ptr() for n, p in model.named_parameters()},
        "flags": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "modes": {n: (m.training, type(m)) for n, m in model.named_modules()},
        "attributes": set(vars(model)),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "generator": torch.get_rng_state().tolist(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in before["weights"].items():
        assert torch.equal(tensor, after["weights"][name]), name
    assert {k: v for k, v in before.items() if k != "weights"} == {k: v for k, v in after.items() if k != "weights"}
