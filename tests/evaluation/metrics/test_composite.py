"""Model utility, forget efficacy, and WAGLE's UE and UT."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from evaluation.metrics.planted import replied, scored, tokens, view

from concept_unlearn.data.examples import Probe
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.evaluation.measured import Measured, mean_of, undefined
from concept_unlearn.evaluation.metric import Metric
from concept_unlearn.evaluation.metrics import (
    AnswerLogprob,
    Average,
    ChoiceAccuracy,
    ForgetEfficacy,
    ModelUtility,
    Probability,
    Rouge,
    closer_look_utility,
    tofu_utility,
    wagle_efficacy,
    wagle_utility,
    wmdp_efficacy,
)
from concept_unlearn.evaluation.metrics.composite import KEPT
from concept_unlearn.evaluation.view import Asked, Seen, View


def planted(**values):
    """Sets of probes with these probabilities, and the term that reads each."""
    sets = {name: [scored(tokens(0.0)) if v is None else _item(v) for v in group] for name, group in values.items()}
    return view(**sets), tuple(Probability(on=name) for name in sets)


def _item(value: float):
    return scored(tokens(-math.log(value))) if value else scored(tokens(5000.0))


class _Fixed:
    """Stands in for a term whose value is given."""

    def __init__(self, name: str, found: Measured):
        self.name, self.on, self.reads, self.beside, self._found = name, "forget", {}, (), found

    def __call__(self, view: View) -> Measured:
        return self._found


def fixed(monkeypatch, cls, *values: float | None):
    """The composite, with parts of these values."""
    parts = [
        _Fixed(f"part{i}", undefined("no such thing") if v is None else mean_of([v])) for i, v in enumerate(values)
    ]
    monkeypatch.setattr(cls, "parts", property(lambda self: tuple(parts)))


@pytest.mark.parametrize(("values", "wanted"), [((0.6,) * 9, 0.6), ((0.5, 0.6, 0.3), 0.428571)])
def test_model_utility_goldens(values, wanted):
    found, terms = planted(**{f"s{i}": [v] for i, v in enumerate(values)})
    assert ModelUtility(terms=terms)(found).value == pytest.approx(wanted, abs=5e-7)


@pytest.mark.parametrize("seed", range(10))
def test_model_utility_is_the_harmonic_mean_and_lies_below_the_arithmetic(seed):
    generator = random.Random(seed)
    groups = {f"s{i}": [generator.uniform(0.05, 1) for _ in range(7)] for i in range(5)}
    found, terms = planted(**groups)
    means = [statistics.mean(group) for group in groups.values()]
    utility = ModelUtility(terms=terms)(found)
    assert utility.value == pytest.approx(statistics.harmonic_mean(means))
    assert utility.value <= min(statistics.mean(means), 5 * min(means))
    assert utility.low < utility.value < utility.high
    assert [utility.notes[t.name] for t in terms] == pytest.approx(means)
    assert utility.n == utility.n_total == 35


def test_a_term_of_0_makes_0_and_is_named():
    found, terms = planted(a=[0.5], b=[0.0, 0.0])
    utility = ModelUtility(terms=terms)(found)
    assert utility.value == 0
    assert utility.notes["zero"] == "b/probability"


def test_a_missing_term_makes_nothing_and_is_named():
    sets = view(a=[_item(0.5)], b=[scored(tokens())], c=[_item(0.0)])
    utility = ModelUtility(terms=tuple(Probability(on=n) for n in "abc"))(sets)
    assert utility.value is None
    assert "b/probability" in utility.notes["undefined"]
    assert utility.notes["a/probability"] == pytest.approx(0.5)


def test_a_negative_term_is_refused():
    sets = view(a=[_item(0.5)])
    with pytest.raises(InvalidConfig, match=r"a/answer_logprob is -0\.69"):
        ModelUtility(terms=(AnswerLogprob(on="a"),))(sets)


def test_a_utility_of_nothing_is_refused():
    for spec in ({"kind": "model_utility", "terms": []}, {"kind": "average"}):
        with pytest.raises(InvalidConfig):
            Metric.parse(spec)


def test_items_that_one_term_leaves_out_still_count_for_another():
    probes = [Probe(prompt="q", answers=("yes",)) for _ in range(2)]
    records = [
        {"answers": (tokens(0.0),), "said": replied("no")[1]["said"]},
        {"answers": (tokens(),), "said": replied("yes")[1]["said"]},
    ]
    sets = View("m", {"retain": Seen("retain", Asked(tuple(probes)), tuple(records))})
    utility = ModelUtility(terms=(Probability(on="retain"), Rouge(on="retain")))(sets)
    assert utility.value == pytest.approx(2 / (1 / 1.0 + 1 / 0.5))


def test_terms_of_one_set_are_resampled_together():
    generator = random.Random(0)
    sets = view(*[_item(generator.uniform(0.1, 1)) for _ in range(20)])
    found = Average(terms=(Probability(),), inverted=(Probability(label="again"),))(sets)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_a_single_term_is_the_terms_own():
    generator = random.Random(0)
    sets = view(*[_item(generator.uniform(0.1, 1)) for _ in range(20)])
    alone, within = Probability()(sets), Average(terms=(Probability(),))(sets)
    assert (within.value, within.low, within.high) == pytest.approx((alone.value, alone.low, alone.high))


def test_a_part_that_is_no_mean_over_items_leaves_no_interval(monkeypatch):
    monkeypatch.setattr(Average, "parts", property(lambda self: (_Fixed("p", Measured(value=0.5)),)))
    found = Average(terms=(Probability(),))(view(_item(0.5)))
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_reads_are_those_of_all_parts():
    assert tofu_utility().reads == {
        "retain": ("answers", "said", "paraphrases", "distractors"),
        "real_authors": ("answers", "distractors", "said", "paraphrases"),
        "world_facts": ("answers", "distractors", "said", "paraphrases"),
    }
    assert closer_look_utility().beside == ("original",)
    assert set(wagle_efficacy().beside) == {"retrained"}


def test_tofus_nine_terms():
    assert [t.name for t in tofu_utility(mean="arithmetic").terms] == [
        "retain/probability", "retain/rouge", "retain/truth_ratio",
        "real_authors/conditional_probability", "real_authors/rouge", "real_authors/truth_ratio",
        "world_facts/conditional_probability", "world_facts/rouge", "world_facts/truth_ratio",
    ]  # fmt: skip
    ratios = [t for t in tofu_utility(mean="arithmetic", compat="open-unlearning").terms if t.kind == "truth_ratio"]
    assert {(t.mean, t.aggregate, t.compat) for t in ratios} == {("arithmetic", "true_better", "open-unlearning")}


def test_closer_looks_eighteen_terms_and_six():
    six = ["rouge", "probability", "truth_ratio", "token_entropy", "cosine_similarity", "entailment"]
    conditional = ["rouge", "conditional_probability", *six[2:]]
    kinds = [t.kind for t in closer_look_utility().terms]
    assert kinds == six + conditional * 2
    real = closer_look_utility(("retain",), premise="reply").terms
    assert [t.kind for t in real] == six
    assert real[-1].premise == "reply"
    assert {t.premise for t in closer_look_utility().terms if t.kind == "entailment"} == {"answer"}


@pytest.mark.parametrize(
    ("values", "wanted"), [((1,) * 5, 0), ((0,) * 5, 1), ((0.5, 0.2, 0.1, 0, 0.2), 0.8), ((1, 1, 1, 1, None), None)]
)
def test_forget_efficacy(monkeypatch, values, wanted):
    fixed(monkeypatch, ForgetEfficacy, *values)
    found = ForgetEfficacy()(view(_item(0.5)))
    assert found.value == (None if wanted is None else pytest.approx(wanted))


def test_forget_efficacy_has_no_entropy_and_reads_truth_ratio_as_its_paper_does():
    parts = ForgetEfficacy(on="forget01", nli="a", encoder="b").parts
    assert [p.kind for p in parts] == ["rouge", "probability", "truth_ratio", "cosine_similarity", "entailment"]
    assert {p.on for p in parts} == {"forget01"}
    assert parts[2].aggregate == "closer_look_forget"
    assert parts[4].premise == "reply"


def test_wagles_efficacy_is_a_mean_of_two_and_of_what_two_leave(monkeypatch):
    metric = wagle_efficacy(paraphrased="forget_wordings")
    assert [m.kind for m in metric.parts] == ["forget_quality", "membership_classifier", "embedding_accuracy", "rouge"]
    assert metric.inverted[0].on == "forget_wordings"
    fixed(monkeypatch, Average, 0.2, 0.6, 0.3, 0.1)
    assert metric(view(_item(0.5))).value == pytest.approx((0.2 + 0.6 + 0.7 + 0.9) / 4)


def test_wagles_utility_is_a_mean_of_six():
    metric = wagle_utility()
    assert [(m.on, m.kind) for m in metric.parts] == [(on, k) for on in KEPT for k in ("embedding_accuracy", "rouge")]
    assert metric.combined([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(0.35)


def test_wmdps_efficacy_is_one_minus_the_mean_accuracy():
    item = lambda right: scored([tokens(right)], [tokens(1.0)])  # noqa: E731
    sets = view(bio=[item(0.5), item(2.0)], cyber=[item(0.5)])
    found = wmdp_efficacy()(sets)
    assert found.value == pytest.approx(1 - (0.5 + 1) / 2)
    assert all(isinstance(p, ChoiceAccuracy) and p.score == "letter" for p in wmdp_efficacy().parts)


@pytest.mark.parametrize(
    "made",
    [
        tofu_utility(),
        closer_look_utility(),
        wagle_efficacy(),
        wagle_utility(),
        wmdp_efficacy(),
        ForgetEfficacy(nli="x"),
    ],
    ids=lambda m: m.name,
)
def test_what_is_ready_made_survives_its_spec_and_has_a_schema(made):
    assert Metric.parse(made.spec()) == made
    assert "terms" not in type(made).model_fields or made.model_json_schema()["properties"]["terms"]["type"] == "array"
