"""An edit of activations can be left out, a change of the weights cannot."""

from __future__ import annotations

from evaluation.attacks.scenes import patch_of, victim_of

from concept_unlearn.evaluation.attacks import SwitchOff
from concept_unlearn.patches import Stack


def leaked(lm, patch):
    victim = victim_of(lm, patch)
    return victim.benchmark.measure(victim.benchmark.observe(lm, patch), victim.leaks)


def test_an_edit_is_gone(lm):
    patch = patch_of("feature", lm)
    assert leaked(lm, patch) != leaked(lm, None)
    assert SwitchOff()(victim_of(lm, patch)).results == leaked(lm, None)


def test_a_change_of_the_weights_stays(lm):
    patch = patch_of("weight", lm)
    assert leaked(lm, patch) != leaked(lm, None)
    assert SwitchOff()(victim_of(lm, patch)).results == leaked(lm, patch)


def test_of_a_stack_the_weights_stay_at_their_strength(lm):
    weight, feature = patch_of("weight", lm), patch_of("feature", lm)
    found = SwitchOff()(victim_of(lm, Stack((weight, feature, Stack((feature,))), strength=0.5))).results
    assert found == leaked(lm, weight.at(0.5))
    assert found != leaked(lm, weight)
