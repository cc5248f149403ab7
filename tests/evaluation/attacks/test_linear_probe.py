"""The linear probe: finds what is there, nothing in noise, and never looks at what it reports on."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, make_perfect_sae
from evaluation.attacks.scenes import asking, patch_of, secret, victim_of

from concept_unlearn.data.examples import Probe
from concept_unlearn.edits import Zero
from concept_unlearn.errors import EmptyData
from concept_unlearn.evaluation.attacks import LinearProbe, linear_probe
from concept_unlearn.evaluation.attacks.linear_probe import RESULT, Rows, held_out, last_tokens, scored
from concept_unlearn.lm import Site
from concept_unlearn.patches import FeaturePatch

FOLDS = 5


def rows(n=60, d=12, *, signal=0.0, seed=0, candidates=4):
    """Questions with one right answer each, which lies ``signal`` further along one direction."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.zeros(n * candidates, dtype=torch.bool)
    right[::candidates] = True
    acts = torch.randn(n * candidates, d, generator=generator)
    direction = torch.randn(d, generator=generator)
    acts += signal * right[:, None] * direction / direction.norm()
    return Rows(acts, torch.arange(n).repeat_interleave(candidates), right)


def fold(n=60, seed=0, folds=FOLDS):
    return torch.arange(n)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] % folds


def mean(values):
    return sum(values) / len(values)


def test_a_planted_direction_is_found():
    assert mean(held_out({0: rows(signal=20.0)}, fold()).best) == 1.0


def test_noise_is_noise_also_after_choosing_among_many_layers():
    """Which choosing on what is reported would not be: the best of the curve is above chance."""
    found = [held_out({n: rows(40, seed=20 * s + n) for n in range(6)}, fold(40, s, 3)) for s in range(4)]
    honest = mean([mean(f.best) for f in found])
    assert abs(honest - 0.5) < 0.1
    assert mean([max(map(mean, f.by_layer.values())) for f in found]) > honest + 0.05


def test_the_layer_with_the_signal_is_chosen_in_every_fold():
    found = held_out({0: rows(seed=1), 3: rows(signal=6.0), 7: rows(seed=2)}, fold())
    assert found.chosen == [3] * FOLDS
    assert found.best == found.by_layer[3]
    assert mean(found.by_layer[3]) > 0.95


def test_a_value_is_the_share_of_distractors_below_and_a_tie_is_half():
    taught = Rows(
        torch.tensor([[1.0], [-1.0]] * 8), torch.arange(8).repeat_interleave(2), torch.tensor([True, False] * 8)
    )
    acts = torch.tensor([[2.0], [1.0], [2.0], [3.0], [0.0]])
    asked = Rows(acts, torch.full((5,), 9), torch.tensor([True, False, False, False, False]))
    assert scored(taught, asked) == {9: (1 + 0.5 + 0 + 1) / 4}


def test_a_fold_is_never_taught_what_it_is_asked():
    """Held-out values do not change when labels elsewhere do not, whatever is put in place of the fold itself."""
    where, layers = fold(), {0: rows(signal=2.0), 1: rows(signal=2.0, seed=3)}
    found = held_out(layers, where)
    mine = where[layers[0].owner] == 2
    flipped = {}
    for n, r in layers.items():  # in fold 2 the second candidate is right
        right = r.right.clone()
        right[mine] = r.right.roll(1)[mine]
        flipped[n] = Rows(r.acts, r.owner, right)
    other = held_out(flipped, where)
    assert found.chosen[2] == other.chosen[2]
    taught = layers[found.chosen[2]]
    again = scored(taught.of(where != 2), taught.of(where == 2))
    assert [found.best[i] for i in again] == list(again.values())


def test_padding_and_batches_change_nothing(any_lm):
    ids = [[8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]
    sites = [Site("resid_post", 0), Site("resid_post", 2)]
    together = last_tokens(any_lm, ids, sites, 16)
    for i, row in enumerate(ids):
        alone = any_lm.activations(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), *sites)
        for site in sites:
            torch.testing.assert_close(together[site][i], alone[site][0, -1], atol=1e-5, rtol=1e-4)
    for site, x in last_tokens(any_lm, ids, sites, 1).items():
        torch.testing.assert_close(x, together[site], atol=1e-5, rtol=1e-4)


def test_it_reads_the_patched_model(lm):
    """Under a patch that empties the last layer all candidates look alike."""
    patch = FeaturePatch(
        dictionary=make_perfect_sae("blocks.2.hook_resid_post"), features=range(2 * D_MODEL), edit=Zero()
    )
    attack = LinearProbe(stride=99, folds=3)
    assert attack(victim_of(lm)).results[RESULT].value == 1.0  # the same answer everywhere: its token tells
    emptied = attack(victim_of(lm, patch))
    assert emptied.results[RESULT].value == 0.5
    assert emptied.curve == ((2, 0.5),)


def test_values_belong_to_probes_and_layers_are_told(lm):
    found = LinearProbe(stride=1, folds=4)(victim_of(lm, patch_of("feature", lm)))
    assert len(found.results[RESULT].values) == 12
    assert len(found.results[RESULT].notes["layer"].split(", ")) == 4
    assert [n for n, _ in found.curve] == [0, 1, 2]


def test_probes_without_distractors_are_left_out_and_too_few_are_an_error(lm):
    bare = [Probe(prompt=f"w3{i}", answers="w20") for i in range(5)]
    found = LinearProbe(folds=3)(victim_of(lm, benchmark=asking(forget=[*bare, *secret(6)])))
    assert found.results[RESULT].n == 6
    with pytest.raises(EmptyData, match="3 folds"):
        LinearProbe(folds=3)(victim_of(lm, benchmark=asking(forget=[*bare, *secret(2)])))


def test_no_more_probes_and_distractors_than_asked_for_are_read(lm, monkeypatch):
    read = []
    original = linear_probe.last_tokens
    monkeypatch.setattr(linear_probe, "last_tokens", lambda lm, ids, *a: read.append(len(ids)) or original(lm, ids, *a))
    probes = [p.model_copy(update={"distractors": ("w22", "w23", "w24")}) for p in secret(12)]
    LinearProbe(folds=3, distractors=2, max_probes=7)(victim_of(lm, benchmark=asking(forget=probes)))
    assert read == [7 * 3]
