"""An epoch on what is kept, then one on what is forgotten: the same items, each side at its own time."""

from __future__ import annotations

import pytest
import torch
from workers import tiny_finetune, tiny_scope

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.methods import Study
from concept_unlearn.objectives import GA, NPO, Objective, RetainKL, RetainNLL
from concept_unlearn.step import Read
from concept_unlearn.training import PrimalDual, Watch
from concept_unlearn.training.data import make_data
from concept_unlearn.training.plan import Plan


@pytest.fixture
def scope():
    return tiny_scope()


def plan(lm, scope, **settings):
    method = tiny_finetune(**settings)
    return Plan(lm, method.objectives, make_data(lm, scope, ["forget", "retain"], method), method)


def fit(lm, scope, *, probe=None, folder=None, progress=None, **settings):
    seen = []
    method = tiny_finetune(alternate=True, **settings)
    study = Study(lm, scope, folder=folder, progress=progress)
    return method.fit(study, log=lambda _, values: seen.append(values), probe=probe), seen


def test_every_item_comes_up_as_often_and_in_the_order_as_without(lm, scope):
    both, apart = plan(lm, scope), plan(lm, scope, alternate=True)
    assert apart.n_steps == 2 * both.n_steps
    assert apart.per_epoch == 2 * both.per_epoch
    for side in ("forget", "retain"):
        found = [step[side] for step in map(apart.items, range(apart.n_steps)) if step[side]]
        assert found == [step[side] for step in map(both.items, range(both.n_steps))]


def test_a_whole_epoch_of_what_is_kept_comes_before_one_of_what_is_forgotten(lm, scope):
    apart = plan(lm, scope, alternate=True)
    sides = [[s for s, items in apart.items(step).items() if items] for step in range(apart.n_steps)]
    assert sides == 3 * (3 * [["retain"]] + 3 * [["forget"]])
    assert [step for step in range(1, 19) if apart.ends(step, 1)] == [6, 12, 18]


def test_a_step_logs_and_follows_its_own_side_only(lm, scope):
    _, losses = fit(lm, scope, objectives=(GA(), RetainNLL(), RetainKL()), epochs=2)
    for values in losses[:3] + losses[6:9]:
        assert {"retain_nll", "retain_kl"} <= values.keys()
        assert values["loss"] == pytest.approx(values["retain_nll"] + values["retain_kl"])
        assert not values.keys() & {"ga", "forget_nll"}
    for values in losses[3:6] + losses[9:]:
        assert values["loss"] == values["ga"]
        assert not values.keys() & {"retain_nll", "retain_kl"}


def test_progress_adds_up_to_what_was_said_also_when_it_was_stopped(lm, scope, tmp_path):
    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    told = []
    fit(lm, scope, progress=told.append)
    assert sum(told) == tiny_finetune(alternate=True).n_items(scope)
    with pytest.raises(KeyboardInterrupt):
        fit(lm, scope, folder=tmp_path, probe=stop, checkpoint_every=4)
    told.clear()
    fit(lm, scope, folder=tmp_path, progress=told.append, checkpoint_every=4)
    assert sum(told) == tiny_finetune(alternate=True).n_items(scope)


def test_what_was_stopped_goes_on_to_the_same_weights(lm, scope, tmp_path):
    settings = {"objectives": (NPO(), RetainKL(), RetainNLL()), "checkpoint_every": 4}
    settings |= {"watch": Watch(keep=0.01), "balance": PrimalDual(eps=0.1, warm_up=0)}
    whole, _ = fit(lm, scope, folder=tmp_path / "whole", **settings)

    def stop(step):
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(lm, scope, folder=tmp_path / "stopped", probe=stop, **settings)
    again, _ = fit(lm, scope, folder=tmp_path / "stopped", **settings)
    assert all(torch.equal(again.deltas[n].dense(), d.dense()) for n, d in whole.deltas.items())
    assert (tmp_path / "stopped/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    watched = [line for line in (tmp_path / "whole/log.jsonl").read_text().splitlines() if "watched_forget" in line]
    assert len(watched) == 3


def test_only_a_step_on_what_is_kept_moves_the_dual_variable(lm, scope):
    _, losses = fit(lm, scope, epochs=1, balance=PrimalDual(alpha=1.0, eps=0.0, warm_up=0))
    alphas = [values["alpha"] for values in losses]
    assert alphas[0] < alphas[1] < alphas[2] < alphas[3] == alphas[4] == alphas[5]


def test_a_side_that_is_missing_or_tied_to_the_other_is_told(lm, scope):
    class Both(Objective):
        """Reads both sides."""

        def reads(self, lm):
            return (Read("forget"), Read("retain"))

        def __call__(self, step):
            raise NotImplementedError

    try:
        for objectives in ((GA(),), (RetainNLL(),), (Both(),)):
            with pytest.raises(InvalidConfig, match="to alternate takes objectives that forget and others that retain"):
                plan(lm, scope, objectives=objectives, alternate=True)
    finally:
        del Objective.members["both"]
