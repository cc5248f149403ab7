"""Ban finds the codes that were planted, takes no others, and says so where there is nothing to take."""

from __future__ import annotations

import pytest
import torch
from conftest import CONCEPT, FAR, NEAR, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.features import EnrichmentScore, measure, scores
from concept_unlearn.lm import Site
from concept_unlearn.methods import Ban, Method, Study, Suppress
from concept_unlearn.patches import CodebookPatch, load_patch

SITE = Site("resid_pre", 0)


def logits(lm, *prompts):
    with torch.no_grad():
        return torch.cat([lm.logits(torch.tensor([lm.encode(p, chat=False)]))[0] for p in prompts])


def test_it_bans_the_concepts_codes_and_no_others(planted, codes):
    patch = Ban(codebook=codes)(planted.lm, planted.scope)
    assert isinstance(patch, CodebookPatch)
    assert set(patch.banned) == set(CONCEPT)
    assert (patch.mode, patch.error, patch.gate.kind) == ("refill", "drop", "always")


def test_the_first_n_are_the_most_enriched(planted, codes):
    found = Ban(codebook=codes, n=3)(planted.lm, planted.scope).banned
    stats = measure(planted.lm, load_dictionary(codes), planted.scope)
    values = EnrichmentScore()(stats)
    assert len(found) == 3
    assert values[list(found)].min() >= values[[i for i in CONCEPT if i not in found]].max()


@pytest.mark.parametrize(
    ("mode", "error"), [("refill", "drop"), ("refill", "keep"), ("zero", "drop"), ("zero", "keep"), ("prune", "drop")]
)
def test_what_speaks_of_the_concept_changes_and_nothing_else(planted, codes, mode, error, tmp_path):
    lm, others = planted.lm, (words(*FAR[:6]), words(*NEAR[:6]))
    patch = Ban(codebook=codes, mode=mode, error=error)(lm, planted.scope)
    before, unrelated = logits(lm, words(*CONCEPT[:6])), logits(lm, *others)
    folder = patch.save(tmp_path / "patch", lm)
    for same in (patch, load_patch(folder, lm)):
        with same.on(lm):
            assert (logits(lm, words(*CONCEPT[:6])) - before).abs().amax() > 1
            if error == "keep":
                assert torch.equal(logits(lm, *others), unrelated)
            else:
                torch.testing.assert_close(logits(lm, *others), unrelated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gate", ["sequence", "streaming", "probe"])
def test_a_gate_is_fitted_on_the_banned_codes_or_brings_its_own_sensor(planted, codes, gate):
    patch = Ban(codebook=codes, gate=gate, error="keep")(planted.lm, planted.scope)
    assert patch.gate.above is not None
    assert (patch.sensor is not None) == (gate == "probe")
    said, others = words(*CONCEPT[:6]), words(*FAR[:6])
    with patch.on(planted.lm):
        inside = logits(planted.lm, said), logits(planted.lm, others)
    assert not torch.equal(inside[0], logits(planted.lm, said))
    assert torch.equal(inside[1], logits(planted.lm, others))


def test_texts_of_the_same_codes_flag_nothing_and_say_what_was_seen(planted, codes):
    forget = [p.text for p in planted.scope.forget]
    same = Scope.of("same", forget=forget, retain=[" ".join(reversed(text.split())) for text in forget])
    with pytest.raises(
        EmptyData, match=r"by enrichment: of 48 codes 10 are chosen on the 24 forget passages; .*loosen"
    ):
        Ban(codebook=codes)(planted.lm, same)


def test_more_than_pass_is_an_error(planted, codes):
    with pytest.raises(InvalidConfig, match=r"only 10 features .* pass enrichment; asked for 11"):
        Ban(codebook=codes, n=11)(planted.lm, planted.scope)


def test_another_kind_of_dictionary_has_no_codes(planted):
    with pytest.raises(InvalidConfig, match="has no codes to ban: it is no codebook; use suppress"):
        Ban(codebook=planted.first)(planted.lm, planted.scope)


def test_a_codebook_has_no_features_to_suppress(planted, codes):
    from concept_unlearn.errors import NotExact

    with pytest.raises(NotExact, match="the ban method"):
        Suppress(dictionaries=(codes,), score="enrichment", n=2)(planted.lm, planted.scope)


def test_it_announces_what_it_reads(planted, codes):
    method, study = Ban(codebook=codes), Study(planted.lm, planted.scope)
    assert method.reads == ((codes,), ())
    seen = []
    handle = planted.lm.model.register_forward_pre_hook(lambda *_: seen.append(1))
    study.measure(*method.reads)
    method.fit(study)
    handle.remove()
    assert len(seen) == 2  # forget, retain


@pytest.mark.parametrize("spec", [{"codebook": "a"}, {"codebook": "a", "n": 3, "mode": "prune", "gate": "probe"}])
def test_a_spec_is_the_method(spec):
    made = Method.parse({"kind": "ban", **spec})
    assert made == Ban(**spec)
    assert Method.parse(made.spec()) == made


@pytest.mark.parametrize("wrong", [{}, {"codebook": "a", "n": 0}, {"codebook": "a", "mode": "skip"}])
def test_a_spec_that_does_not_fit(wrong):
    with pytest.raises(InvalidConfig, match=r"ban: (codebook|n|mode)"):
        Method.parse({"kind": "ban", **wrong})


def test_false_discoveries_are_controlled_over_all_codes_that_were_tested(planted, codes, monkeypatch):
    """Golden values of the specification: of eight p values at 0.05 Benjamini and Hochberg keep two."""
    given = iter([0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.9, 0.9])
    stats = measure(planted.lm, load_dictionary(codes), planted.scope)
    monkeypatch.setattr(scores, "_association_p", lambda *_: next(given))
    stats.forget.sequences[44:] = 0  # of the ten words of the concept eight are tested
    assert EnrichmentScore()(stats).isfinite().nonzero()[:, 0].tolist() == [36, 37]
