"""A planted feature is seen to be what it was planted as, and what cannot be looked at is said."""

from __future__ import annotations

import pytest
import torch
from conftest import CONCEPT, D_MODEL, PLANTED, make_perfect_sae, make_sae, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import SAEDictionary, load_dictionary
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig, NonFinite
from concept_unlearn.features import inspect_features, measure
from concept_unlearn.features.show.pieces import Pieces

EVEN, ODD = PLANTED


@pytest.fixture
def dictionary(planted):
    return load_dictionary(planted.first)


@pytest.fixture
def seen(planted, dictionary):
    return inspect_features(planted.lm, dictionary, planted.scope, [EVEN, ODD, 20], contexts=4, window=3)


def test_a_planted_feature_is_seen_on_its_words_and_on_no_others(seen):
    for feature, own in ((EVEN, CONCEPT[0::2]), (ODD, CONCEPT[1::2])):
        shown = seen.of(feature)
        assert len(shown.forget.contexts) == 4
        assert shown.retain.contexts == ()
        for context in shown.forget.contexts:
            fired = {t.strip() for t, a in zip(context.tokens, context.acts, strict=True) if a > 0}
            silent = {t.strip() for t, a in zip(context.tokens, context.acts, strict=True) if a == 0}
            assert fired <= {f"w{i}" for i in own}
            assert silent.isdisjoint(f"w{i}" for i in own)
            assert context.acts[context.peak] == max(context.acts)


def test_rates_are_those_of_the_statistics(planted, dictionary, seen):
    stats = measure(planted.lm, dictionary, planted.scope)
    for shown in seen.features:
        for side, found in ((shown.forget, stats.forget), (shown.retain, stats.retain)):
            assert side.rate.value == pytest.approx(float(found.rate[shown.feature]))
            assert side.rate.tokens == found.n_tokens
            assert sum(side.density) == side.rate.fired
            assert len(shown.edges) == len(side.density) + 1


def test_a_context_is_a_stretch_of_its_passage(planted, seen):
    for shown in seen.features:
        for context in (*shown.forget.contexts, *shown.retain.contexts):
            passage = getattr(planted.scope, context.part)[context.passage].text.split()
            first = context.position - context.peak
            assert [t.strip() for t in context.tokens] == passage[first : first + len(context.tokens)]


def test_passages_near_the_concept_are_among_those_that_are_kept(planted, dictionary):
    seen = inspect_features(planted.lm, dictionary, planted.scope, range(2 * D_MODEL), contexts=40)
    parts = {context.part for shown in seen.features for context in shown.retain.contexts}
    assert parts == {"near", "retain"}


def test_batches_change_nothing(planted, dictionary, seen):
    other = inspect_features(
        planted.lm, dictionary, planted.scope, [EVEN, ODD, 20], contexts=4, window=3, batch_tokens=20
    )
    assert [s.model_dump(exclude={"forget", "retain"}) for s in other.features] == [
        s.model_dump(exclude={"forget", "retain"}) for s in seen.features
    ]
    assert [s.forget.rate for s in other.features] == [s.forget.rate for s in seen.features]


def test_all_features_share_one_pass_over_each_side(planted, dictionary):
    calls = []
    handle = planted.lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    inspect_features(planted.lm, dictionary, planted.scope, range(2 * D_MODEL), batch_tokens=10**6)
    handle.remove()
    assert len(calls) == 2


def test_the_lens_reads_the_decoder_row_by_the_unembedding_alone(any_lm):
    scope = Scope.of("any", forget=[words(20, 21, 22)], retain=[words(7, 8, 9)], out_far=[])
    dictionary = SAEDictionary(make_perfect_sae())
    shown = inspect_features(any_lm, dictionary, scope, [5], tokens=3).features[0]
    model = any_lm.model
    head = model.W_U.T if hasattr(model, "W_U") else model.lm_head.weight
    logits = head.detach()[:, 5]
    decode = Pieces(any_lm.tokenizer).one
    assert [t.text for t in shown.up] == [decode(i) for i in logits.topk(3).indices.tolist()]
    assert [t.text for t in shown.down] == [decode(i) for i in (-logits).topk(3).indices.tolist()]
    assert [t.logit for t in shown.up] == pytest.approx(logits.topk(3).values.tolist(), rel=2e-3)


def test_a_site_that_is_no_residual_stream_has_no_lens(planted):
    dictionary = SAEDictionary(make_perfect_sae("blocks.1.attn.hook_z"))
    seen = inspect_features(planted.lm, dictionary, planted.scope, [0])
    assert not seen.has_lens
    assert seen.features[0].up == ()
    assert "It writes where the unembedding does not read" in seen.html()


def test_opposite_rows_are_the_farthest_and_norms_do_not_matter(planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.W_enc[:, 7], sae.W_dec[7] = sae.W_enc[:, 3], 100 * sae.W_dec[3]  # the same direction, a hundred times
    seen = inspect_features(planted.lm, as_made(sae), planted.scope, [3], neighbours=2 * D_MODEL)
    found = seen.features[0].nearest
    assert (found[0].feature, found[0].cosine) == (7, 1.0)
    assert (found[-1].feature, found[-1].cosine) == (3 + D_MODEL, -1.0)
    assert 3 not in [n.feature for n in found]


def test_codes_are_looked_at_as_features_are(planted, codes):
    seen = inspect_features(planted.lm, load_dictionary(codes), planted.scope, [CONCEPT[0], 8])
    concept, other = seen.features
    assert {c.tokens[c.peak].strip() for c in concept.forget.contexts} == {f"w{CONCEPT[0]}"}
    assert concept.retain.contexts == other.forget.contexts == ()
    assert concept.up
    assert concept.nearest


def test_a_feature_that_never_fires_is_shown_as_such(planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.b_enc[2] = -1e6
    seen = inspect_features(planted.lm, as_made(sae), planted.scope, [2])
    shown = seen.features[0]
    assert not shown.fires
    assert (shown.edges, shown.forget.density, shown.forget.contexts) == ((), (), ())
    assert shown.forget.rate.value == shown.forget.rate.low == 0 < shown.forget.rate.high
    assert shown.up
    assert type(seen).model_validate_json(seen.model_dump_json()) == seen


def test_a_decoder_row_of_zeros_writes_nothing_and_is_near_nothing(planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.W_dec[[4, 9]] = 0
    seen = inspect_features(planted.lm, as_made(sae), planted.scope, [4, 3], neighbours=2 * D_MODEL)
    assert (seen.of(4).norm, seen.of(4).up, seen.of(4).nearest) == (0, (), ())
    assert {4, 9}.isdisjoint(n.feature for n in seen.of(3).nearest)


def test_rows_of_zeros_of_a_dictionary_that_rescales_by_decoder_norms_break_nothing(planted):
    sae = make_sae(
        "topk", d_sae=2 * D_MODEL, k=4, hook_name="blocks.0.hook_resid_pre", rescale_acts_by_decoder_norm=True
    )
    sae = sae.to(dtype=torch.float32)
    with torch.no_grad():
        sae.W_dec[4] = 0
    seen = inspect_features(planted.lm, as_made(sae), planted.scope, [4, 3])
    assert (seen.of(4).norm, seen.of(4).up, seen.of(4).nearest) == (0, (), ())
    assert seen.of(3).norm == pytest.approx(1, abs=1e-3)


def test_a_dictionary_that_knows_nothing_of_itself_is_looked_at(planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    sae.cfg.metadata = type(sae.cfg.metadata)()
    seen = inspect_features(planted.lm, SAEDictionary(sae, site="blocks.0.hook_resid_pre"), planted.scope, [EVEN])
    assert seen.dictionary == "unknown model/blocks.0.hook_resid_pre"
    assert (seen.neuronpedia, seen.labeller, seen.features[0].label) == (None, None, None)


def test_a_broken_decoder_is_refused(planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.W_dec[0, 0] = torch.nan
    with pytest.raises(NonFinite, match="decoder"):
        inspect_features(planted.lm, as_made(sae), planted.scope, [1])


@pytest.mark.parametrize(
    ("features", "settings", "match"),
    [
        ([], {}, "was chosen to look at"),
        ([2 * D_MODEL], {}, f"has features 0 to {2 * D_MODEL - 1}; given: {2 * D_MODEL}"),
        ([-1], {}, "given: -1"),
        ([1, 1], {}, "more than once"),
        ([1], {"contexts": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_looked_at_is_said(planted, dictionary, features, settings, match):
    with pytest.raises(InvalidConfig, match=match):
        inspect_features(planted.lm, dictionary, planted.scope, features, **settings)


def test_a_dictionary_of_another_model_is_refused(planted):
    with pytest.raises(DictionaryMismatch):
        inspect_features(planted.lm, SAEDictionary(make_sae(d_in=8)), planted.scope, [0])


def test_pieces_keep_the_space_before_a_word(lm):
    assert "".join(Pieces(lm.tokenizer)([7, 8, 9])) == " w7 w8 w9"


def as_made(sae):
    return Kept(sae)


class Kept(SAEDictionary):
    """One that is not asked how well it fits: it was broken on purpose."""

    @property
    def site_out(self):
        return type(self.site)("resid_post", 2)

    @site_out.setter
    def site_out(self, _): ...
