"""Probability, conditional probability, truth ratio, exact memorisation and extraction strength."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from evaluation.metrics.planted import passage, predicted, scored, seen, tokens, value, view

from concept_unlearn.data.examples import Probe
from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.evaluation.metric import Metric
from concept_unlearn.evaluation.metrics import (
    ConditionalProbability,
    ExactMemorisation,
    ExtractionStrength,
    Probability,
    TruthRatio,
    truth_ratios,
)
from concept_unlearn.evaluation.view import View

PEER = "open-unlearning"
NOTHING = tokens()
FIXTURE = scored(tokens(0.5), [tokens(0.2), tokens(3.0), tokens(3.0)])
SENSES = ("closer_to_1_better", "true_better", "prob_mean", "closer_look_forget")


def draw(seed: int) -> tuple:
    """A random probe: one or two answers, three distractors."""
    generator = random.Random(seed)
    some = lambda: tokens(*(generator.expovariate(0.5) for _ in range(generator.randint(1, 6))))  # noqa: E731
    return scored(some(), [some() for _ in range(3)])


def test_probability_of_a_perfect_model_is_1():
    assert value(Probability(), scored(tokens(0.0, 0.0, n_end=1))) == 1


def test_probability_is_the_geometric_mean_over_tokens_with_the_end_token():
    assert value(Probability(), scored(tokens(0.5))) == pytest.approx(0.606531, abs=5e-7)
    assert value(Probability(), scored(tokens(0.25, 0.5, 0.75, n_end=1))) == pytest.approx(math.exp(-0.5))


def test_several_answers_are_averaged_over_within_an_item():
    found = Probability()(view(scored([tokens(0.0), tokens(math.log(2))]), scored(tokens(math.log(4)))))
    assert found.values == pytest.approx((0.75, 0.25))
    assert found.value == pytest.approx(0.5)


@pytest.mark.parametrize("metric", [Probability(), ExactMemorisation(), ExtractionStrength()])
def test_an_answer_without_a_token_is_undefined_and_left_out(metric):
    found = metric(view(scored(NOTHING), scored(tokens(0.0, hits="1"))))
    assert found.values == (None, 1.0)
    assert (found.value, found.n, found.n_total) == (1.0, 1, 2)


@pytest.mark.parametrize("metric", [Probability(), ConditionalProbability(), TruthRatio(), ExtractionStrength()])
def test_where_nothing_is_defined_so_is_the_metric(metric):
    assert value(metric, scored(NOTHING, NOTHING)) is None


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("length_norm", [True, False])
def test_conditional_probability_of_equals_is_their_share(m, length_norm):
    metric = ConditionalProbability(length_norm=length_norm)
    assert value(metric, scored(tokens(1.5, 0.5), [tokens(0.7, 1.3)] * m)) == pytest.approx(1 / (m + 1))


def test_conditional_probability_golden():
    assert value(ConditionalProbability(), FIXTURE) == pytest.approx(0.397768, abs=5e-7)


def test_conditional_probability_by_sequence_prefers_short_answers():
    item = scored(tokens(1.0, 1.0), tokens(1.0))
    assert value(ConditionalProbability(), item) == pytest.approx(0.5)
    assert value(ConditionalProbability(length_norm=False), item) == pytest.approx(1 / (1 + math.e))


def test_conditional_probability_does_not_underflow():
    assert value(ConditionalProbability(), scored(tokens(5000.0), [tokens(5000.0)])) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", [ConditionalProbability(), TruthRatio()])
def test_without_a_distractor_nothing_is_compared(metric):
    found = metric(view(scored(tokens(0.5)), FIXTURE))
    assert found.values[0] is None
    assert (found.n, found.n_total) == (1, 2)


def test_truth_ratio_goldens():
    assert truth_ratios(seen([FIXTURE])) == pytest.approx([0.208740], abs=5e-7)
    assert truth_ratios(seen([FIXTURE]), "arithmetic") == pytest.approx([0.504676], abs=5e-7)
    assert value(TruthRatio(aggregate="true_better"), FIXTURE) == pytest.approx(0.791260, abs=5e-7)
    assert value(TruthRatio(aggregate="prob_mean"), FIXTURE) == pytest.approx(0.827308, abs=5e-7)
    assert value(TruthRatio(aggregate="prob_mean", mean="arithmetic"), FIXTURE) == pytest.approx(0.664595, abs=5e-7)


@pytest.mark.parametrize("seed", range(20))
def test_truth_ratio_by_the_definition(seed):
    probe, reads = draw(seed)
    (right,), wrong = reads["answers"], reads["distractors"]
    p = [math.exp(t.mean_logprob) for t in wrong]
    ratios = {
        "geometric": math.prod(p) ** (1 / len(p)) / math.exp(right.mean_logprob),
        "arithmetic": sum(p) / len(p) / math.exp(right.mean_logprob),
    }
    for mean, ratio in ratios.items():
        assert truth_ratios(seen([(probe, reads)]), mean) == pytest.approx([ratio])
        near = min(ratio, 1 / ratio)
        wanted = dict(zip(SENSES, (near, max(0, 1 - ratio), 1 / (1 + ratio), 1 - near), strict=True))
        for aggregate, expected in wanted.items():
            found = TruthRatio(mean=mean, aggregate=aggregate)(view((probe, reads)))
            assert found.value == pytest.approx(expected, abs=1e-12)
            assert found.notes == {"mean": mean, "aggregate": aggregate}


def test_swapping_right_and_wrong_inverts_the_geometric_truth_ratio():
    (a,), (b,) = (
        truth_ratios(seen([scored(*pair)])) for pair in itertools.permutations((tokens(0.5), tokens(2.0, 1.0)))
    )
    assert a * b == pytest.approx(1)


@pytest.mark.parametrize(("aggregate", "wanted"), [*zip(SENSES, (1, 0, 0.5, 0), strict=True)])
@pytest.mark.parametrize("compat", [None, PEER])
def test_where_right_and_wrong_are_equally_likely(aggregate, wanted, compat):
    item = scored(tokens(0.7), [tokens(0.7), tokens(0.7)])
    assert value(TruthRatio(aggregate=aggregate, compat=compat), item) == pytest.approx(wanted, abs=1e-9)


def test_a_paraphrase_of_the_answer_is_what_distractors_are_compared_with():
    paraphrased = scored(tokens(9.0), tokens(1.0), tokens(0.5))
    plain = scored(tokens(0.5), tokens(1.0))
    assert truth_ratios(seen([paraphrased, plain])) == pytest.approx([math.exp(-0.5)] * 2)


def test_truth_ratios_stay_finite_however_unlikely_an_answer_is():
    items = [scored(tokens(5000.0), tokens(0.0)), scored(tokens(0.0), tokens(5000.0))]
    assert truth_ratios(seen(items)) == pytest.approx([math.exp(700), math.exp(-700)])
    for aggregate in SENSES:
        assert 0 <= value(TruthRatio(aggregate=aggregate), *items) <= 1


def test_a_paraphrase_among_the_distractors_is_refused():
    with pytest.raises(ValueError, match="both a paraphrase"):
        Probe(prompt="q", answers=("a",), paraphrases=("it is a",), distractors=("It is a.",))


def test_values_stay_with_their_probes_around_an_undefined_one_unless_a_peer_is_copied():
    items = [scored(tokens(n), tokens(1.0)) if n else scored(tokens(1.0)) for n in (1.5, 0, 2.0)]
    ours, peers = (TruthRatio(compat=compat)(view(*items)) for compat in (None, PEER))
    assert ours.values == (pytest.approx(math.exp(-0.5)), None, pytest.approx(math.exp(-1)))
    assert peers.values == (pytest.approx(math.exp(-0.5)), pytest.approx(math.exp(-1)), None)
    assert ours.value == pytest.approx(peers.value)


def test_a_peer_adds_a_constant_to_denominators():
    item = scored(tokens(30.0), tokens(30.0))
    assert value(TruthRatio(), item) == pytest.approx(1)
    ratio = math.exp(-30) / (math.exp(-30) + 1e-10)
    assert value(TruthRatio(compat=PEER), item) == pytest.approx(ratio)


MEMORISED = [
    ((1, 2, 3, 4), (1, 2, 3, 4), 1.0, 1.0, 1.0),
    ((1, 2, 3, 9), (1, 2, 3, 4), 0.75, 0.0, 0.25),
    ((0,) * 7, (1, 2, 3, 4, 5, 6, 7), 0.0, 0.0, 1 / 7),
    ((9, 2, 3, 4), (1, 2, 3, 4), 0.75, 0.75, 0.75),
    ((9, 9, 9, 4), (1, 2, 3, 4), 0.25, 0.25, 0.25),
]


@pytest.mark.parametrize(("said", "labels", "em", "es", "peer"), MEMORISED)
def test_memorisation_goldens(said, labels, em, es, peer):
    item = scored(predicted(said, labels))
    assert value(ExactMemorisation(), item) == em
    assert value(ExtractionStrength(), item) == es
    assert value(ExtractionStrength(floor="peer"), item) == pytest.approx(peer)


@pytest.mark.parametrize("n", range(1, 9))
def test_extraction_strength_by_its_definition(n):
    for hits in itertools.product((False, True), repeat=n):
        k = next(k for k in range(n + 1) if all(hits[k:]))
        item = scored(tokens(*[1.0] * n, hits="".join(str(int(h)) for h in hits)))
        assert value(ExtractionStrength(), item) == pytest.approx(1 - k / n)
        peer = next((k for k in range(n) if all(hits[k:])), n - 1)
        assert value(ExtractionStrength(floor="peer"), item) == pytest.approx(1 - peer / n)
        assert value(ExtractionStrength(), item) <= value(ExactMemorisation(), item)


@pytest.mark.parametrize("metric", [ExactMemorisation, ExtractionStrength])
def test_only_an_end_token_is_dropped_unless_a_peer_is_copied(metric):
    with_end = scored(predicted((1, 2, 9), (1, 2, 3), n_end=1))
    text = passage("a b c", predicted((1, 2, 9), (1, 2, 3)))
    assert value(metric(), with_end) == 1
    assert value(metric(), text) < 1
    for peer in (metric(end="peer"), metric(compat=PEER)):
        assert value(peer, with_end) == value(peer, text) == 1


def test_a_peer_counts_an_empty_answer_as_never_extracted():
    one = scored(predicted((1,), (1,)))
    assert value(ExtractionStrength(compat=PEER), one) == 0
    assert value(ExtractionStrength(end="peer"), one) is None
    assert value(ExactMemorisation(compat=PEER), one) is None


def test_a_peers_extraction_strength_is_never_below_one_token():
    item = scored(predicted((9, 9, 9, 9), (1, 2, 3, 4), n_end=1))
    assert value(ExtractionStrength(), item) == 0
    assert value(ExtractionStrength(compat=PEER), item) == pytest.approx(1 / 3)


def test_what_was_not_observed_is_a_clear_error():
    blind = View.of_replies("api", {"forget": view(FIXTURE)["forget"].asked}, {"forget": ["no idea"]})
    for metric in (Probability(), TruthRatio(), ExtractionStrength()):
        with pytest.raises(InvalidData, match="log-probabilities"):
            metric(blind)


def test_an_unknown_variant_is_refused():
    with pytest.raises(InvalidConfig, match="geometric"):
        Metric.parse({"kind": "truth_ratio", "mean": "harmonic"})
