"""Routers: what is planted is told apart, and retained tokens that were not fitted on seldom pass."""

from __future__ import annotations

import pytest
import torch
from conftest import CONCEPT, FAR, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.errors import EmptyData, InvalidConfig, InvalidData
from concept_unlearn.features.routing import Routing, Texts, fit_router, fit_routers
from concept_unlearn.gates import SOFTNESS
from concept_unlearn.lm import Site

D = 12


def draw(n, shift, seed):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    x[:, 3] += shift
    return x * torch.logspace(-2, 2, D) + 5  # scales that plain regression would choke on


def texts(x, length=1):
    """As many texts of so many tokens as they make."""
    return Texts(x, torch.arange(len(x)) // length)


def fit(forget, retain, *, length=1, **settings):
    return fit_router(texts(forget, length), texts(retain, length), Routing(**{"window": 1, "ridge": 1.0} | settings))


def share(router, x):
    return float((torch.sigmoid(x @ router.weight + router.bias) > router.threshold).float().mean())


def lately(score, window, length):
    """The soft maximum over the last tokens of each text, one by one."""
    found = []
    for i in range(len(score)):
        some = score[max(i - window + 1, i - i % length) : i + 1]
        found.append(SOFTNESS * (some / SOFTNESS).exp().mean().log())
    return torch.stack(found)


class TestARouter:
    def test_planted_tokens_are_told_apart(self):
        router = fit(draw(500, 8.0, 0), draw(900, 0.0, 1))
        assert share(router, draw(2000, 8.0, 3)) > 0.99
        assert share(router, draw(2000, 0.0, 4)) < 0.03
        assert router.recall > 0.99

    @pytest.mark.parametrize("allowed", [0.01, 0.05, 0.2])
    def test_no_more_retained_tokens_pass_than_allowed_where_classes_overlap(self, allowed):
        router = fit(draw(500, 1.5, 0), draw(2900, 0.0, 1), false_positives=allowed)
        assert share(router, draw(20000, 0.0, 5)) == pytest.approx(allowed, rel=0.5)
        assert share(router, draw(2000, 1.5, 6)) > 1.5 * allowed

    def test_the_threshold_is_of_tokens_that_were_not_learned_by_heart(self):
        """With more dimensions than tokens the fit is perfect on its own, and no better than chance on others."""
        generator = torch.Generator().manual_seed(0)
        forget, retain, new = (torch.randn(n, 300, generator=generator) for n in (80, 80, 4000))
        router = fit(forget, retain, ridge=1e-3, false_positives=0.1, folds=8)
        assert router.threshold > 0.6
        assert share(router, new) == pytest.approx(0.1, abs=0.1)
        assert share(router, retain) == 0

    def test_a_rare_class_weighs_as_much(self):
        """Ten times fewer forget tokens leave the boundary in the middle."""
        router = fit(draw(100, 3.0, 0), draw(1000, -3.0, 1))
        middle = torch.sigmoid(draw(4000, 0.0, 3) @ router.weight + router.bias)
        assert 0.3 < float((middle > 0.5).float().mean()) < 0.7

    def test_the_threshold_never_falls_below_the_floor(self):
        far = fit(draw(500, 30.0, 0), draw(500, 0.0, 1), floor=0.25, ridge=1e-3)
        assert far.threshold == 0.25

    def test_a_fit_is_a_minimum_of_what_it_says(self):
        """The gradient of balanced cross-entropy is -ridge w, in units of the activations' standard deviation."""
        forget, retain = draw(60, 1.0, 0), draw(240, 0.0, 1)
        router = fit(forget, retain, ridge=0.3)
        x, y = torch.cat([forget, retain]).double(), torch.cat([torch.ones(60), torch.zeros(240)]).double()
        weight = torch.where(y == 1, 0.5 / 60, 0.5 / 240)
        missed = weight * (torch.sigmoid(x @ router.weight.double() + router.bias) - y)
        scaled = (x - x.mean(0)) / x.std(0)
        torch.testing.assert_close(missed @ scaled, -0.3 * router.weight.double() * x.std(0), rtol=1e-2, atol=1e-3)

    def test_a_word_here_and_there_marks_the_text_around_it(self):
        """One token of ten is the concept's, the others are as everywhere: by itself a token seldom says which."""
        forget, new = draw(2000, 0.0, 0), draw(2000, 0.0, 7)
        for x in (forget, new):
            x[::10] = draw(200, 30.0, 1)
        retain, other = draw(2000, 0.0, 2), draw(2000, 0.0, 3)
        recall, passed = {}, {}
        for window in (1, 10):
            router = fit(forget, retain, length=40, window=window, ridge=0.1)
            for found, x in ((recall, new), (passed, other)):
                score = lately(x @ router.weight + router.bias, window, 40)
                found[window] = float((torch.sigmoid(score) > router.threshold).float().mean())
        assert recall[1] < 0.15
        assert recall[10] > 0.9
        assert max(passed.values()) < 0.03

    @pytest.mark.parametrize(
        "bad", [{"false_positives": 1.0}, {"folds": 1}, {"window": 0}, {"passages": 1}, {"nope": 1}]
    )
    def test_settings_that_make_no_sense(self, bad):
        with pytest.raises((InvalidConfig, ValueError)):
            Routing(**bad)


class TestRoutersOfAModel:
    SITES = (Site("mlp_in", 0), Site("mlp_in", 2))

    def test_a_concept_is_told_from_the_rest(self, planted):
        routers = fit_routers(planted.lm, planted.scope, self.SITES, Routing(false_positives=0.05))
        assert tuple(routers) == self.SITES
        assert routers[self.SITES[0]].recall > 0.5

        def passing(pool, site):
            ids = torch.tensor([planted.lm.encode(words(*pool), chat=False)])
            x = planted.lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), site)[site][0]
            return share(routers[site], x)

        assert passing(CONCEPT, self.SITES[0]) > 0.7
        assert passing(FAR, self.SITES[0]) < 0.2

    def test_it_is_the_same_each_time_and_however_many_sites_are_read(self, planted):
        first, again = (
            fit_routers(planted.lm, planted.scope, self.SITES, Routing(tokens=60, window=3)) for _ in range(2)
        )
        alone = fit_routers(planted.lm, planted.scope, self.SITES[1:], Routing(tokens=60, window=3))
        for other in (again, alone):
            assert torch.equal(other[self.SITES[1]].weight, first[self.SITES[1]].weight)
            assert other[self.SITES[1]][1:] == first[self.SITES[1]][1:]

    def test_the_same_text_on_both_sides_cannot_be_told(self, planted):
        forget = [words(*range(20 + i, 28 + i)) for i in range(6)]
        scope = Scope.of("same", forget=forget, retain=[f"{text} w7" for text in forget], out_far=[])
        with pytest.raises(InvalidData, match="no router tells forget tokens from retained ones at 0"):
            fit_routers(planted.lm, scope, self.SITES[:1], Routing(false_positives=0, floor=0.999))

    def test_one_retained_passage_is_too_few(self, planted):
        scope = Scope.of("one", forget=[words(30, 31)], retain=[words(8, 9)], out_far=[])
        with pytest.raises(EmptyData, match="at least two retained passages"):
            fit_routers(planted.lm, scope, self.SITES, Routing())
