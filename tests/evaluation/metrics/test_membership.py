"""Membership inference: scores of single items, AUC, PrivLeak and WAGLE's classifier."""

from __future__ import annotations

import math
import random
import zlib

import numpy as np
import pytest
import torch
from evaluation.metrics.planted import passage, scored, tokens, value, view

from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.evaluation.metric import Metric
from concept_unlearn.evaluation.metrics import (
    MembershipAUC,
    MembershipClassifier,
    PrivLeak,
    auc,
    membership_scores,
    priv_leak,
)
from concept_unlearn.evaluation.metrics.membership import loss, min_k, min_k_plus_plus, reference_loss, zlib_loss
from concept_unlearn.evaluation.view import Tokens
from concept_unlearn.lm.score import _read

PEER = "open-unlearning"
FIVE = tokens(0.2, 1.0, 3.0, 0.5, 2.0)


def items(*nll, prefix="", **reads):
    return [passage(f"{prefix}{i}", tokens(x, 0.0), **reads) for i, x in enumerate(nll)]


def sets(members, others, **beside):
    return view(forget=items(*members, prefix="f"), holdout=items(*others, prefix="h"), **beside)


def aucs(target, n=50):
    """Two sets with very nearly this AUC of their losses."""
    wrong = round((1 - target) * n * n)
    members = [1.0 if i < wrong // n else 0.0 for i in range(n)]
    return members, [0.5] * n


def test_loss_is_the_mean_over_all_tokens():
    assert loss(FIVE) == pytest.approx(1.34)
    assert loss(tokens(1.0, 3.0, n_end=1)) == 2


def test_zlib_divides_by_the_packed_bytes_of_the_text():
    text = "Größe " * 9
    assert zlib_loss(FIVE, text) == pytest.approx(1.34 / len(zlib.compress(text.encode("utf-8"), 6)))
    assert zlib_loss(tokens(), text) is None


def test_min_k_goldens():
    assert min_k(FIVE) == pytest.approx(2.5)
    assert min_k(FIVE, 0.2) == pytest.approx(3.0)


def test_min_k_of_everything_is_the_mean_without_the_end_token():
    assert min_k(FIVE, 1.0) == pytest.approx(loss(FIVE))
    ended = tokens(0.2, 1.0, 3.0, n_end=1)
    assert min_k(ended, 1.0) == pytest.approx(0.6)


@pytest.mark.parametrize("k", [0.05, 0.2, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_min_k_by_brute_force(n, k):
    generator = random.Random(n)
    drawn = [generator.random() for _ in range(n)]
    lowest = sorted(drawn, reverse=True)[: max(1, math.floor(k * n))]
    assert min_k(tokens(*drawn), k) == pytest.approx(sum(lowest) / len(lowest))


def test_a_peer_drops_the_last_token_whatever_it_is():
    text = passage("a", tokens(0.2, 1.0, 5.0))
    found = view(text)["forget"]
    assert membership_scores(found, "min_k", k=0.4) == [5.0]
    assert membership_scores(found, "min_k", k=0.4, compat=PEER) == [1.0]
    single = view(passage("a", tokens(5.0)))["forget"]
    assert membership_scores(single, "min_k", compat=PEER) == [0]


def scored_by(logits, label: int) -> Tokens:
    """One token as the model's own scoring reads it."""
    found = _read(torch.tensor([logits]).float(), torch.tensor([label]), moments=True)
    return Tokens(
        *(tuple(x.tolist()) for x in (found.logprobs, found.greedy)),
        0,
        tuple(found.mean.tolist()),
        tuple(found.std.tolist()),
    )


@pytest.mark.parametrize(("label", "standardised"), [(0, 0.646113), (3, -3.174423)])
def test_min_k_plus_plus_golden(label, standardised):
    found = scored_by((2, 1, 0, -1), label)
    assert found.mean == pytest.approx((-0.947537,), abs=1e-6)
    assert found.std == pytest.approx((0.785230,), abs=1e-6)
    assert min_k_plus_plus(found) == pytest.approx(-standardised, abs=2e-6)


@pytest.mark.parametrize("logits", [(1, 1, 1, 1), (1e4, 0, 0, 0)])
def test_min_k_plus_plus_of_a_distribution_without_variance_is_finite(logits):
    assert math.isfinite(min_k_plus_plus(scored_by(logits, 0)))
    assert min_k_plus_plus(scored_by((1, 1, 1, 1), 0)) == pytest.approx(0, abs=1e-3)


def test_min_k_plus_plus_leaves_out_the_end_token_and_all_but_the_lowest():
    found = tokens(1.0, 2.0, 3.0, 9.0, n_end=1, mean=(-1, -1, -1, -1), std=(1, 1, 2, 1))
    assert min_k_plus_plus(found, 0.4) == pytest.approx(1.0)
    assert min_k_plus_plus(found, 1.0) == pytest.approx((0 + 1 + 1) / 3)
    assert min_k_plus_plus(found, 1.0, "peer") == min_k_plus_plus(found, 1.0)


def test_the_reference_attack_takes_the_other_models_loss_off():
    assert reference_loss(tokens(1.0, 2.0), tokens(0.5, 0.5)) == pytest.approx(1.0)
    with pytest.raises(InvalidData, match="tokenizer"):
        reference_loss(tokens(1.0, 2.0), tokens(0.5))


def test_auc_golden():
    assert auc(np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.4])) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(10))
def test_auc_by_pairs_whatever_the_ties(seed):
    generator = np.random.default_rng(seed)
    members, others = generator.integers(0, 6, 17) / 3, generator.integers(1, 7, 11) / 3
    pairs = [(o > m) + 0.5 * (o == m) for m in members for o in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs))
    assert auc(np.exp(members), np.exp(others)) == auc(members, others)
    assert auc(members, members) == pytest.approx(0.5)
    assert auc(members, others) + auc(others, members) == pytest.approx(1)


@pytest.mark.parametrize("attack", ["loss", "min_k"])
def test_what_is_still_known_is_told_apart(attack):
    metric = MembershipAUC(attack=attack)
    assert metric(sets((0.1, 0.2, 0.3), (0.4, 0.5))).value == 1
    assert metric(sets((0.4, 0.5), (0.1, 0.2, 0.3))).value == 0
    assert metric(sets((0.4, 0.5), (0.4, 0.5))).value == 0.5
    assert metric(sets((0.3, 0.3), (0.3,))).value == 0.5


def test_its_interval_holds_it_and_the_notes_say_how():
    generator = random.Random(0)
    found = MembershipAUC(k=0.2)(sets(*([generator.random() + shift for _ in range(30)] for shift in (0, 0.2))))
    assert 0 < found.low < found.value < found.high < 1
    assert (found.n, found.n_total) == (60, 60)
    assert found.notes == {"attack": "min_k", "k": 0.2}


def test_two_fifths_and_one_fifth_of_the_tokens_say_different_things():
    long = view(
        forget=[passage("f", tokens(4.0, 0.1, 0.1, 0.1, 0.1))], holdout=[passage("h", tokens(3.0, 3.0, 0.1, 0.1, 0.1))]
    )
    assert MembershipAUC(k=0.2)(long).value == 0
    assert MembershipAUC(k=0.4)(long).value == 1


def test_items_without_a_token_are_left_out_with_a_count():
    found = MembershipAUC()(view(forget=[passage("f", tokens()), *items(0.1)], holdout=items(0.2, prefix="h")))
    assert (found.value, found.n, found.n_total) == (1, 2, 3)


def test_an_auc_of_one_class_is_undefined_and_says_why():
    found = MembershipAUC()(view(forget=items(0.1), holdout=[passage("h", tokens())]))
    assert found.value is None
    assert "no example" in found.notes["undefined"]


def test_sets_that_share_an_example_are_refused():
    for metric in (MembershipAUC(), PrivLeak(compat=PEER), MembershipClassifier(kept="forget")):
        with pytest.raises(InvalidData, match="'f0' is in"):
            metric(view(forget=items(0.1, prefix="f"), holdout=items(0.1, prefix="f")))


def test_gradnorm_is_read_and_undefined_where_no_gradient_flows():
    forget = [passage(f"f{i}", tokens(1.0), gradnorm=g) for i, g in enumerate(({"mean": 1.0, "global": 9.0}, None))]
    holdout = [passage("h", tokens(1.0), gradnorm={"mean": 2.0, "global": 3.0})]
    for norm, wanted in (("mean", 1), ("global", 0)):
        metric = MembershipAUC(attack="gradnorm", norm=norm)
        assert metric.reads == {"forget": ("gradnorm",), "holdout": ("gradnorm",)}
        found = metric(view(forget=forget, holdout=holdout))
        assert (found.value, found.n, found.n_total) == (wanted, 2, 3)


def test_min_k_plus_plus_without_moments_is_a_clear_error():
    metric = MembershipAUC(attack="min_k_plus_plus")
    assert metric.reads["forget"] == ("moments",)
    with pytest.raises(InvalidData, match="moments"):
        metric(sets((0.1,), (0.2,)))


def test_the_reference_attack_needs_the_other_model():
    metric = MembershipAUC(attack="reference")
    assert metric.beside == ("retrained",)
    assert MembershipAUC(attack="reference", against="original").beside == ("original",)
    assert "retrained" in metric(sets((0.1,), (0.2,))).notes["undefined"]
    other = sets((1.0, 2.0), (0.5, 0.5))
    assert metric(sets((1.5, 2.5), (1.5, 1.6), retrained=other)).value == 1
    assert MembershipAUC(attack="loss")(sets((1.5, 2.5), (1.5, 1.6), retrained=other)).value == pytest.approx(0.375)


def test_a_probe_is_scored_by_its_first_answer():
    found = view(scored([tokens(1.0), tokens(5.0)]))["forget"]
    assert membership_scores(found, "loss") == [1.0]
    assert membership_scores(found, "zlib") == [pytest.approx(1 / len(zlib.compress(b"answers 0", 6)))]


@pytest.mark.parametrize(
    ("u", "r", "wanted"), [(0.98, 0.48, -96.15), (2e-5, 0.98, 4899.9), (0.7, 0.5, -40), (0.6, 0.6, 0)]
)
def test_priv_leak_goldens(u, r, wanted):
    assert priv_leak(u, r) == pytest.approx(wanted, abs=5e-3)


def test_priv_leak_where_the_retrained_model_leaves_no_room():
    assert priv_leak(0.5, 1 - 1e-7) is None


def test_priv_leak_against_a_retrained_model():
    found = PrivLeak()(sets(*aucs(0.7), retrained=sets(*aucs(0.5))))
    assert found.value == pytest.approx(-40)
    assert found.low < found.value < found.high
    assert found.notes == {"k": 0.4, "auc": pytest.approx(0.7), "auc_retrained": pytest.approx(0.5)}
    assert PrivLeak().beside == ("retrained",)


def test_priv_leak_of_the_retrained_model_itself_is_0():
    retrained = sets((0.3, 0.1, 0.9), (0.4, 0.2))
    found = PrivLeak()(sets((0.3, 0.1, 0.9), (0.4, 0.2), retrained=retrained))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_priv_leak_without_a_retrained_model_is_undefined_where_a_peer_takes_one_half():
    views = sets(*aucs(0.7))
    assert PrivLeak()(views).value is None
    assert PrivLeak(compat=PEER)(views).value == pytest.approx(-40)


def test_priv_leak_where_the_reference_tells_all_apart_is_undefined_and_shows_both_aucs():
    found = PrivLeak()(sets((0.5, 0.5), (0.4, 0.6), retrained=sets((0.1, 0.1), (0.4, 0.6))))
    assert found.value is None
    assert (found.notes["auc"], found.notes["auc_retrained"]) == (0.5, 1)
    peer = PrivLeak(compat=PEER)(sets((0.5, 0.5), (0.4, 0.6), retrained=sets((0.1, 0.1), (0.4, 0.6))))
    assert peer.value == pytest.approx(0.5 / 1e-10 * 100)


def test_a_share_of_tokens_is_a_share():
    for k in (0, 1.5):
        with pytest.raises(InvalidConfig):
            Metric.parse({"kind": "membership_auc", "k": k})


class TestClassifier:
    @pytest.mark.parametrize(("forgotten", "wanted"), [((0.1, 0.12), 0), ((5.0, 5.1), 1), ((0.1, 5.0), 0.5)])
    def test_separated_scores_are_called_right(self, forgotten, wanted):
        kept, unseen = items(*[0.1, 0.2, 0.15] * 4, prefix="r"), items(*[5.0, 5.2, 4.9] * 4, prefix="h")
        found = value(MembershipClassifier(), forget=items(*forgotten, prefix="f"), retain=kept, holdout=unseen)
        assert found == wanted

    def test_one_class_is_undefined(self):
        found = MembershipClassifier()(
            view(forget=items(1.0), retain=items(1.0, prefix="r"), holdout=[passage("h", tokens())])
        )
        assert found.value is None
        assert "holdout" in found.notes["undefined"]
