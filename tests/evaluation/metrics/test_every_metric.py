"""What holds for every registered metric, on what tiny models make of a few sets."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from conftest import make_hf, make_tokenizer, words
from evaluation.metrics.judges import make_judge

from concept_unlearn.data.examples import Probe
from concept_unlearn.evaluation.benchmark import reads_of
from concept_unlearn.evaluation.metric import Metric
from concept_unlearn.evaluation.metrics import (
    Average,
    ChoiceAccuracy,
    ConditionalProbability,
    ExactMemorisation,
    ExtractionStrength,
    Gibberish,
    MembershipAUC,
    ModelUtility,
    PrivLeak,
    Rouge,
    TruthRatio,
    reworded,
    wordings_of,
)
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.view import Asked, Seen, View
from concept_unlearn.lm import LM

N = 6
PEER = "open-unlearning"
NEEDS_FIELDS = {
    "gibberish": Gibberish(on="all", sets=("forget", "retain")),
    "model_utility": ModelUtility(terms=(Rouge(on="retain"), ConditionalProbability(on="retain"))),
    "average": Average(terms=(Rouge(),), inverted=(TruthRatio(label="tr"),)),
}
VARIANTS = [
    ConditionalProbability(length_norm=False), ExactMemorisation(compat=PEER), ExactMemorisation(end="peer"),
    ExtractionStrength(floor="peer"), ExtractionStrength(compat=PEER), PrivLeak(compat=PEER), Rouge(measure="f1"),
    *(TruthRatio(mean=m, aggregate=a) for m in ("geometric", "arithmetic")
      for a in ("closer_to_1_better", "true_better", "prob_mean", "closer_look_forget")),
    TruthRatio(compat=PEER), ChoiceAccuracy(score="sum"), ChoiceAccuracy(score="letter"),
    *(MembershipAUC(attack=a) for a in ("loss", "zlib", "min_k_plus_plus", "reference", "gradnorm")),
    MembershipAUC(attack="reference", against="original"), MembershipAUC(attack="gradnorm", norm="global"),
    MembershipAUC(compat=PEER), MembershipAUC(k=0.2), Metric.parse({"kind": "consistency", "match": "soft"}),
]  # fmt: skip
EVERY = [*(NEEDS_FIELDS.get(kind) or member() for kind, member in Metric.members.items()), *VARIANTS]


def described(metric: Metric) -> str:
    given = {k: v for k, v in metric if k in type(metric).model_fields and v != type(metric).model_fields[k].default}
    return ",".join([metric.kind, *(f"{k}={v}" for k, v in given.items() if isinstance(v, (str, float)))])


each = pytest.mark.parametrize("metric", EVERY, ids=described)


def ask(start: int) -> Probe:
    right, *wrong = (words(*range(i, i + 3)) for i in range(start, start + 9, 3))
    return Probe(
        prompt=words(start, 40), answers=(right,), distractors=tuple(wrong), paraphrases=(words(start, start + 2),),
        wordings=(words(41, start), words(42, start)), chat=start % 2 == 0,
    )  # fmt: skip


def ask_letter(start: int) -> Probe:
    right, *wrong = map(words, range(start, start + 3))
    return Probe(prompt=words(start, 40), answers=(right,), distractors=tuple(wrong), wordings=(words(41), words(42)))


@pytest.fixture(scope="module")
def asked() -> dict[str, Asked]:
    starts = {"forget": 6, "retain": 13, "holdout": 20}
    sets = {name: Asked(tuple(ask(s + i) for i in range(N)), max_new_tokens=5) for name, s in starts.items()}
    sets["letters"] = Asked(tuple(ask_letter(6 + i) for i in range(N)))
    return {**sets, wordings_of("forget"): reworded(sets["forget"])}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("judges")
    return {"encoder": make_judge(folder / "e"), "nli": make_judge(folder / "n", labels=("neutral", "entailment"))}


def fitted(metric: Metric, judges: dict[str, str]) -> Metric:
    """With judges of text that are here, and on the set that it can be asked of."""
    given: dict[str, Any] = {k: v for k, v in judges.items() if k in type(metric).model_fields}
    if getattr(metric, "score", None) == "letter":
        given |= {name: "letters" for name in ("on", "retain") if name in type(metric).model_fields}
    return metric.model_copy(update=given)


def look(asked: dict[str, Asked], seed: int, judges: dict[str, str]) -> View:
    lm = LM(make_hf(seed=seed), make_tokenizer(), name=f"tiny{seed}")
    metrics = [fitted(m, judges).model_copy(update={"label": str(i)}) for i, m in enumerate(EVERY)]
    return observe(lm, asked, reads_of(metrics))


@pytest.fixture(scope="module")
def view(asked, judges) -> View:
    now, before, never = (look(asked, seed, judges) for seed in (0, 1, 2))
    return now.beside(original=before, retrained=never)


def shuffled(view: View, seed: int = 0) -> View:
    """The same examples in another order, the other wordings with theirs."""
    order = random.Random(seed).sample(range(N), N)
    orders = dict.fromkeys(view.sets, order) | {wordings_of("forget"): [2 * i + j for i in order for j in (0, 1)]}

    def moved(seen: Seen) -> Seen:
        by = orders[seen.name]
        examples = tuple(seen.examples[i] for i in by)
        return Seen(seen.name, replace(seen.asked, examples=examples), tuple(seen.records[i] for i in by))

    def whole(v: View | None) -> View | None:
        return v and replace(v, sets={name: moved(seen) for name, seen in v.sets.items()})

    return replace(whole(view), original=whole(view.original), retrained=whole(view.retrained))


@each
def test_it_is_a_finite_number_inside_its_interval(metric, view, judges):
    found = fitted(metric, judges)(view)
    assert found.value is not None, found.notes
    assert math.isfinite(found.value)
    assert found.low is None or found.low <= found.value + 1e-9
    assert found.high is None or found.value - 1e-9 <= found.high
    assert all(v is None or math.isfinite(v) for v in found.values)
    assert type(found).model_validate_json(found.model_dump_json()) == found


@each
def test_the_order_of_the_examples_does_not_matter(metric, view, judges):
    metric = fitted(metric, judges)
    assert metric(shuffled(view)).value == pytest.approx(metric(view).value, rel=1e-9, abs=1e-12)


@each
def test_it_survives_a_file(metric):
    assert Metric.parse(json.loads(json.dumps(metric.spec()))) == metric


@each
def test_it_reads_no_more_than_it_says(metric, view, judges):
    metric = fitted(metric, judges)
    reads = {name: {*r, *(("answers",) if "moments" in r else ())} for name, r in metric.reads.items()}

    def only(v: View | None, wanted: bool = True) -> View | None:
        sets = {
            name: replace(v[name], records=tuple({k: r[k] for k in fields if k in r} for r in v[name].records))
            for name, fields in reads.items()
        } if v and wanted else {}  # fmt: skip
        return replace(v, sets=sets, original=None, retrained=None) if v and wanted else None

    bare = replace(
        only(view), original=only(view.original, "original" in metric.beside),
        retrained=only(view.retrained, "retrained" in metric.beside),
    )  # fmt: skip
    assert metric(bare) == metric(view)


@each
def test_without_the_models_it_compares_with_it_is_undefined_and_says_so(metric, view, judges):
    metric = fitted(metric, judges)
    found = metric(replace(view, original=None, retrained=None))
    if metric.beside and getattr(metric, "compat", None) is None:
        assert found.value is None
        assert found.notes["undefined"]
    else:
        assert found.value is not None


@pytest.mark.parametrize("metric", [m for m in EVERY if m.kind in ("forget_quality", "priv_leak")], ids=described)
def test_the_retrained_model_is_ideal_beside_itself(metric, view):
    assert metric(replace(view, retrained=view)).value == (1 if metric.kind == "forget_quality" else 0)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_no_value_depends_on_who_shares_a_batch(batch_size, asked, judges, view):
    lm = LM(make_hf(seed=0), make_tokenizer(), name="tiny0")
    metrics = [m for m in EVERY if not m.beside and m.kind != "gibberish"]
    reads = reads_of([fitted(m, judges).model_copy(update={"label": str(i)}) for i, m in enumerate(metrics)])
    again = observe(lm, asked, reads, batch_size=batch_size)
    for metric in (fitted(m, judges) for m in metrics):
        assert metric(again).value == pytest.approx(metric(view).value, rel=1e-4, abs=1e-5), described(metric)


def test_the_registry_is_the_specification():
    assert set(Metric.members) >= {
        "probability", "conditional_probability", "truth_ratio", "forget_quality", "exact_memorisation",
        "extraction_strength", "perplexity", "choice_accuracy", "rouge", "token_entropy", "cosine_similarity",
        "entailment", "consistency", "repetitive", "membership_auc", "priv_leak", "model_utility", "forget_efficacy",
        "membership_classifier", "embedding_accuracy", "average",
    }  # fmt: skip
