"""Hand-made reports: small numbers that can be worked out on paper, and text that looks like markup."""

from __future__ import annotations

import pytest

from concept_unlearn.evaluation.attacks.base import Outcome
from concept_unlearn.evaluation.benchmark import Line
from concept_unlearn.evaluation.cost import Cost
from concept_unlearn.evaluation.measured import Measured, mean_of, undefined
from concept_unlearn.report import Entry, Question, Report

NASTY = "</script><b>[red]a|b[/red]</b> \u2028 Шахматы"

LINES = tuple(
    Line(section=section, label=label, metric=metric, kind=kind, wanted=wanted, column=column)
    for section, label, metric, kind, wanted, column in (
        ("Forgotten", "answers right", "easy/accuracy", "percent", "low", "easy"),
        ("Forgotten", "privacy leak", "easy/leak", "number", "0", "leak"),
        ("Kept", "neighbours right", "near/accuracy", "percent", "as before", "near"),
        ("Kept", "perplexity", "text/perplexity", "factor", "as before", "ppl"),
        ("Kept", "never measured", "far/accuracy", "percent", "as before", "far"),
    )
)


def results(easy, near, nll=2.0, leak=None):
    """Four questions in each set, the first so many right; two passages of three tokens and one."""
    return {
        "easy/accuracy": mean_of([1.0] * easy + [0.0] * (4 - easy)),
        "easy/leak": undefined("no retrained model") if leak is None else Measured(value=leak),
        "near/accuracy": mean_of([1.0] * near + [0.0] * (4 - near)),
        "text/perplexity": mean_of([nll, nll], weights=[3.0, 1.0], scale="exp"),
        "both/accuracy": mean_of([1.0] * 8),
    }


def attacked(**leaks):
    return {name: Outcome(results={"easy/accuracy": Measured(value=value)}) for name, value in leaks.items()}


def make_entry(name="sae", easy=1, near=4, *, nll=2.0, leak=None, **fields):
    said = {s: tuple(f"{name} on {s} {i}" for i in range(4)) for s in ("easy", "near")}
    return Entry(name=name, **({"results": results(easy, near, nll, leak), "said": said} | fields))


def make_report(*entries, **fields):
    questions = {
        s: tuple(Question(prompt=f"{s} question {i}?", answers=(f"answer {i}",), chat=i == 3) for i in range(4))
        for s in ("easy", "near")
    }
    questions["text"] = (Question(prompt="", answers=("a passage",)), Question(prompt="", answers=("another",)))
    told = {
        "model": "tiny", "benchmark": "planted", "digest": "d1", "lines": LINES, "leaks": ("easy/accuracy",),
        "keeps": "near/accuracy", "questions": questions, "base": make_entry("base", easy=4), "entries": entries,
    }  # fmt: skip
    return Report(**(told | fields))


def make_rich():
    """Everything at once, with markup in names and replies, and undefined and infinite values."""
    sae = make_entry(
        "sae", strength=0.5, about=NASTY, curve=((0.25, 1.0), (0.5, 0.99), (1.0, 0.75)), as_made=results(0, 2),
        attacks=attacked(relearn=0.75, quantise=0.25) | {"translate": Outcome(skipped="no translator")},
        cost=Cost(n_bytes=2048, n_parameters=512, latency=1.5, fit_seconds=90.0, access="activations"),
    )  # fmt: skip
    relearnt = {"relearn": Outcome(results={"easy/accuracy": Measured(value=1.0)}, curve=((0, 0.5), (50, 1.0)))}
    seeds = [make_entry("npo", easy=seed, seed=seed, attacks=relearnt) for seed in (1, 2)]
    odd = make_entry(
        NASTY, 2, 3, nll=800.0, leak=float("-inf"), said={"easy": (NASTY,) * 4, "near": ("\x1b[31m", "", "b", "c")}
    )
    return make_report(
        sae, *seeds, odd,
        base=make_entry("base", easy=4, attacks=attacked(relearn=1.0, quantise=1.0)),
        retrained=make_entry("retrained", easy=2, leak=0.0),
        provenance={"config": {"path": NASTY, "seeds": (1, 2), "limit": float("inf")}},
    )  # fmt: skip


@pytest.fixture
def rich_report():
    return make_rich()


@pytest.fixture
def nasty():
    return NASTY


@pytest.fixture
def entry():
    return make_entry


@pytest.fixture
def made():
    return make_report
