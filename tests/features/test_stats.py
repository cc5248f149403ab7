"""One pass gives what brute force over all tokens gives, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, make_hf, make_perfect_sae, make_sae, make_tokenizer, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import SAEDictionary
from concept_unlearn.errors import DictionaryMismatch, EmptyData
from concept_unlearn.features import attribute, measure, measure_all
from concept_unlearn.features.stats import variance_explained
from concept_unlearn.lm import LM, Site

FORGET = [words(20, 21, 22, 23), words(21, 20, 24), words(25, 26, 27, 28, 29, 20)]
RETAIN = [words(7, 8, 9), words(10, 11, 12, 13, 14), words(7, 9)]


@pytest.fixture
def scope():
    return Scope.of("planted", forget=FORGET, retain=RETAIN, out_far=[])


@pytest.fixture
def dictionary():
    return SAEDictionary(make_perfect_sae())


def brute_force(lm, dictionary, texts):
    rows = []
    for text in texts:
        ids = torch.tensor([lm.encode(text, chat=False)])
        x = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), dictionary.site)[dictionary.site][0]
        rows.append(x)
    x = torch.cat(rows)
    acts = dictionary.encode(x)
    peaks = torch.stack([dictionary.encode(r).amax(0) for r in rows])
    return x, acts, peaks


@pytest.mark.parametrize("batch_tokens", [1, 8, 4096])
def test_sums_equal_brute_force_for_any_batch_size(lm, dictionary, scope, batch_tokens):
    stats = measure(lm, dictionary, scope, batch_tokens=batch_tokens)
    for found, texts in ((stats.forget, FORGET), (stats.retain, RETAIN)):
        x, acts, peaks = brute_force(lm, dictionary, texts)
        assert (found.n_tokens, found.n_sequences) == (len(x), len(texts))
        assert torch.equal(found.count, (acts > 0).sum(0))
        assert torch.equal(found.sequences, (peaks > 0).sum(0))
        torch.testing.assert_close(found.mean, acts.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mean_square, acts.square().mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.largest, acts.amax(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.x_mean, x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.x_second.float(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        assert found.median_norm == pytest.approx(float(x.norm(dim=-1).median()), rel=1e-5)
        assert torch.equal(found.peaks.sum(-1), torch.full_like(found.peaks.sum(-1), len(texts)))


def test_several_dictionaries_share_one_pass_over_the_model(lm, dictionary, scope):
    calls = []
    handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    both = measure_all(lm, [dictionary, SAEDictionary(dictionary.sae, site="resid_pre.1")], scope)
    handle.remove()
    assert len(calls) == 2  # forget, retain
    assert both[0].site != both[1].site
    alone = measure(lm, dictionary, scope)
    assert torch.equal(both[0].forget.count, alone.forget.count)


def test_bos_is_not_measured(lm, dictionary):
    with_bos = Scope.of("a", forget=[f"<bos> {FORGET[0]}"], retain=RETAIN, out_far=[])
    assert measure(lm, dictionary, with_bos).forget.n_tokens == 4


def test_sinks_are_not_measured(lm, dictionary, scope):
    x, _, _ = brute_force(lm, dictionary, FORGET)
    norms = x.norm(dim=-1)
    dictionary.max_norm = float(norms.median())
    assert measure(lm, dictionary, scope).forget.n_tokens == int((norms <= norms.median()).sum())


def test_a_dictionary_of_another_model_is_found_out(lm, scope):
    with pytest.raises(DictionaryMismatch, match="explains -"):
        measure(lm, SAEDictionary(make_sae("standard")), scope)
    with pytest.raises(DictionaryMismatch, match="reads 24 numbers"):
        measure(lm, SAEDictionary(make_sae("standard", d_in=24)), scope)


def test_a_scope_without_forget_text_is_refused():
    with pytest.raises(EmptyData, match="no forget passage"):
        Scope.of("empty", forget=[], retain=RETAIN, out_far=[])


def test_variance_explained_has_its_limits():
    x = torch.randn(50, 8)
    assert variance_explained(x, x) == 1
    assert variance_explained(x, x.mean(0).expand_as(x)) == pytest.approx(0, abs=1e-6)


def test_attribution_is_the_derivative_of_the_answers_log_probability(dictionary):
    """Scaling feature i by 1 + e changes log p by e times its attribution; finite differences in float64."""
    lm = LM(make_hf("gpt2").double(), make_tokenizer())  # a Llama norms in float32 whatever it is loaded in
    probes = [{"prompt": words(20, 21), "answers": words(22)}, {"prompt": words(7, 8, 9), "answers": words(10, 11)}]
    scope = Scope.of("a", forget=FORGET, retain=RETAIN, in_easy=probes, out_far=[])
    found = attribute(lm, dictionary, scope, measure(lm, dictionary, scope), batch_size=2).attribution
    rows = [([20, 21], [22]), ([7, 8, 9], [10, 11])]

    def logprob(i, e):
        def scale(x, _):
            return x + e * (x @ W_enc[:, i]).relu()[..., None] * W_dec[i]

        W_enc, W_dec = dictionary.sae.W_enc.double(), dictionary.sae.W_dec.double()
        total = 0.0
        with torch.no_grad(), lm.edit({Site("resid_post", 1): scale}):
            for prompt, answer in rows:
                logits = lm.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                total += sum(float(logits[len(prompt) - 1 + j, t]) for j, t in enumerate(answer))
        return total / len(rows)

    for i in (0, 5, 17, 30):
        assert float(found[i]) == pytest.approx((logprob(i, 1e-5) - logprob(i, -1e-5)) / 2e-5, rel=1e-4, abs=1e-5)


def test_attribution_without_probes_reads_on_in_the_forget_text(lm, dictionary, scope):
    found = attribute(lm, dictionary, scope, measure(lm, dictionary, scope)).attribution
    assert found.shape == (2 * D_MODEL,)
    assert found.abs().sum() > 0
